"""Shared by the studies of methods, views, encodings and beyond: budgets, teachers, caches, one
training and its line of results.

A study is a list of blocks of runs. Its command makes the teachers and caches of a block with the
pipeline's stages, in folders below PROJECT/.scratch/accuracy; trains the block's students, several
at a time; and appends one line per run to runs.csv beside this file. It skips finished runs,
teachers and caches: a killed study resumes, each training after its last finished epoch, and a run
that two studies share runs once.
"""

import argparse
import contextlib
import hashlib
import io
import math
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from scipy import stats
from torch import nn
from torch.nn import functional

from pipeline.compute.device import default_device
from pipeline.compute.distributed import SINGLE_PROCESS
from pipeline.data.prepared.dataset import Dataset, open_dataset
from pipeline.data.sources.archives import read_files
from pipeline.distillation.device_rows import SoftTargetLookup
from pipeline.distillation.objective import loss_over_epochs, seen_views
from pipeline.distillation.params import METHODS, DistillationParams, check_method
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict
from pipeline.models.params import NetworkParams
from pipeline.models.spec import build, family_module, model_spec
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import atomic_directory, canonical_json
from pipeline.runtime.outputs import PREPARED, STORE, TEACHER
from pipeline.runtime.params import read_params
from pipeline.runtime.validation import validate
from pipeline.store.format.schema import INDEX, StoreIdentity, shard_keys
from pipeline.store.format.shards import read_header
from pipeline.store.reading.index import read_index
from pipeline.store.reading.store import SoftTargetBatch, Store, open_shards, view_of_epoch
from pipeline.store.writing.shard_writer import shard_bytes, write_index, write_shard
from pipeline.students.label_loss import label_loss
from pipeline.students.loop import TrainingData, evaluate, fit
from pipeline.students.params import TrainingParams
from pipeline.training.resume import ResumeState, fingerprint
from pipeline.views.loader import Batch, PairedViews, open_views
from pipeline.views.params import ViewsParams
from pipeline.views.policy import ViewPolicy
from soak.common import ROOT, write_tar

RESULTS = Path(__file__).with_name("runs.csv")
WORKSPACE = ".scratch/accuracy"  # in the project
POLICY = "crop_flip"
VALIDATION_PER_CLASS = 10  # of a subset
UNLABELLED_PER_CLASS = 150
STRONG = {"operations": 2, "magnitude": 9}  # RandAugment
UNLABELLED = "unlabeled"
FOLDERS = {"train": "train", "validation": "val", "test": "test"}
LAST, BEST = "last_epoch_test_accuracy", "best_epoch_test_accuracy"

#: Training of teachers and students in the published CIFAR-100 tables (Tian et al. 2020,
#: arXiv:1910.10699).
TABLES = {
    "epochs": 240,
    "batch_size": 64,
    "optimizer": "sgd",
    "learning_rate": 0.05,
    "schedule": "step",
    "milestones": [150, 180, 210],
    "nesterov": False,
    "weight_decay": 5e-4,
}


#: Training of students on subsets.
SMALL = {
    "batch_size": 64,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "warmup_epochs": 1,
    "weight_decay": 5e-4,
}


@dataclass(frozen=True)
class Budget:
    """The size of a study."""

    name: str
    per_class: int | None  # train on a subset, the first of each class; None: on all images
    training: Mapping[str, Any]  # of the students
    num_views: int  # cached views of each training image
    seeds: Sequence[int]
    precision: str = "float32"  # of the teacher

    @property
    def epochs(self) -> int:
        return self.training["epochs"]


BUDGETS = {
    budget.name: budget
    for budget in (
        # One view per epoch, as with a teacher at every step.
        Budget("cpu", 50, {**SMALL, "epochs": 16}, 16, (0, 1)),
        # All distinct views, as with a teacher at every step.
        Budget("views", 100, {**SMALL, "epochs": 40}, 16, (0, 1, 2), "bfloat16"),
        # Of `beyond`: its teacher is another than that of the CPU budget's results.
        Budget("equal", 50, {**SMALL, "epochs": 16}, 16, (0, 1, 2)),
        # Of `long_runs`, which sets the epochs.
        Budget("long", 50, {**SMALL, "epochs": 400}, 162, (0, 1, 2)),
        Budget("gpu", None, TABLES, ViewPolicy(POLICY).distinct, (0, 1, 2)),
        # To try the command of the GPU budget, on tiny images.
        Budget("quick", None, {**TABLES, "epochs": 8, "milestones": [5, 6, 7]}, 2, (0, 1)),
    )
}


@dataclass(frozen=True)
class Network:
    family: str
    name: str
    training: tuple[tuple[str, Any], ...] = ()  # a student's overrides of the budget's training


@dataclass(frozen=True)
class Teacher:
    """`seed` None: the project's teacher. Otherwise the study trains it: at the GPU budget by the
    tables' recipe, the students', with this seed; at the CPU budget by the project's
    `teacher.training`, with `seed` added to its seed."""

    network: Network
    seed: int | None = None

    @property
    def folder(self) -> str:
        return f"teachers/{self.network.name}-{'own' if self.seed is None else self.seed}"


@dataclass(frozen=True)
class Cache:
    """One teacher's logits for some views of some images."""

    teacher: Teacher
    num_views: int
    k: int | None = None  # of `top_k`; None: dense
    mix: str = "none"
    policy: str = POLICY
    unlabelled: bool = False  # UNLABELLED_PER_CLASS more images of each class, without labels
    paired: bool = False  # half of the views are the weak ones of pairs, half the STRONG ones

    @property
    def folder(self) -> str:
        parts = [
            self.teacher.folder.replace("teachers/", "caches/"),
            f"{self.num_views}-views",
            "dense" if self.k is None else f"top-{self.k}",
            *([self.mix] if self.mix != "none" else []),
            *([self.policy] if self.policy != POLICY else []),
            *(["with-unlabelled"] if self.unlabelled else []),
            *(["paired"] if self.paired else []),
        ]
        return "-".join(parts)


@dataclass(frozen=True)
class Run:
    """One training of one student."""

    budget: str
    student: Network
    epochs: int
    seed: int
    caches: tuple[Cache, ...]
    distillation: Mapping[str, Any] = field(default_factory=dict)  # empty: labels alone
    use: str = "ensemble"  # of the caches: a key of USES
    jitter: int = 0  # pixels: random shifts up to this and mirroring, on top of the cached view


#: Ways to use caches -> how the results name them.
USES = {
    "ensemble": "",  # the mean of their logits, view by view
    "sequence": "in sequence: ",  # the views of one after those of the other
    "inexact": "inexact: ",  # the logits of the cached views, while the student sees fresh ones
    "live": "live, not cached: ",  # the teacher runs on fresh views; of the cache, only its images
}


KEY = ["budget", "student", "caches", "distillation", "epochs", "seed"]


def key(run: Run) -> dict[str, str | int]:
    """The columns that identify a run in the results."""
    return {
        "budget": run.budget,
        "student": run.student.name,
        "caches": USES[run.use]
        + " + ".join(Path(cache.folder).name for cache in run.caches)
        + (f", jitter {run.jitter}" if run.jitter else ""),
        "distillation": canonical_json(run.distillation) if run.distillation else "labels only",
        "epochs": run.epochs,
        "seed": run.seed,
    }


def results(file: Path | None = None) -> pd.DataFrame:
    """All finished runs of a file, by default RESULTS, indexed by the values of their keys."""
    file = file or RESULTS
    if not file.exists():
        return pd.DataFrame(index=pd.MultiIndex.from_arrays([[]] * len(KEY), names=KEY))
    return pd.read_csv(file).set_index(KEY)


class Workshop:
    """The folder of teachers and caches, below a project in which `prepare` has run (and, for the
    CPU budget, `teacher`)."""

    def __init__(self, project: Path, budget: Budget):
        self.project, self.budget = project.resolve(), budget
        self.root = self.project / WORKSPACE / budget.name

    def states(self, run: Run) -> Path:
        """The folder of the state of an unfinished training."""
        return (
            self.root / "trainings" / hashlib.sha256(canonical_json(key(run)).encode()).hexdigest()
        )

    def make(self, caches: Sequence[Cache]) -> None:
        """Make missing caches, and their images and teachers.

        Raises:
            UserError: there is no such project, it lacks its images, or a stage fails.
        """
        if not self.project.is_dir():
            raise UserError(
                f"`{self.project}` is no folder; expected a project in which `prepare` has run, "
                "and `teacher` for the CPU budget. Name its folder."
            )
        here = Path.cwd()
        os.chdir(self.project)  # stages read parameters from the current folder
        try:
            for cache in caches:
                self._cache(cache)
        except subprocess.CalledProcessError as error:
            raise UserError(
                f"`{' '.join(error.cmd)}` ended with {error.returncode}; expected it to succeed. "
                "Fix the errors above and run this again: finished work is kept."
            ) from None
        finally:
            os.chdir(here)

    def _cache(self, cache: Cache) -> None:
        if (self.root / cache.folder / STORE / INDEX).exists():
            return
        images, teacher = self._images(cache.unlabelled), self._teacher(cache.teacher)
        params = read_params()
        params["views"] |= {
            "policy": cache.policy,
            "rand_augment": {"weak": "none", "strong": STRONG} if cache.paired else "none",
            "mix": "none" if cache.mix == "none" else {"method": cache.mix, "alpha": 1.0},
            "count": cache.num_views // (1 + cache.paired),
            "seed": 0,
        }
        encoding = "dense" if cache.k is None else "top_k"
        params["soft_targets"] = {
            "encoding": encoding,
            "k": cache.k,
            "precision": self.budget.precision,
            "batch_size": params["soft_targets"]["batch_size"],
        }
        if cache.k is not None:  # made from the dense cache, without another teacher run
            self._cache(replace(cache, k=None))
        folder = self._folder(cache.folder, params)
        link(images / PREPARED, folder / PREPARED)
        link(teacher / TEACHER.model, folder / TEACHER.model)
        if cache.k is None:
            run_stage("soft_targets", folder)
            shutil.rmtree(folder / ".scratch")
        else:
            dense, dataset, _ = self.open(replace(cache, k=None))
            write_sparse(dense, dataset, cache.k, folder / STORE)

    def _images(self, unlabelled: bool) -> Path:
        """A project of the images: the current folder's if the budget takes all of them."""
        if self.budget.per_class is None:
            return self.project
        folder = self.root / "images" / ("with-unlabelled" if unlabelled else "labelled")
        if (folder / PREPARED / "dataset.json").exists():
            return folder
        params = read_params()
        params["dataset"] |= {"source": "image_folder", "root": "images.tar"}
        self._folder(folder, params)
        more = UNLABELLED_PER_CLASS if unlabelled else 0
        write_subset(folder / "images.tar", self.budget.per_class, more)
        run_stage("prepare", folder)
        return folder

    def _teacher(self, teacher: Teacher) -> Path:
        """A project with the teacher, trained on all of the project's images."""
        if teacher.seed is None:
            return self.project
        folder = self.root / teacher.folder
        if (folder / TEACHER.model / "network.json").exists():
            return folder
        params = read_params()
        if self.budget.per_class is not None:
            training = dict(params["teacher"]["training"])
            training["seed"] += teacher.seed
        else:
            training = {**self.budget.training, "policy": POLICY, "seed": teacher.seed}
        params["teacher"] |= {
            "family": teacher.network.family,
            "network": teacher.network.name,
            "weights": "train",
            "training": training,
        }
        self._folder(folder, params)
        link(self.project / PREPARED, folder / PREPARED)
        run_stage("teacher", folder)
        shutil.rmtree(folder / ".scratch")
        return folder

    def _folder(self, name: str | Path, params: Mapping[str, Any]) -> Path:
        """A folder with these parameters; a killed stage resumes from its files in it."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
        return folder

    def open(self, cache: Cache) -> tuple[Store, Dataset, ViewsParams]:
        """A cache's store, verified, with its images and views."""
        folder = self.root / cache.folder
        dataset = open_dataset(folder / PREPARED)
        index = read_index(folder / STORE)
        store = open_shards(
            folder / STORE, index, {name: split.labels for name, split in dataset.splits.items()}
        )
        store.verify(dataset)
        params = read_params(folder / "params.yaml")
        return store, dataset, validate(ViewsParams, params["views"], "params.yaml: views")


def run_stage(stage: str, project: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", f"pipeline.stages.{stage}", *arguments]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    subprocess.run(command, cwd=project, env=os.environ | {"PYTHONPATH": path}, check=True)


def write_subset(archive: Path, train_per_class: int, unlabelled_per_class: int = 0) -> None:
    """Write a subset of the images of the project in the current folder: the first of each class,
    by sample id, of training and validation, all of test, and `unlabelled_per_class` more of each
    class from training, without their labels."""
    dataset = open_dataset(PREPARED)
    limits = {"train": train_per_class, "validation": VALIDATION_PER_CLASS}
    target: dict[str, str] = {}  # name in the source -> name in the archive
    for name, split in dataset.splits.items():
        taken: Counter[int] = Counter()
        for sample_id, label in sorted(zip(split.sample_ids, split.labels.tolist(), strict=True)):
            if taken[label] < limits.get(name, len(split)):
                target[sample_id] = f"{FOLDERS[name]}/{sample_id.split('/', 1)[1]}"
            elif name == "train" and taken[label] < limits[name] + unlabelled_per_class:
                target[sample_id] = f"{UNLABELLED}/{len(target):06d}{Path(sample_id).suffix}"
            else:
                continue
            taken[label] += 1
    source = read_files(Path(read_params()["dataset"]["root"]))
    partial = archive.with_suffix(".partial")
    write_tar(partial, ((target.pop(n), content) for n, content in source if n in target))
    if target:
        raise SystemExit(
            f"{len(target)} images of data/prepared are not in dataset.root; expected all of them. "
            "Run `dvc repro prepare`."
        )
    partial.rename(archive)


def append(path: Path, row: Mapping[str, object]) -> None:
    """Add a finished run to a table of runs."""
    pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False)


def processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def link(target: Path, place: Path) -> None:
    """Put a symbolic link to a folder there, in place of another."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(target.resolve(), target_is_directory=True)


Opened = tuple[Store, Dataset, ViewsParams]


@lru_cache
def _opened(project: Path, budget: str, cache: Cache) -> Opened:
    return Workshop(project, BUDGETS[budget]).open(cache)


def params_of(distillation: Mapping[str, Any]) -> DistillationParams:
    """A method's parameters, by default its authors'."""
    method = METHODS[distillation["method"]]
    return validate(method, dict(distillation), f"method {distillation['method']}")


class InSequence:
    """The views of several stores as those of one: first all of the first store."""

    def __init__(self, opened: Sequence[Opened], device: torch.device):
        self.entries = [
            (store, open_views(dataset.splits["train"], plan.view_policy, plan.seed, device), view)
            for store, dataset, plan in opened
            for view in range(store.num_views)
        ]

    def batches(self, number: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        _, views, view = self.entries[number]
        return views.batches(view, order)

    def soft_targets(self, number: int, samples: np.ndarray) -> SoftTargetBatch:
        store, _, view = self.entries[number]
        return store.gather(view, samples)


def training_data(
    opened: Sequence[Opened], run: Run, device: torch.device, teacher: Path | None = None
) -> tuple[TrainingData, SoftTargetLookup | None]:
    """The views and soft targets of the run's student; without distillation, fresh views of the
    labelled images and no soft targets.

    Args:
        teacher: the folder of its model, for a run with a live teacher.
    """
    _, dataset, plan = opened[0]
    split = dataset.splits["train"]
    fresh = open_views(split, plan.view_policy, plan.seed, device)
    if run.use == "inexact":
        fresh = open_views(split, ViewPolicy(POLICY), plan.seed, device)
    if not run.distillation:
        labelled = np.flatnonzero(split.labels >= 0)
        return TrainingData(dataset, fresh, lambda epoch: epoch - 1, labelled), None
    params = params_of(run.distillation)
    for store, _, _ in opened:
        check_method(
            params,
            run.student.name,
            encoding=store.identity.encoding,
            mixed=plan.mix is not None,
            paired=plan.paired,
            labels=split.labels,
        )
    temperature = params.at_epoch(1, run.epochs).decoding_temperature  # dense rows hold for any
    opened = [(store.decoded_at(temperature), *of_store) for store, *of_store in opened]
    stores, everyone = [store for store, _, _ in opened], np.arange(len(split))

    def ensemble(view: int, samples: np.ndarray) -> SoftTargetBatch:
        if len(stores) == 1:
            return stores[0].gather(view, samples)
        members = [store.gather(view, samples).logits.astype(np.float32) for store in stores]
        return SoftTargetBatch(np.mean(members, axis=0), None)

    def inexact(view: int, samples: np.ndarray) -> SoftTargetBatch:
        return stores[0].gather(view % stores[0].num_views, samples)

    def live(view: int, samples: np.ndarray) -> SoftTargetBatch:
        (batch,) = fresh.batches(view, [samples])
        precision = BUDGETS[run.budget].precision
        scores = predict(network, description.input, batch.pixels, precision=precision)
        return SoftTargetBatch(scores.cpu().numpy(), None)

    if run.use == "live":
        network, description = checkpoint.load(teacher, produced_by="dvc repro teacher")
        network.to(device)
    if run.use in ("inexact", "live"):
        soft_targets = {"inexact": inexact, "live": live}[run.use]
        return TrainingData(dataset, fresh, lambda epoch: epoch - 1, everyone), soft_targets
    views, soft_targets, count = seen_views(params, fresh), ensemble, plan.views_or_pairs
    if run.use == "sequence":
        views = InSequence(opened, device)
        soft_targets, count = views.soft_targets, len(views.entries)
    return (
        TrainingData(dataset, views, lambda epoch: view_of_epoch(epoch, count, run.seed), everyone),
        soft_targets,
    )


class Jitter(nn.Module):
    """In training, mirror each input at random and shift it by up to `pixels`, repeating edges."""

    def __init__(self, network: nn.Module, pixels: int):
        super().__init__()
        self.network, self.pixels = network, pixels

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, C, H, W] -> [B, num_classes]
        if self.training:
            batch, _, height, width = x.shape
            mirrored = torch.rand(batch, 1, 1, 1).to(x.device) < 0.5  # drawn on the host
            x = torch.where(mirrored, x.flip(3), x)
            windows = functional.pad(x, [self.pixels] * 4, mode="replicate")
            windows = windows.unfold(2, height, 1).unfold(3, width, 1)
            top, left = torch.randint(2 * self.pixels + 1, (2, batch))
            x = windows[torch.arange(batch), :, top, left]
        return self.network(x)


def training_of(run: Run) -> TrainingParams:
    """The budget's training with the student's overrides; milestones scale with the epochs. The
    epoch that is best on validation is kept: its accuracy is a column of the results."""
    budget = BUDGETS[run.budget]
    training = {**budget.training, **dict(run.student.training), "epochs": run.epochs}
    if "milestones" in training:
        scaled = [epoch * run.epochs // budget.epochs for epoch in training["milestones"]]
        training["milestones"] = scaled
    return TrainingParams(**training, keep="best", seed=run.seed)


def write_sparse(dense: Store, dataset: Dataset, k: int, directory: Path) -> None:
    """Write the `top_k` store of a dense one. It equals the stage's, up to the float16 rounding of
    the dense rows."""
    sizes = dense.index.split_sizes
    contents = StoreIdentity(**dense.identity.fields() | {"encoding": "top_k", "k": k})
    with atomic_directory(directory) as target:
        for place in shard_keys(sizes, dense.num_views):
            arrays = read_header(dense.directory / place.file_name).arrays
            labels = dataset.splits[place.split].labels[place.first_sample :][: place.num_samples]
            write_shard(
                target / place.file_name,
                contents,
                place,
                arrays["logits"].map().astype(np.float32),
                labels,
                arrays["canaries"].map(),
            )
        write_index(target, contents, dataset.class_names, sizes, dense.num_views, {})


def bytes_per_view(store: Store) -> float:
    """Bytes of the files for one view of a training image."""
    images = store.index.split_sizes["train"]
    places = shard_keys({"train": images}, 1)
    identity = StoreIdentity(**store.identity.fields())  # without the rest of the index
    return sum(shard_bytes(identity, place) for place in places) / images


def teacher_accuracy(stores: Sequence[Store], dataset: Dataset) -> float:
    """Test accuracy of the stores' logits, of their mean if there are several."""
    samples = np.arange(len(dataset.splits["test"]))
    logits = [store.gather(0, samples, split="test").logits for store in stores]
    predictions = np.mean([rows.astype(np.float32) for rows in logits], axis=0).argmax(1)
    return float((predictions == dataset.splits["test"].labels).mean())


def train_one(run: Run, project: Path) -> dict[str, object]:
    """Train the student; measure test accuracy of its last epoch and of its best on validation. A
    training that was killed resumes after its last finished epoch."""
    device, workshop = default_device(), Workshop(project, BUDGETS[run.budget])
    if device.type == "cpu":
        torch.set_num_threads(1)
    opened = [_opened(project, run.budget, cache) for cache in run.caches]
    stores, dataset = [store for store, _, _ in opened], opened[0][1]
    torch.manual_seed(run.seed)
    description = model_spec(run.student.family, NetworkParams(name=run.student.name), dataset)
    network, spec = build(description).to(device), description.input
    if run.jitter:
        network = Jitter(network, run.jitter)
    teacher = workshop.root / run.caches[0].folder / TEACHER.model
    resume = resume_state(run, workshop.states(run), opened, device)
    resumed = any(resume.folder.glob("*.state"))
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        data, soft_targets = training_data(opened, run, device, teacher)
        loss = (
            loss_over_epochs(
                params_of(run.distillation),
                lambda _: soft_targets,
                device,
                run.epochs,
                stored=(stores[0].num_views, len(data.samples)) if run.use == "ensemble" else None,
                paired=opened[0][2].paired,
                steps=run.epochs * math.ceil(len(data.samples) / training_of(run).batch_size),
            )
            if soft_targets
            else lambda logits, batch: label_loss(
                logits, batch.labels, batch.partner_labels, batch.weights
            )
        )
        trained = fit(network, spec, data, loss, training_of(run), device, resume=resume)
    seconds, test = time.perf_counter() - start, dataset.splits["test"]
    last = evaluate(network, spec, test, device)[1]["test_accuracy"]
    best = last
    if trained.kept_epoch != run.epochs:
        network.load_state_dict(trained.kept_state)
        best = evaluate(network, spec, test, device)[1]["test_accuracy"]
    images = len(dataset.splits["train"])
    taught = stores if run.distillation and run.use != "live" else []
    passes = run.epochs if run.use == "live" else sum(store.num_views for store in taught)
    return {
        **key(run),
        LAST: last,
        BEST: best,
        "best_epoch": trained.kept_epoch,
        "teacher_test_accuracy": round(teacher_accuracy(stores, dataset), 4),
        "teacher_passes": passes * images,
        "student_passes": run.epochs * images * (1 + isinstance(data.views, PairedViews)),
        "bytes_per_view": round(sum(map(bytes_per_view, taught)), 2),
        "seconds": None if resumed else round(seconds),
        "dataset_fingerprint": dataset.fingerprint[:12],
        "torch": torch.__version__,
        "hardware": processor() if device.type == "cpu" else torch.cuda.get_device_name(),
    }


def resume_state(
    run: Run, folder: Path, opened: Sequence[Opened], device: torch.device
) -> ResumeState:
    """The state of the run's training, in a folder for it alone."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "run": key(run),
        "training": training_of(run).model_dump(),
        "stores": [store.index.content() for store, _, _ in opened],
        "dataset": opened[0][1].fingerprint,
    }
    return ResumeState(folder, fingerprint(fields, device, SINGLE_PROCESS), SINGLE_PROCESS)


def open_pool(workers: int, families: Collection[str] = ()) -> ProcessPoolExecutor:
    """Start processes to train in. They exit if this one is killed.

    Args:
        families: of networks, whose code all processes load: a state is resumed by equal code.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(sorted(families),))


def _begin(families: Sequence[str]) -> None:
    """Load the families' code, and end when the parent process ends."""
    for family in families:
        family_module(family)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def conduct(
    blocks: Sequence[Sequence[Run]],
    workshop: Workshop,
    workers: int,
    report: Callable[[str], None],
    file: Path | None = None,
) -> None:
    """Run what is not in the results yet, block by block.

    Args:
        file: for new results, instead of RESULTS.

    Raises:
        UserError: a cache could not be made; or, after all other runs, some runs failed.
    """
    file = file or RESULTS
    known = {*results().index, *results(file).index}
    todo = [[run for run in block if tuple(key(run).values()) not in known] for block in blocks]
    total, left = sum(map(len, blocks)), sum(map(len, todo))
    report(f"{file.name} holds {total - left} of {total} runs")
    if not left:
        return
    failed, runs = [], [run for block in blocks for run in block]
    networks = [*(r.student for r in runs), *(c.teacher.network for r in runs for c in r.caches)]
    with open_pool(workers, {network.family for network in networks}) as pool:
        for block in todo:
            workshop.make(list(dict.fromkeys(cache for run in block for cache in run.caches)))
            waiting = {pool.submit(train_one, run, workshop.project): run for run in block}
            for future in as_completed(waiting):
                name = ", ".join(str(value) for value in key(waiting[future]).values())
                try:
                    row = future.result()
                except UserError as error:
                    failed.append(f"{name}: {error}")
                    report(failed[-1])
                    continue
                append(file, row)
                shutil.rmtree(workshop.states(waiting[future]), ignore_errors=True)
                taken = "resumed" if row["seconds"] is None else f"in {row['seconds']} s"
                report(f"{name}: {row[LAST]:.2%} {taken}")
    if failed:
        raise UserError("\n".join([f"{len(failed)} runs of {left} failed:", *failed]))


def command(
    name: str,
    description: str,
    plan: Callable[[Budget], list[list[Run]]],
    tables: Callable[[], Iterator[str]],
    *,
    budgets: Sequence[str] = ("cpu", "gpu"),
    plot: Callable[[Path], None] | None = None,
) -> None:
    """Run a study's command line."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.accuracy.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("project", nargs="?", type=Path, help="a project of the budget's recipe")
    parser.add_argument("--budget", choices=budgets, default=budgets[0])
    parser.add_argument("--workers", type=int, help="trainings at a time (CPU: cores; GPU: 1)")
    parser.add_argument("--tables", action="store_true", help="print the page's tables and end")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS.name}")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw an SVG and end")
    arguments = parser.parse_args()
    if plot and arguments.plot:
        plot(arguments.plot)
        return
    if arguments.tables:
        print("\n\n".join(tables()))
        return
    if arguments.project is None:
        raise UserError(
            "PROJECT is missing; expected the folder of a project in which `prepare` has run, "
            "and `teacher` for the CPU budget. Name it, or use --tables."
        )
    budget = BUDGETS[arguments.budget]
    workers = arguments.workers or (os.cpu_count() if budget.per_class else 1)
    workshop = Workshop(arguments.project, budget)
    conduct(plan(budget), workshop, workers, partial(print, flush=True), arguments.results)


# Tables.


@dataclass(frozen=True)
class Cell:
    """One training, averaged over its seeds, in per cent."""

    last: float  # mean accuracy of the last epoch
    deviation: float  # of that accuracy between seeds; NaN for one seed
    best: float  # mean accuracy of the epoch that is best on validation
    seeds: int
    row: pd.Series  # of the first seed

    @property
    def shown(self) -> str:
        spread = f" ± {self.deviation:.2f}" if self.seeds > 1 else ""
        return f"{self.last:.2f}{spread} ({self.seeds})"


def cell(found: pd.DataFrame, runs: Sequence[Run]) -> Cell | None:
    """The same training with all its seeds; None if no seed was run."""
    keys = [tuple(key(run).values()) for run in runs]
    rows = found.loc[[k for k in keys if k in found.index]]
    if rows.empty:
        return None
    last, best = 100 * rows[LAST], 100 * rows[BEST]
    return Cell(last.mean(), last.std(), best.mean(), len(rows), rows.iloc[0])


SPELT = {2: "two", 3: "three"}


def noise(cells: Sequence[Cell | None]) -> tuple[float, int] | None:
    """Half the 95 % interval of a difference of two cells of so many seeds each, in points, and
    their number, the smallest of the table: by Student's t, with the deviation between seeds pooled
    over all cells. None: no cell has two."""
    several = [cell for cell in cells if cell and cell.seeds > 1]
    if not several:
        return None
    freedom, seeds = sum(cell.seeds - 1 for cell in several), min(cell.seeds for cell in several)
    variance = sum((cell.seeds - 1) * cell.deviation**2 for cell in several) / freedom
    return float(stats.t.ppf(0.975, freedom) * (2 * variance / seeds) ** 0.5), seeds


def with_noise(table: str, cells: Sequence[Cell | None]) -> str:
    """The table, and below it the size of a significant difference."""
    found = noise(cells)
    if found is None:
        return table
    half, seeds = found
    return (
        f"{table}\n\nA difference of two means of {SPELT.get(seeds, seeds)} seeds below {half:.2f} "
        "points is not significant\n"
        "(95 %, from the deviation between seeds, pooled over the table)."
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
