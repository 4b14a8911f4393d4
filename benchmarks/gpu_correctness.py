"""Does CUDA give what a CPU gives? Views, stages, stores, and trainings that were killed.

Each check is a row: a difference, what is allowed, and whether it holds. Every stage runs in a
process of its own, on the device and, with CUDA_VISIBLE_DEVICES empty, on the CPU.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file

from benchmarks import loops
from benchmarks.harness import Row
from pipeline.commands.store import TOLERANCE
from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict_all
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import PREPARED, STORE, TEACHER, ModelOutputs
from pipeline.runtime.params import read_params
from pipeline.store.reading.index import read_index
from pipeline.store.reading.store import Store, open_shards
from pipeline.training import cuda_graph
from pipeline.views.loader import open_views
from pipeline.views.policy import POLICIES, ViewPolicy
from soak import common as soak
from soak.common import ROOT

NAME = "small"
STUDENT, BASELINE = ModelOutputs("distilled", NAME), ModelOutputs("baseline", NAME)
#: Two trainings from equal first weights, in other roundings: as far apart as two seeds.
POINTS = 3  # of test accuracy
FIRST_LOSS = 0.05  # of the first epoch's mean training loss, as a share
RECOMPUTED = 64  # rows of each store that the other device recomputes


@dataclass(frozen=True)
class Setting:
    """What the parts of `benchmarks.gpu` run on."""

    device: torch.device
    quick: bool
    scratch: Path


def check(name: str, difference: float, allowed: float) -> Row:
    holds = "yes" if difference <= allowed else "NO"  # NO, too, if it is not a number
    return {"check": name, "difference": float(difference), "allowed": allowed, "holds": holds}


# Views.


def views(setting: Setting) -> Iterator[Row]:
    """Pixels of each policy, 3 x 32 and 1 x 16: the largest difference."""
    mixes = (None, ("mixup", 0.2), ("cutmix", 1.0))
    for parts in product(POLICIES, (None, (2, 9), (3, 30)), mixes):
        policy = ViewPolicy(*parts)
        worst = max(_view_difference(setting, policy, *shape) for shape in ((3, 32), (1, 16)))
        yield check(f"pixels of {policy}", worst, 0)


def _view_difference(setting: Setting, policy: ViewPolicy, channels: int, size: int) -> float:
    count, rng = 70 if setting.quick else 700, np.random.default_rng(0)
    images = rng.integers(0, 256, (count, channels, size, size), np.uint8)
    split = loops.in_memory(images, np.arange(count) % 10, 10).splits["train"]
    order = np.array_split(np.arange(len(split)), 2)
    sides = (open_views(split, policy, 0, d) for d in (setting.device, torch.device("cpu")))
    worst = 0.0
    for here, there in zip(*(side.batches(1, order) for side in sides), strict=True):
        worst = max(worst, (here.pixels.cpu().int() - there.pixels.int()).abs().max().item())
        if here.weights is not None:
            worst = max(worst, (here.weights.cpu() - there.weights).abs().max().item())
            worst = max(worst, (here.partners.cpu() - there.partners).abs().max().item())
    return worst


# Stages.


@dataclass(frozen=True)
class Side:
    """A project whose stages run on one device."""

    name: str
    folder: Path
    settings: dict[str, str]  # of the environment

    @contextmanager
    def running(self, module: str, *arguments: str, **settings: str) -> Iterator[subprocess.Popen]:
        """Start `python -m pipeline.MODULE`; killed if it still runs at the end."""
        path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"pipeline.{module}", *arguments],
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": path} | self.settings | settings,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def run(self, module: str, *arguments: str, **settings: str) -> None:
        run_each([self], module, *arguments, **settings)

    def forget_training(self, outputs: ModelOutputs) -> None:
        """Let the stage train from its beginning."""
        shutil.rmtree(self.folder / outputs.scratch, ignore_errors=True)

    def weights(self, outputs: ModelOutputs) -> dict[str, np.ndarray]:
        return load_file(self.folder / outputs.model / "weights.safetensors")

    def accuracy(self, outputs: ModelOutputs) -> float:
        """On test, in per cent."""
        return 100 * read_json(self.folder / outputs.metrics, produced_by="-")["test_accuracy"]

    def store(self) -> Store:
        return open_shards(self.folder / STORE, read_index(self.folder / STORE), {})


def run_each(sides: list[Side], module: str, *arguments: str, **settings: str) -> None:
    """Run the same on each side, at once, and wait.

    Raises:
        UserError: one fails; shows the end of its output.
    """
    with ExitStack() as stack:
        started = [
            (side, stack.enter_context(side.running(module, *arguments, **settings)))
            for side in sides
        ]
        for side, process in started:
            if process.wait() != 0:
                printed = side.log.read_text("utf-8", "replace").splitlines()[-15:]
                raise UserError(
                    f"`{module} {' '.join(arguments)}` ended with {process.returncode} on "
                    f"{side.name}; expected it to succeed:\n" + "\n".join(printed)
                )


def make_sides(setting: Setting) -> list[Side]:
    """Two projects of the embedded images: one on the device, one on the CPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    sides = [
        Side(
            "the device",
            setting.scratch / "device",
            {} if setting.device.type == "cuda" else hidden,
        ),
        Side("the CPU", setting.scratch / "cpu", hidden),
    ]
    params = soak.params() if setting.quick else default_params()
    for side in sides:
        if not side.folder.exists():
            side.folder.mkdir()
            soak.write_params(side.folder, params)
            if setting.quick:
                soak.write_folder(side.folder / "images", soak.images(60, 16))
    return sides


def default_params() -> dict:
    """The first run's, with labels for all images and one student."""
    params = read_params(ROOT / "params.yaml")
    del params["dataset"]["labels_per_class"]  # with few labels, roundings would decide more
    params["teacher"]["training"]["epochs"] = 4
    params["students"] = {NAME: params["students"]["resnet8"]}
    return params


def taught(setting: Setting) -> list[Side]:
    """The sides, with images, and the CPU's teacher and its store on each."""
    sides = make_sides(setting)
    there = sides[1].folder
    if not (there / STORE).exists():
        if not (there / PREPARED).exists():
            run_each(sides, "stages.prepare")
        if not (there / TEACHER.model).exists():
            sides[1].run("stages.teacher")
        shutil.copytree(there / TEACHER.model, sides[0].folder / TEACHER.model, dirs_exist_ok=True)
        run_each(sides, "stages.soft_targets")
    return sides


def stages(setting: Setting) -> Iterator[Row]:
    """Each stage on the device against the same stage on the CPU, from equal inputs."""
    sides = make_sides(setting)
    run_each(sides, "stages.prepare")
    prints = [open_dataset(side.folder / PREPARED).fingerprint for side in sides]
    yield check("prepare: images, labels and splits", prints[0] != prints[1], 0)
    run_each(sides, "stages.teacher")
    yield from trained(setting, "teacher", TEACHER, sides)
    taught(setting)
    yield from stores(sides)
    for stage, outputs in (("student", STUDENT), ("baseline", BASELINE)):
        run_each(sides, f"stages.{stage}", NAME)
        yield from trained(setting, stage, outputs, sides)


def trained(
    setting: Setting, stage: str, outputs: ModelOutputs, sides: list[Side]
) -> Iterator[Row]:
    """Compare two trainings; and the logits that each stage wrote with those of the other device
    by the same weights."""
    here, there = sides
    accuracies = [side.accuracy(outputs) for side in sides]
    yield check(f"{stage}: test accuracy, points", abs(np.diff(accuracies)[0]), POINTS)
    losses = [pd.read_csv(s.folder / outputs.history)["train_loss"][0] for s in sides]
    share = abs(losses[0] / losses[1] - 1)
    yield check(f"{stage}: training loss of the first epoch, share", share, FIRST_LOSS)
    if outputs is not TEACHER:
        starts = [checkpoint.read_start(s.folder / outputs.model, produced_by="-") for s in sides]
        yield check(f"{stage}: first weights", starts[0].sha256 != starts[1].sha256, 0)
    for side, other in ((here, torch.device("cpu")), (there, setting.device)):
        network, spec = checkpoint.load(side.folder / outputs.model, produced_by="-")
        dataset = open_dataset(side.folder / PREPARED)
        network = network.to(other)
        again = predict_all(network, spec.input, dataset.splits["test"], device=other).numpy()
        written = load_file(side.folder / outputs.predictions)["test"]
        name = f"{stage}: logits of {side.name}'s weights, the other device"
        yield check(name, row_difference(again, written), TOLERANCE["float32"])


def row_difference(some: np.ndarray, others: np.ndarray) -> float:
    """The largest difference of two logits, as a share of their row's span (1 at least)."""
    span = np.maximum(1, np.ptp(others.astype(np.float64), axis=1))
    return float((np.abs(some.astype(np.float64) - others).max(1) / span).max())


def stores(sides: list[Side]) -> Iterator[Row]:
    """Compare the stores of one teacher, and verify each on the other device."""
    here, there = (side.store() for side in sides)
    worst, changed, samples = 0.0, 0, np.arange(here.index.split_sizes["train"])
    for view in range(here.num_views):
        rows = here.gather(view, samples).logits, there.gather(view, samples).logits
        worst = max(worst, row_difference(*rows))
        changed += int((rows[0].argmax(1) != rows[1].argmax(1)).sum())
    yield check("soft_targets: rows", worst, TOLERANCE["float32"])
    share = changed / here.num_views / len(samples)
    yield check("soft_targets: share of rows with another first class", share, 1e-3)
    for side, other in (sides, sides[::-1]):
        path = str((other.folder / STORE).resolve())
        side.run("commands.store", "verify", path, "--recompute", str(RECOMPUTED))
        yield check(f"store of {other.name}: verified and recomputed on {side.name}", 0, 0)


# A training that was killed, and trainings at once.


def resumed(setting: Setting) -> Iterator[Row]:
    """A student's training on the device: alone, beside another, and killed after an epoch."""
    side = taught(setting)[0]
    module = "stages.student"
    side.forget_training(STUDENT)
    side.run(module, NAME)
    first, accuracy = side.weights(STUDENT), side.accuracy(STUDENT)
    side.forget_training(STUDENT)
    side.forget_training(BASELINE)
    with side.running("stages.baseline", NAME) as beside:
        side.run(module, NAME)
        if beside.wait():
            raise UserError(f"`baseline` beside `student` failed; see `{side.log}`.")
    yield check(
        "two trainings at once: test accuracy, points",
        abs(side.accuracy(STUDENT) - accuracy),
        POINTS,
    )
    noise = largest_difference(first, side.weights(STUDENT))
    yield check("the same training again: weights", noise, np.inf)
    kill_after_an_epoch(side, module)
    side.run(module, NAME)
    # Where two runs are equal to the last bit, one that was killed is, too.
    killed = largest_difference(first, side.weights(STUDENT))
    yield check("killed and resumed: weights", killed, np.inf if noise else 0)
    yield check(
        "killed and resumed: test accuracy, points", abs(side.accuracy(STUDENT) - accuracy), POINTS
    )
    yield from replayed(setting)
    if setting.device.type == "cpu" or torch.cuda.device_count() > 1:
        side.forget_training(STUDENT)
        side.run(module, NAME, PROCESSES="2")
        difference = abs(side.accuracy(STUDENT) - accuracy)
        yield check("two processes share a training: test accuracy, points", difference, POINTS)


def replayed(setting: Setting) -> Iterator[Row]:
    """The weights after some steps with CUDA graphs, against those after the same steps without."""
    dataset = loops.noise(84, 16, 10)  # five batches, and a smaller one
    rows = np.random.default_rng(0).normal(size=(84, 10)).astype(np.float16)

    def weights(first_captured: float) -> dict[str, np.ndarray]:
        views = loops.training_views(dataset, setting.device)
        setup = loops.cached(views, lambda _, samples: (rows[samples], None), setting.device)
        with patch.object(cuda_graph, "CAPTURED_STEPS", first_captured):
            loop = loops.Loop("cifar_resnet", "resnet8", dataset, setup, 16, setting.device)
        loop.run(20)
        return {name: it.cpu().numpy() for name, it in loop.network.state_dict().items()}

    first, again, captured = weights(np.inf), weights(np.inf), weights(0)
    yield check("CUDA graphs: cannot be used", not cuda_graph.CapturedNetwork.works, 0)
    noise = largest_difference(first, again)
    yield check("CUDA graphs: weights", largest_difference(first, captured), 4 * noise)


def kill_after_an_epoch(side: Side, module: str) -> None:
    """Kill the training when it has saved its first state."""
    side.forget_training(STUDENT)
    with side.running(module, NAME) as process:
        while not list((side.folder / STUDENT.scratch).glob("*.state")):
            if process.poll() is not None:
                raise UserError(f"`{module}` ended before it was killed; see `{side.log}`.")
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)


def largest_difference(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(some[key] - others[key]).max(initial=0)) for key in some)
