"""Measure how many views a cache needs: test accuracy of one student for different caches.

    python -m benchmarks.accuracy.views PROJECT     # a finished run of recipes/cifar100_laptop.yaml

Trains a ResNet-8 on a fixed subset of the project's images (the first 100 training images of each
class), with the project's teacher in the ways of CURVE and BEYOND, and appends one line per run to
benchmarks/accuracy/views.csv. It skips runs that the file holds, so a killed study resumes. One run
per core at a time, one thread each. `python -m benchmarks.accuracy.views_page` prints the table.
"""

import argparse
import contextlib
import csv
import io
import multiprocessing
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.views_project import append, make_projects
from pipeline.data.prepared.dataset import open_dataset
from pipeline.distillation.objective import SoftTargetLookup, student_loss
from pipeline.distillation.params import KD
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict
from pipeline.models.params import NetworkParams
from pipeline.models.spec import build, model_spec
from pipeline.store.reading.store import SoftTargetBatch, open_store, view_of_epoch
from pipeline.students.label_loss import label_loss
from pipeline.students.loop import TrainingData, evaluate, fit
from pipeline.students.params import TrainingParams
from pipeline.views.loader import Batch, Views
from pipeline.views.params import ViewsParams
from pipeline.views.policy import ViewPolicy

RESULTS = Path(__file__).with_suffix(".csv")
WORKSPACE = ".scratch/accuracy_views"  # in the project
POLICY, SEED = "crop_flip", 0  # of the training views
CACHED = {"crop_flip": 16, "crop": 4, "none": 1}  # policy -> views in its store
PRECISION = "bfloat16"  # of the teacher's forward pass, cached and live
SHORT, LONG = 10, 40  # epochs
STUDENT = NetworkParams(name="resnet8")
TRAINING = {
    "batch_size": 64,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "warmup_epochs": 1,
    "weight_decay": 5e-4,
}
METHOD = KD(temperature=4.0, soft_label_weight=0.9, hard_label_weight=0.1)


@dataclass(frozen=True)
class Way:
    """One way to teach."""

    cached: tuple[tuple[str, int], ...] = ()  # (policy, number of cached views)
    live: bool = False  # the teacher runs for every fresh view
    inexact: bool = False  # the student sees fresh views; the logits are for the cached ones
    jitter: int = 0  # pixels: random shifts up to this and mirroring, on top of the cached view


#: No teacher; one clean view under augmented training; exact views; the teacher at every step.
CURVE = {
    "labels only": Way(),
    "1 clean view, inexact": Way((("none", 1),), inexact=True),
    **{f"{count} exact": Way(((POLICY, count),)) for count in (1, 2, 4, 8, 16)},
    "live teacher": Way(live=True),
}
#: Ways to make few views worth more.
BEYOND = {
    **{f"{count} exact + jitter": Way(((POLICY, count),), jitter=2) for count in (1, 4, 8)},
    "1 clean + 3 exact": Way((("none", 1), (POLICY, 3))),
    "4 unmirrored + 4 exact": Way((("crop", 4), (POLICY, 4))),
}
#: (way, epochs, seed), the most important first.
PLAN = [
    *((name, SHORT, seed) for seed in (0, 1, 2) for name in CURVE),
    *((name, LONG, 0) for name in CURVE | BEYOND),
    *((name, SHORT, 0) for name in BEYOND),
    *((name, LONG, seed) for seed in (1, 2) for name in CURVE | BEYOND),
    *((name, SHORT, seed) for seed in (1, 2) for name in BEYOND),
]


class Jitter(nn.Module):
    """In training, mirror each input at random and shift it by up to `pixels`, repeating edges."""

    def __init__(self, network: nn.Module, pixels: int):
        super().__init__()
        self.network, self.pixels = network, pixels

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, num_classes]
        if self.training:
            batch, _, height, width = x.shape
            x = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x.flip(3), x)
            windows = F.pad(x, [self.pixels] * 4, mode="replicate")
            windows = windows.unfold(2, height, 1).unfold(3, width, 1)
            top, left = torch.randint(2 * self.pixels + 1, (2, batch))
            x = windows[torch.arange(batch), :, top, left]
        return self.network(x)


class Study:
    """The images, stores and teacher of all runs, opened once per process."""

    def __init__(self, workspace: Path):
        torch.set_num_threads(1)
        project = workspace / POLICY
        self.dataset = open_dataset(project / "data/prepared")
        size = self.dataset.image_size
        teacher = project / "models/teacher"
        fingerprint = checkpoint.fingerprint(teacher, produced_by="dvc repro teacher")
        self.stores = {
            policy: open_store(
                self.dataset,
                ViewsParams(
                    policy=policy,
                    rand_augment="none",
                    mix="none",
                    count=count,
                    seed=SEED,
                    image_size=size,
                ),
                fingerprint,
                workspace / policy / "data/soft_targets",
            )
            for policy, count in CACHED.items()
        }
        for store in self.stores.values():
            store.verify(self.dataset)
        train, cpu = self.dataset.splits["train"], torch.device("cpu")
        self.views = {policy: Views(train, ViewPolicy(policy), SEED, cpu) for policy in CACHED}
        self.teacher, self.description = checkpoint.load(teacher, produced_by="dvc repro teacher")

    def training_data(self, way: Way, seed: int) -> tuple[TrainingData, SoftTargetLookup | None]:
        """The views and soft targets of a way; no soft targets for labels alone."""
        everyone = np.arange(len(self.dataset.splits["train"]))
        fresh = TrainingData(self.dataset, self.views[POLICY], lambda epoch: epoch - 1, everyone)
        if way.live:
            return fresh, self.live_logits
        if not way.cached:
            return fresh, None
        entries = [(policy, view) for policy, count in way.cached for view in range(count)]

        def rows(number: int, samples: np.ndarray) -> SoftTargetBatch:
            policy, view = entries[number]
            return self.stores[policy].gather(view, samples)

        def batches(number: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
            policy, view = entries[number]
            return self.views[policy].batches(view, order)

        if way.inexact:
            return fresh, lambda view, samples: rows(view % len(entries), samples)

        def entry(epoch: int) -> int:
            return view_of_epoch(epoch, len(entries), seed)

        views = SimpleNamespace(batches=batches)
        return TrainingData(self.dataset, views, entry, everyone), rows

    def live_logits(self, view: int, samples: np.ndarray) -> SoftTargetBatch:
        (batch,) = self.views[POLICY].batches(view, [samples])
        spec = self.description.input
        return SoftTargetBatch(
            predict(self.teacher, spec, batch.pixels, precision=PRECISION).numpy(), None
        )

    def passes(self, way: Way, epochs: int) -> int:
        """Teacher passes over training images that the way needs."""
        views = epochs if way.live else sum(count for _, count in way.cached)
        return views * len(self.dataset.splits["train"])

    def run(self, name: str, epochs: int, seed: int) -> dict[str, object]:
        """Train one student; measure test accuracy of its last epoch and of its best on
        validation."""
        way, cpu = (CURVE | BEYOND)[name], torch.device("cpu")
        torch.manual_seed(seed)
        description = model_spec("cifar_resnet", STUDENT, self.dataset)
        network = Jitter(build(description), way.jitter)
        if not way.jitter:
            network = network.network
        spec, test = description.input, self.dataset.splits["test"]
        params = TrainingParams(**TRAINING, epochs=epochs, seed=seed)
        with contextlib.redirect_stdout(io.StringIO()):
            data, soft_targets = self.training_data(way, seed)
            loss = (
                student_loss(METHOD, soft_targets, cpu)
                if soft_targets
                else lambda logits, batch: label_loss(logits, batch.labels)
            )
            trained = fit(network, spec, data, loss, params, cpu)
        last = evaluate(network, spec, test, cpu)[1]["test_accuracy"]
        network.load_state_dict(trained.best_state)
        best = evaluate(network, spec, test, cpu)[1]["test_accuracy"]
        return {
            "way": name,
            "epochs": epochs,
            "seed": seed,
            "last_epoch_test_accuracy": last,
            "best_epoch_test_accuracy": best,
            "best_epoch": trained.best_epoch,
            "teacher_passes": self.passes(way, epochs),
            "train_images": len(self.dataset.splits["train"]),
            "dataset_fingerprint": self.dataset.fingerprint[:12],
            "torch": torch.__version__,
            "hardware": processor(),
        }


def processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


_study: Study


def open_study(workspace: Path) -> None:
    global _study  # noqa: PLW0603  (one per worker process)
    _study = Study(workspace)


def run_one(name: str, epochs: int, seed: int) -> dict[str, object]:
    return _study.run(name, epochs, seed)


def finished() -> set[tuple[str, int, int]]:
    if not RESULTS.exists():
        return set()
    with open(RESULTS, encoding="utf-8") as file:
        return {(r["way"], int(r["epochs"]), int(r["seed"])) for r in csv.DictReader(file)}


def run_plan(workspace: Path, workers: int, report: Callable[[str], None]) -> None:
    todo = [run for run in PLAN if run not in finished()]
    report(f"{RESULTS.name} holds {len(PLAN) - len(todo)} of {len(PLAN)} runs")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, open_study, (workspace,)) as pool:
        for future in as_completed([pool.submit(run_one, *run) for run in todo]):
            row = future.result()
            append(RESULTS, row)
            report(f"{row['way']}, {row['epochs']} epochs, seed {row['seed']}: "
                   f"{row['last_epoch_test_accuracy']:.2%}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.accuracy.views", description=__doc__)
    parser.add_argument("project", type=Path, help="a project in which `teacher` has run")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    arguments = parser.parse_args()
    project = arguments.project.resolve()
    workspace = project / WORKSPACE
    make_projects(project, workspace, CACHED, PRECISION)
    run_plan(workspace, arguments.workers, partial(print, flush=True))


if __name__ == "__main__":
    main()
