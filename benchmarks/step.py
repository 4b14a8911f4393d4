"""Compare a training step from the cache with a supervised step and a step with a live teacher.

    python -m benchmarks.step

Slices of the loop that students run: views, targets, forward and backward pass, optimizer. Two
cases: ResNet-56 teaches ResNet-20, 45,000 images of noise, 32 pixels, 100 classes, batches of 128;
and ResNet-50 teaches MobileNetV3-small, photographs, 224 pixels, 1,000 classes, batches of 32. The
soft targets are random and in the page cache. The live teacher computes in the students' precision,
in the same loop; only the source of the soft targets differs. A fourth side is the teacher's
forward pass alone, on views that are ready: a live teacher cannot cost less.
"""

from pipeline.runtime.command import run_command

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import loops
from benchmarks.harness import Row, alternate, median, run_benchmark
from benchmarks.loops import Case, Loop, Teacher
from benchmarks.reading import random_logits, write_store
from pipeline.compute.device import default_device
from pipeline.data.prepared.dataset import Dataset


def measure_case(
    case: Case,
    dataset: Dataset,
    device: torch.device,
    pairs: int,
    steps: int,
    *,
    epochs: int = 1000,
) -> Iterator[Row]:
    """Time slices of `steps` steps.

    Args:
        epochs: of the runs that the steps are of; on CUDA long ones are compiled.
    """
    views = loops.training_views(dataset, device)
    teacher = Teacher(case.family, case.teacher, dataset, device)
    ready = next(views.batches(loops.VIEW, [np.arange(case.batch_size)])).pixels

    def teacher_alone(_: int) -> None:
        for _ in range(steps):
            live_logits = teacher.logits(ready)
        live_logits.cpu()  # on CUDA, waits for all

    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store", *random_logits(dataset), None)
        sides = {"teacher": teacher_alone}
        rows = store.decoded_at(loops.TEMPERATURE).gather
        stored = store.num_views, len(dataset.splits["train"])
        for name, setup in (
            ("supervised", loops.supervised(views)),
            ("cached", loops.cached(views, rows, device, stored)),
            ("online", loops.online(views, teacher)),
        ):
            network = (case.family, case.student)
            loop = Loop(*network, dataset, setup, case.batch_size, device, epochs=epochs)
            sides[name] = lambda _, loop=loop: loop.run(steps)
        times = alternate(sides, pairs, warm_up=2)
    bound = 1 + times["teacher"] / times["supervised"]
    ratios = {
        "cached over supervised": times["cached"] / times["supervised"],
        "online over cached": times["online"] / times["cached"],
        "(student + teacher) over student": bound,
        "the second over the third": times["online"] / times["cached"] / bound,
    }
    for name, taken in times.items():
        yield {case.name: name, "ms a step": 1000 * median(taken).median / steps}
    for name, ratio in ratios.items():
        yield {case.name: name, "ratio": median(ratio)}


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    for case, dataset in loops.cases(arguments.samples, arguments.photographs):
        yield from measure_case(case, dataset, default_device(), arguments.pairs, arguments.steps)


def main() -> None:
    run_benchmark(
        __doc__,
        measure,
        pairs=(100, "of slices to compare"),
        steps=(2, "of training in a slice"),
        samples=(45_000, "images of 32 pixels"),
        photographs=loops.PHOTOGRAPHS,
    )


if __name__ == "__main__":
    run_command(main)
