"""The training loop that students run, some steps at a time, for benchmarks that alternate it.

What the benchmarks of training need of the pipeline's students' side is here, in one place.
"""

import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline import checkpoint
from pipeline.checkpoint import InputSpec
from pipeline.dataset import Dataset, Split
from pipeline.device import training_autocast
from pipeline.image_files import read_files
from pipeline.losses import distillation_loss
from pipeline.params.network import NetworkParams
from pipeline.params.training import TrainingParams
from pipeline.stages.prepare import eight_bits, to_pixels
from pipeline.training import Lesson, SoftTargets, train
from pipeline.views import Batch, Views

TEMPERATURE, SOFT, HARD = 4.0, 0.9, 0.1
VIEW = 0  # the one that is cached; an epoch uses one view, and these epochs have no end
_STEPS = 1_000_000  # more than any benchmark takes


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
    """Random images: what they show does not matter to speed."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (samples, 3, size, size), np.uint8)
    return in_memory(images, rng.integers(0, classes, samples), classes)


def photographs(archive: Path, samples: int, size: int, classes: int) -> Dataset:
    """The archive's images at a size, over and over until there are so many."""
    pixels = [
        to_pixels(eight_bits(Image.open(io.BytesIO(content))), size, 3)
        for _, content in read_files(archive)
    ]
    images = np.stack([pixels[index % len(pixels)] for index in range(samples)])
    return in_memory(images, np.arange(samples) % classes, classes)


def in_memory(images: np.ndarray, labels: np.ndarray, classes: int) -> Dataset:
    """A dataset that has a training split alone: [N, C, H, W] uint8, [N] int64."""
    names = [str(number) for number in range(classes)]
    split = Split(images, labels.astype(np.int64), Path(), "train")
    statistics = ([0.5] * 3, [0.25] * 3)
    return Dataset("0" * 64, names, 3, images.shape[-1], *statistics, {"train": split})


def views_of(dataset: Dataset, device: torch.device) -> Views:
    return Views(dataset.splits["train"], "crop_flip", 0, device)


def build(
    family: str, name: str, dataset: Dataset, device: torch.device
) -> tuple[nn.Module, InputSpec]:
    torch.manual_seed(0)
    description = checkpoint.describe(family, NetworkParams(name=name), dataset)
    return checkpoint.build(description).to(device), description.input


class Teacher:
    """A teacher that answers at every step: for the views that a student is about to see."""

    def __init__(self, family: str, name: str, dataset: Dataset, device: torch.device):
        network, self._spec = build(family, name, dataset, device)
        self._network, self._device = network.eval(), device

    @torch.inference_mode()
    def answer(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W] uint8 -> [B, classes] float32; bfloat16 inside where students use it."""
        with training_autocast(self._device):
            return self._network(self._spec.apply(pixels)).float()


def supervised(views: Views) -> Lesson:
    return Lesson("baselines", lambda epoch: VIEW, views.batches)


def cached(views: Views, soft_targets: SoftTargets) -> Lesson:
    return Lesson(
        "students",
        lambda epoch: VIEW,
        views.batches,
        hard_label_weight=HARD,
        distillation_loss=lambda student_logits, teacher_logits, labels, kept, epoch: (
            SOFT * distillation_loss(student_logits, teacher_logits, temperature=TEMPERATURE)
        ),
        soft_targets=soft_targets,
    )


def online(views: Views, teacher: Teacher) -> Lesson:
    """The cached lesson, but that a teacher's answers take the place of the store's rows."""
    current: list[Batch] = []

    def batches(view: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        for batch in views.batches(view, order):
            current[:] = [batch]
            yield batch

    def answers(view: int, samples: np.ndarray) -> tuple[np.ndarray, None]:
        return teacher.answer(current[0].pixels).cpu().numpy(), None

    lesson = cached(views, answers)
    return Lesson(**{**vars(lesson), "batches": batches})


class _Closed(Exception):
    """Ends a loop from within."""


class Loop:
    """`pipeline.training.train` in a thread of its own, which rests but while `run` waits for it.

    The loop asks its lesson for one batch after the other: this counts its steps and stops it
    between two of them. So a step is all that the loop does for one batch, its view and its soft
    targets too. The epoch has no end, so that no evaluation is among the steps.
    """

    def __init__(
        self,
        family: str,
        network: str,
        dataset: Dataset,
        lesson: Lesson,
        batch_size: int,
        device: torch.device,
    ):
        self._ahead, self._device, self._lesson = 0, device, lesson
        self._go, self._rests = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        params = TrainingParams(
            epochs=1000,
            batch_size=batch_size,
            optimizer="sgd",
            learning_rate=0.01,
            weight_decay=5e-4,
            seed=0,
        )
        module, spec = build(family, network, dataset, device)
        endless = Lesson(**{**vars(lesson), "batches": self._batches})
        arguments = (module, spec, params, dataset, endless, device)
        self._thread = threading.Thread(target=self._train, args=arguments, daemon=True)
        self._thread.start()
        self._wait()

    def run(self, steps: int) -> None:
        """So many steps more, all that they do on the device too."""
        self._ahead = steps
        self._go.release()
        self._wait()

    def close(self) -> None:
        self._ahead = -1
        self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._rests.acquire()
        if self._error is not None:
            raise self._error

    def _train(self, *arguments) -> None:
        try:
            train(*arguments)
        except _Closed:
            pass
        except BaseException as error:  # told where the loop is waited for
            self._error = error
        finally:
            self._rests.release()

    def _batches(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        batches = iter(self._lesson.batches(view, [*order] * (_STEPS // len(order) + 1)))
        while True:
            if self._ahead == 0:
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                self._rests.release()
                self._go.acquire()
            if self._ahead < 0:
                raise _Closed
            self._ahead -= 1
            yield next(batches)
