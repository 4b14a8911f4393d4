"""Measure where a student's training spends its time: each part of a step, and the cold start.

    python -m benchmarks.parts

Two cases: ResNet-20, 32 pixels, 100 classes, batches of 128; MobileNetV3-small, 224 pixels, 1,000
classes, batches of 32. The benchmark writes a step out and times its parts one by one, beside whole
steps of the loop that students run. Decoding is that of `prepare`, which decodes once. The cold
start is that of the real stage in a fresh process, in a project that the real stages have made. Its
files are in the page cache, and its teacher is untrained, which does not affect the speed.
"""

from pipeline.runtime.command import run_command

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks import loops
from benchmarks.harness import Row, median, run_benchmark, seconds
from benchmarks.loops import Case, Loop
from benchmarks.reading import random_logits, write_store
from pipeline.compute.device import default_device, depthwise_in_float32, training_autocast
from pipeline.data.prepared.dataset import Dataset
from pipeline.data.prepared.image_decoding import read_image
from pipeline.data.sources.archives import read_files
from pipeline.data.sources.image_reading import to_pixels
from pipeline.distillation.losses import kd
from pipeline.networks import cifar_resnet
from pipeline.runtime.errors import UserError
from pipeline.store.reading.store import Store
from pipeline.students.label_loss import label_loss
from pipeline.students.params import TrainingParams
from pipeline.training.optimisation import make_optimizer
from soak import common

K = 10  # of the top_k store
LOOP = "a step of the loop"
OUTSIDE_THE_STEP = {"decode (by prepare, once)", "target, top_k", LOOP}  # the store here is dense
#: The teacher's stage without its gate, which would refuse an untrained teacher.
UNTRAINED = (
    "from pipeline.teacher import accuracy_gate; accuracy_gate.check = lambda *_, **__: None; "
    "from pipeline.stages import teacher; teacher.main()"
)


class Step:
    """A training step, part by part."""

    def __init__(
        self, case: Case, dataset: Dataset, stores: dict[str, Store], encoded: Sequence[bytes]
    ):
        self._device, self._case, self._encoded = default_device(), case, encoded
        self._views = loops.training_views(dataset, self._device)
        self._stores = {name: store.decoded_at(loops.TEMPERATURE) for name, store in stores.items()}
        self._labels = torch.from_numpy(dataset.splits["train"].labels).to(self._device)
        network, self._spec = loops.build_on_device(
            case.family, case.student, dataset, self._device
        )
        params = TrainingParams(
            epochs=1, batch_size=case.batch_size, optimizer="sgd", learning_rate=0.01, seed=0
        )
        depthwise_in_float32(network, self._device)
        self._network, self._optimizer = network, make_optimizer(network.train(), params)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = time.perf_counter() - begin

    def run(self, number: int) -> None:
        """Take step `number`; `seconds` has the time of each part."""
        order = np.random.default_rng(number).permutation(len(self._labels))
        samples = order[: self._case.batch_size]
        with self._part("decode (by prepare, once)"):
            for sample in samples:
                content = self._encoded[sample % len(self._encoded)]
                to_pixels(read_image(content), self._case.image_size, 3)
        with self._part("view"):
            batch = next(self._views.batches(loops.VIEW, [samples]))
        with self._part("normalise"):
            inputs = self._spec.apply(batch.pixels)
        for name in ("top_k", "dense"):
            with self._part(f"target, {name}"):
                rows = self._stores[name].gather(loops.VIEW, samples).logits
                teacher_logits = torch.from_numpy(rows).to(self._device, torch.float32)
        with self._part("forward"), training_autocast(self._device):
            logits = self._network(inputs)
        with self._part("loss"):
            soft = kd(logits.float(), teacher_logits, temperature=loops.TEMPERATURE)
            hard = label_loss(logits.float(), self._labels[samples])
            loss = loops.HARD * hard + loops.SOFT * soft
        with self._part("backward"):
            self._optimizer.zero_grad()
            loss.backward()
        with self._part("optimiser"):
            self._optimizer.step()


def measure_parts(
    case: Case, dataset: Dataset, encoded: Sequence[bytes], rounds: int
) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            name: write_store(Path(folder) / name, *random_logits(dataset), k)
            for name, k in (("dense", None), ("top_k", K))
        }
        step, device = Step(case, dataset, stores, encoded), default_device()
        views = loops.training_views(dataset, device)
        setup = loops.cached(views, stores["dense"].gather, device)
        loop = Loop(case.family, case.student, dataset, setup, case.batch_size, device)
        times: dict[str, list[float]] = {}
        for number in range(-2, rounds):  # the first two set things up
            whole = seconds(lambda: loop.run(1))
            step.run(max(number, 0))
            for name, taken in (step.seconds | {LOOP: whole}).items():
                times.setdefault(name, []).append(taken)
    found = {name: median(values[2:]).median for name, values in times.items()}
    inside = {name: taken for name, taken in found.items() if name not in OUTSIDE_THE_STEP}
    total = sum(inside.values())
    for name, taken in found.items():
        yield {
            case.name: name,
            "ms": 1000 * taken,
            "images/s": case.batch_size / taken,
            "of the parts": f"{inside[name] / total:.1%}" if name in inside else "",
        }
    yield {
        case.name: "the parts together",
        "ms": 1000 * total,
        "over a step of the loop": f"{total / found[LOOP]:.1%}",
        "bottleneck": max(inside, key=inside.get),
    }


def make_project(case: Case, folder: Path, files: Sequence[bytes], suffix: str) -> None:
    """Make a project, ready for the student `small`: 8 views, labelled by a ResNet-8."""
    members = (
        (f"train/{number % 10}/{number:06d}.{suffix}", content)
        for number, content in enumerate(files)
    )
    common.write_tar(folder / "images.tar", members)
    torch.save(cifar_resnet.build("resnet8", 10, 3).state_dict(), folder / "teacher.pt")
    params = common.params(size=case.image_size, epochs=1, batch_size=case.batch_size, views=8)
    params["dataset"] |= {"root": "images.tar", "validation_fraction": 0.1, "test_fraction": 0.1}
    network = {"name": "resnet8", "input_size": 32}
    teacher = {"weights": "checkpoint", "checkpoint": "teacher.pt", "network": network}
    params["teacher"] |= teacher
    params["students"]["small"] |= {"family": case.family, "network": case.student}
    common.write_params(folder, params)
    run_python(folder, "-m", "pipeline.stages.prepare")
    run_python(folder, "-c", UNTRAINED)
    run_python(folder, "-m", "pipeline.stages.soft_targets")


def run_python(folder: Path, *arguments: str) -> str:
    path = f"{common.ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise UserError(
            f"`python {' '.join(arguments)}` failed in the benchmark's project:\n{result.stderr}"
        )
    return result.stdout


def cold_start(folder: Path) -> dict[str, float]:
    """Seconds of each part, and the peak memory, of the student `small` in a fresh process."""
    arguments = ("benchmarks.cold_start", "small", str(time.monotonic()))
    return json.loads(run_python(folder, "-m", *arguments).splitlines()[-1])


def measure_cold_start(
    case: Case, files: Sequence[bytes], suffix: str, starts: int
) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        make_project(case, Path(name), files, suffix)
        # The first start loads the files into the page cache.
        found = [cold_start(Path(name)) for _ in range(starts + 1)][1:]
    for part in found[0]:
        yield {
            f"{case.name}: cold start": part,
            "": median([start[part] for start in found]).median,
        }


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    for case, dataset in loops.cases(arguments.samples, arguments.photographs):
        if case is loops.RESNET20:
            images = dataset.splits["train"].images.transpose(0, 2, 3, 1)
            encoded, suffix = [common.png(image) for image in images], "png"
            files = encoded
        else:
            encoded, suffix = [content for _, content in read_files(arguments.photographs)], "jpg"
            files = encoded * 8
        yield from measure_parts(case, dataset, encoded, arguments.pairs)
        yield from measure_cold_start(case, files, suffix, arguments.starts)


def main() -> None:
    run_benchmark(
        __doc__,
        measure,
        pairs=(100, "rounds: a loop's step and the parts"),
        starts=(5, "fresh processes"),
        samples=(10_000, "images of 32 pixels: noise"),
        photographs=loops.PHOTOGRAPHS,
    )


if __name__ == "__main__":
    run_command(main)
