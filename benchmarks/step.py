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
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import loops
from benchmarks.loops import Case, Loop, Teacher
from benchmarks.pairs import median, time_interleaved
from benchmarks.reading import write_store
from pipeline.compute.device import default_device
from pipeline.data.prepared.dataset import Dataset

CACHED_TARGET = 1.03  # cached over supervised, at most
ONLINE_TARGET = 0.05  # how far online over cached may be from (student + teacher) over student


def measure(case: Case, dataset: Dataset, device: torch.device, pairs: int, steps: int) -> dict:
    split = dataset.splits["train"]
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((len(split), dataset.num_classes), np.float32)
    views = loops.training_views(dataset, device)
    teacher = Teacher(case.family, case.teacher, dataset, device)
    ready = next(views.batches(loops.VIEW, [np.arange(case.batch_size)])).pixels

    def teacher_alone(_: int) -> None:
        for _ in range(steps):
            live_logits = teacher.logits(ready)
        live_logits.cpu()  # on CUDA, waits for all

    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store", logits, split.labels, None)
        sides = {"teacher": teacher_alone}
        for name, setup in (
            ("supervised", loops.supervised(views)),
            ("cached", loops.cached(views, store.decoded_at(loops.TEMPERATURE).gather, device)),
            ("online", loops.online(views, teacher, device)),
        ):
            loop = Loop(case.family, case.student, dataset, setup, case.batch_size, device)
            sides[name] = lambda _, loop=loop: loop.run(steps)
        time_interleaved(sides, 2)  # the first passes set things up
        times = time_interleaved(sides, pairs)
    bound = 1 + times["teacher"] / times["supervised"]
    ratios = {
        "cached over supervised": times["cached"] / times["supervised"],
        "online over cached": times["online"] / times["cached"],
        "(student + teacher) over student": bound,
        "the second over the third": times["online"] / times["cached"] / bound,
    }
    print(f"\n{case.name}, batches of {case.batch_size}")
    for name, seconds in times.items():
        print(f"  {name:<34}{1000 * np.median(seconds) / steps:9.1f} ms a step")
    found = {name: median(ratio) for name, ratio in ratios.items()}
    for name, interval in found.items():
        print(f"  {name:<34}{interval}", flush=True)
    return {
        "ms": {k: round(1000 * float(np.median(v)) / steps, 2) for k, v in times.items()},
        **{name: interval.as_list() for name, interval in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.step", description=__doc__)
    parser.add_argument("--pairs", type=int, default=100, help="pairs of slices to compare")
    parser.add_argument("--steps", type=int, default=2, help="of training in a slice")
    parser.add_argument("--samples", type=int, default=45_000, help="images of 32 pixels")
    parser.add_argument(
        "--photographs",
        type=Path,
        default=Path("data/raw/imagenet_samples.tar"),
        help="a folder or archive of images; without it, the second case is skipped",
    )
    arguments = parser.parse_args()
    device, pairs, steps = default_device(), arguments.pairs, arguments.steps
    print(
        f"{device.type}, {torch.get_num_threads()} threads, {pairs} rounds of {steps} steps of "
        f"each; medians, ratios with their 95 % interval\n"
        f"targets: cached over supervised at most {CACHED_TARGET}; online over cached within "
        f"{ONLINE_TARGET:.0%} of (student + teacher) over student"
    )
    dataset = loops.noise(arguments.samples, 32, 100)
    found = {"resnet20": measure(loops.RESNET20, dataset, device, pairs, steps)}
    if arguments.photographs.exists():
        dataset = loops.photographs(arguments.photographs, 496, 224, 1000)
        found["mobilenet_v3_small"] = measure(loops.MOBILENET, dataset, device, pairs, steps)
    else:
        print(
            f"\nno photographs at {arguments.photographs} (--photographs): the second case is "
            "skipped"
        )
    print(json.dumps({"benchmark": "step", "pairs": pairs, "steps": steps, **found}))


if __name__ == "__main__":
    run_command(main)
