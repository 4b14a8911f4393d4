"""Compare an epoch of distillation on CIFAR-100 with torchdistill, which runs the teacher at every
step.

    python -m benchmarks.epoch data/raw/cifar100.tar.gz

ResNet-56 teaches ResNet-20, the networks of this project on both sides, batches of 128 of the same
images. Ours is the loop that students run, from cached soft targets. Theirs has the settings of
torchdistill's sample configurations for CIFAR-100: images as PIL, RandomCrop, RandomHorizontalFlip,
ToTensor and Normalize in a DataLoader of 16 workers, batches of 128, KDLoss (T = 4, alpha = 0.9),
SGD with momentum. It runs like its example for image classification, with its box and its metric
logger.

Theirs computes in float32, its default; ours in bfloat16 if the device does. So theirs is also
measured under bfloat16 autocast, and the teacher's forward pass alone in both, on batches that are
ready: that is the teacher's part of the difference. A slice of theirs is a pass of its DataLoader
over the same number of batches, with persistent workers: nothing is loaded ahead of a slice.
Neither side evaluates. Ours leaves out the making of the store: one teacher pass per view.

Needs torchdistill, any 1.1 release. The project's `bench` extra has 1.1.4; install another release
to a separate folder:

    pip install --no-deps --target FOLDER torchdistill==1.1.5
    PYTHONPATH=FOLDER python -m benchmarks.epoch data/raw/cifar100.tar.gz
"""

from pipeline.runtime.command import run_command

import argparse
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import RandomSampler

from benchmarks import loops
from benchmarks.harness import Row, alternate, median, run_benchmark
from benchmarks.loops import Loop
from benchmarks.reading import random_logits, write_store
from pipeline.compute.device import default_device, training_autocast
from pipeline.data.prepared.dataset import Dataset
from pipeline.data.sources.archives import read_files
from pipeline.networks import cifar_resnet
from pipeline.runtime.errors import UserError

BATCH, CLASSES, EPOCH = 128, 100, 50_000  # CIFAR-100's training images
MEAN, STD = [0.5070754, 0.48655024, 0.44091907], [0.26733398, 0.25643876, 0.2761503]


def cifar100(archive: Path, count: int) -> Dataset:
    """The first images of the archive's training split."""
    files = ((n.split("/"), c) for n, c in read_files(archive))
    training = ((parts, content) for parts, content in files if "train" in parts[:-2])
    images, names = [], []
    for parts, content in islice(training, count):
        images.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
        names.append(parts[-2])
    if len(images) < BATCH or images[0].shape != (32, 32, 3):
        raise UserError(
            f"`{archive}` has {len(images)} images below train/<class>/; expected CIFAR-100's. "
            "Write it with docs/examples/cifar_archive.py."
        )
    labels = np.unique(names, return_inverse=True)[1]
    return loops.in_memory(np.stack(images).transpose(0, 3, 1, 2).copy(), labels, CLASSES)


class PilImages(TorchDataset):
    """Images like torchvision's CIFAR100: a row of an array, as a PIL image, transformed."""

    def __init__(self, dataset: Dataset, transform: Callable[[Image.Image], torch.Tensor]):
        split = dataset.splits["train"]
        self.data = np.ascontiguousarray(split.images.transpose(0, 2, 3, 1))
        self.targets, self.transform = split.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def torchdistill_slices(
    dataset: Dataset, steps: int, workers: int, device: torch.device
) -> tuple[str, Callable[[], None]]:
    """torchdistill's version, and a function that trains for `steps` steps.

    Raises:
        UserError: it is not installed.
    """
    try:
        import torchvision.datasets  # noqa: F401, PLC0415  (torchdistill looks for it when imported)
        from torchdistill import __version__ as version  # noqa: PLC0415
        from torchdistill.core.distillation import get_distillation_box  # noqa: PLC0415
        from torchdistill.misc.log import MetricLogger, SmoothedValue  # noqa: PLC0415
        from torchvision import transforms  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            f"torchdistill cannot be imported ({error}); expected any 1.1 release. Run "
            "`pip install --no-deps --target FOLDER torchdistill==1.1.5`, and set "
            "PYTHONPATH=FOLDER."
        ) from None
    logging.getLogger().setLevel(logging.WARNING)  # it logs its configuration
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(0.5)]
    convert = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    images = PilImages(dataset, transforms.Compose([*augment, *convert]))
    sampler = {"class_or_func": RandomSampler, "kwargs": {"num_samples": steps * BATCH}}
    loader = {"batch_size": BATCH, "num_workers": workers, "persistent_workers": workers > 0}
    paths = {
        f"{who}_module_{what}": value
        for who in ("student", "teacher")
        for what, value in (("path", "."), ("io", "output"))
    }
    loss = {"key": "KDLoss", "kwargs": {**paths, "temperature": 4.0, "alpha": 0.9}}
    config = {
        "num_epochs": 200,
        "train_data_loader": {"dataset_id": "train", "sampler": sampler, "kwargs": loader},
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {
            "key": "SGD",
            "kwargs": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}},
        },
    }
    teacher, student = (
        cifar_resnet.build(name, CLASSES, 3).to(device) for name in ("resnet56", "resnet20")
    )
    teacher.eval()
    box = get_distillation_box(teacher, student, {"train": images}, config, device, None, False, 1)

    def run() -> None:
        box.pre_epoch_process(epoch=0)
        logger = MetricLogger(delimiter="  ")
        logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
        taken = 0
        for pixels, targets, more in logger.log_every(box.train_data_loader, 100, ""):
            loss = box.forward_process(pixels.to(device), targets.to(device), more)
            box.post_forward_process(loss=loss)
            logger.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
            taken += 1
        assert taken == steps

    return version, run


def teacher_alone(steps: int, device: torch.device, *, by_rule: bool) -> Callable[[int], None]:
    network = cifar_resnet.build("resnet56", CLASSES, 3).to(device).eval()
    ready = torch.rand(BATCH, 3, 32, 32, device=device)

    @torch.no_grad()
    def run(_: int) -> None:
        with training_autocast(device) if by_rule else nullcontext():
            for _ in range(steps):
                logits = network(ready)
        logits.cpu()  # on CUDA, waits for all

    return run


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    dataset = cifar100(arguments.archive, arguments.images)
    yield from compare(dataset, arguments.pairs, arguments.steps, arguments.workers)


def compare(dataset: Dataset, pairs: int, steps: int, workers: int) -> Iterator[Row]:
    """Time slices of `steps` steps of both sides on images of 32 pixels.

    Raises:
        UserError: torchdistill is not installed.
    """
    device = default_device()
    views = loops.training_views(dataset, device)
    version, theirs = torchdistill_slices(dataset, steps, workers, device)

    def theirs_by_rule(_: int) -> None:
        with training_autocast(device):
            theirs()

    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store", *random_logits(dataset), None)
        stored = store.num_views, len(dataset.splits["train"])
        setup = loops.cached(views, store.decoded_at(loops.TEMPERATURE).gather, device, stored)
        loop = Loop("cifar_resnet", "resnet20", dataset, setup, BATCH, device)
        sides = {
            "ours": lambda _: loop.run(steps),
            "torchdistill": lambda _: theirs(),
            "torchdistill, by our rule": theirs_by_rule,
            "teacher, float32": teacher_alone(steps, device, by_rule=False),
            "teacher, by our rule": teacher_alone(steps, device, by_rule=True),
        }
        times = alternate(sides, pairs)
    print(
        f"torchdistill {version} with {workers} workers; rounds of {steps} steps; our "
        f"rule, bfloat16 if the device computes in it: {training_autocast(device)._enabled}"
    )
    for name, taken in times.items():
        epoch = median(taken).median * EPOCH / (steps * BATCH)
        yield {"side": name, f"s for {EPOCH:,} images": epoch}
    ours, plain, ruled, teacher, teacher_ruled = times.values()
    for name, taken in {
        "torchdistill": plain,
        "torchdistill, by our rule": ruled,
        "torchdistill without teacher": plain - teacher,
        "the same, by our rule": ruled - teacher_ruled,
    }.items():
        yield {"speed-up of ours over": name, "ratio": median(taken / ours)}


def main() -> None:
    run_benchmark(
        __doc__,
        measure,
        "archive",
        images=(10_000, "of the archive, on both sides"),
        pairs=(100, "rounds"),
        steps=(20, "of training in a slice"),
        workers=(16, "of torchdistill's DataLoader"),
    )


if __name__ == "__main__":
    run_command(main)
