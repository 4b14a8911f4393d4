"""Run the students' training loop some steps at a time, for benchmarks that alternate it.

The benchmarks of training reach the pipeline's students' side only through this module.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.compute.device import (
    compile_long_runs,
    depthwise_in_float32,
    to_device,
    training_autocast,
)
from pipeline.compute.distributed import SINGLE_PROCESS
from pipeline.data.prepared.dataset import Dataset, Split
from pipeline.data.prepared.image_decoding import read_image
from pipeline.data.sources.archives import read_files
from pipeline.data.sources.image_reading import to_pixels
from pipeline.distillation.device_rows import SoftTargetLookup
from pipeline.distillation.objective import method_loss, student_loss
from pipeline.distillation.params import KD
from pipeline.models.params import NetworkParams
from pipeline.models.spec import InputSpec, build, model_spec
from pipeline.runtime.derived_random import permutation
from pipeline.students.label_loss import label_loss
from pipeline.students.loop import Loss, TrainingBatch, train_step, whole_batch
from pipeline.students.params import TrainingParams
from pipeline.training.cuda_graph import capture_long_runs
from pipeline.training.optimisation import Optimisation, batches
from pipeline.views.loader import Batch, Views
from pipeline.views.policy import ViewPolicy

TEMPERATURE, SOFT, HARD = 4.0, 0.9, 0.1
METHOD = KD(temperature=TEMPERATURE, soft_label_weight=SOFT, hard_label_weight=HARD)
VIEW = 0  # the cached view


@dataclass(frozen=True)
class Case:
    """One student, its teacher and their images."""

    name: str
    family: str
    student: str
    teacher: str
    image_size: int  # pixels
    batch_size: int


RESNET20 = Case("ResNet-20, 32 pixels", "cifar_resnet", "resnet20", "resnet56", 32, 128)
MOBILENET = Case(
    "MobileNetV3-small, 224 pixels", "torchvision", "mobilenet_v3_small", "resnet50", 224, 32
)


def noise(samples: int, size: int, classes: int) -> Dataset:
    """Random images; their content does not matter to speed."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (samples, 3, size, size), np.uint8)
    return in_memory(images, rng.integers(0, classes, samples), classes)


def photographs(archive: Path, samples: int, size: int, classes: int) -> Dataset:
    """The archive's images, resized and repeated until there are `samples`."""
    pixels = [to_pixels(read_image(content), size, 3) for _, content in read_files(archive)]
    images = np.stack([pixels[index % len(pixels)] for index in range(samples)])
    return in_memory(images, np.arange(samples) % classes, classes)


#: Default and help of `--photographs`.
PHOTOGRAPHS = (
    Path("data/raw/imagenet_samples.tar"),
    "a folder or archive of images; without it, the case of 224 pixels is skipped",
)


def cases(samples: int, archive: Path) -> Iterator[tuple[Case, Dataset]]:
    """ResNet-20 on noise, and MobileNet on photographs if there are any."""
    yield RESNET20, noise(samples, 32, 100)
    if archive.exists():
        yield MOBILENET, photographs(archive, 496, 224, 1000)
    else:
        print(f"no photographs at {archive} (--photographs): 224 pixels are skipped")


def in_memory(images: np.ndarray, labels: np.ndarray, classes: int) -> Dataset:
    """A dataset with only a training split: images [N, C, H, W] uint8, labels [N] int64."""
    names = [str(number) for number in range(classes)]
    split = Split(labels.astype(np.int64), Path(), "train", images)
    statistics = ([0.5] * 3, [0.25] * 3)
    return Dataset("0" * 64, names, 3, images.shape[-1], *statistics, {"train": split})


def training_views(dataset: Dataset, device: torch.device) -> Views:
    return Views(dataset.splits["train"], ViewPolicy("crop_flip"), 0, device)


def build_on_device(
    family: str, name: str, dataset: Dataset, device: torch.device, seed: int = 0
) -> tuple[nn.Module, InputSpec]:
    torch.manual_seed(seed)
    description = model_spec(family, NetworkParams(name=name), dataset)
    return build(description).to(device), description.input


class Teacher:
    """A live teacher: computes logits at every step, for the views that a student will see."""

    def __init__(self, family: str, name: str, dataset: Dataset, device: torch.device):
        network, self._spec = build_on_device(family, name, dataset, device)
        self._network, self._device = network.eval(), device

    @torch.inference_mode()
    def logits(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W] uint8 -> [B, classes] float32, computed in the students' precision."""
        with training_autocast(self._device):
            return self._network(self._spec.apply(pixels)).float()


@dataclass(frozen=True)
class Setup:
    """The views and the loss of a student."""

    views: "Views | LiveTeacher"
    loss: Loss


def supervised(views: Views) -> Setup:
    return Setup(views, lambda logits, batch: label_loss(logits, batch.labels))


def cached(
    views: "Views | LiveTeacher",
    soft_targets: SoftTargetLookup,
    device: torch.device,
    stored: tuple[int, int] | None = None,
    steps: int = 0,
) -> Setup:
    """A student by `kd`. `stored`, `steps`: as for `student_loss`."""
    return Setup(views, student_loss(METHOD, soft_targets, device, stored, steps))


class LiveTeacher:
    """Views, and the teacher's logits for the last batch of them."""

    def __init__(self, views: Views, teacher: Teacher):
        self.views, self._teacher = views, teacher

    def batches(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        for batch in self.views.batches(view, order):
            self._pixels = batch.pixels
            yield batch

    def logits(self) -> Tensor:
        """[B, classes] float32, which stay on the device."""
        return self._teacher.logits(self._pixels).clone()  # a leaf that a loss can use


def online(views: Views, teacher: Teacher) -> Setup:
    """As `cached`, with the logits of a live teacher instead of the store's rows."""
    live, method = LiveTeacher(views, teacher), method_loss(METHOD)

    def loss(logits: Tensor, batch: TrainingBatch) -> Tensor:
        hard, soft = label_loss(logits, batch.labels), method(logits, live.logits())
        return METHOD.hard_label_weight * hard + METHOD.soft_label_weight * soft

    return Setup(live, loss)


class Loop:
    """The steps of `pipeline.students.loop.fit`, some at a time, without evaluation."""

    def __init__(
        self,
        family: str,
        network: str,
        dataset: Dataset,
        setup: Setup,
        batch_size: int,
        device: torch.device,
        *,
        epochs: int = 1000,
    ):
        """Build the network.

        Args:
            epochs: of the run that the steps are of; on CUDA a long one is compiled.
        """
        params = TrainingParams(
            epochs=epochs,
            batch_size=batch_size,
            optimizer="sgd",
            learning_rate=0.01,
            weight_decay=5e-4,
            seed=0,
        )
        module, self._spec = build_on_device(family, network, dataset, device)
        split = dataset.splits["train"]
        self._order = batches(permutation(len(split), params.seed), batch_size)
        self._optimisation = Optimisation(module.train(), params, len(self._order))
        depthwise_in_float32(module, device)
        steps, views = params.epochs * len(self._order), setup.views
        self._forward = capture_long_runs(
            compile_long_runs(module, device, steps),
            *(views.views if isinstance(views, LiveTeacher) else views, device, steps),
            SINGLE_PROCESS,
        )
        self.network = module
        self._labels = to_device(split.labels, device)
        self._setup, self._device, self._steps = setup, device, self._endless()

    def run(self, steps: int) -> None:
        """Take `steps` more steps, and wait for the device."""
        loss, optimisation, device = self._setup.loss, self._optimisation, self._device
        for samples, rows, views in islice(self._steps, steps):
            batch = whole_batch(1, VIEW, samples, rows, views, self._labels)
            train_step(self._forward, self._spec, views, batch, loss, optimisation, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _endless(self) -> Iterator[tuple[np.ndarray, Tensor, Batch]]:
        sizes = [len(samples) for samples in self._order]
        while True:
            rows = to_device(np.concatenate(self._order), self._device).split(sizes)
            views = self._setup.views.batches(VIEW, self._order)
            yield from zip(self._order, rows, views, strict=True)
