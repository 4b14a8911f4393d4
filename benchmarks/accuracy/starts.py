"""What do weights to start from give a student, what does the teacher, and what do both?

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.starts ARCHIVE    # data/raw/cifar100.tar.gz
    python -m benchmarks.accuracy.starts ARCHIVE --quick              # try it: nothing to conclude
    python -m benchmarks.accuracy.starts --tables

One half of the archive's classes is for pretraining: a network learns them. The other half is the
task: a larger network learns it from all of its images, and then teaches students that have few of
them and start from scratch or from the pretrained weights. Every network is trained by a stage of
the pipeline in a project below .scratch/accuracy/starts, with the parameters of
recipes/cifar100_laptop.yaml but for what is below. Appends one line per training to starts.csv
beside this file, and skips what is in it: a killed study resumes.
"""

from pipeline.runtime.command import run_command

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from benchmarks.accuracy.study import append, link, markdown, processor, run_stage
from benchmarks.harness import mean_interval
from pipeline.data.sources.archives import read_files
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, sha256_of_file
from pipeline.runtime.outputs import PREPARED, STORE, TEACHER, ModelOutputs
from soak.common import ROOT, write_tar

RESULTS = Path(__file__).with_name("starts.csv")
WORKSPACE = Path(".scratch/accuracy/starts")
RECIPE = ROOT / "recipes/cifar100_laptop.yaml"
CLASS_SEED = 0  # of the two halves of the classes, and of the order of each class's images
VALIDATION_PER_CLASS = 5
PRETRAINED = Path("models/imported/pretrained")  # in a project
NETWORK = "network.json"

SCRATCH, WEIGHTS = STARTS = ("scratch", "weights")
BASELINE, STUDENT = ROLES = ("baseline", "student")  # also the names of the stages
KEY = ["train_images", "epochs", "start", "learning_rate", "seed", "role"]
ACCURACY, VALIDATION = "test_accuracy", "validation_accuracy"


@dataclass(frozen=True)
class Size:
    """A training set of the task."""

    per_class: int
    epochs: int

    @property
    def name(self) -> str:
        return f"{self.per_class}-per-class"


@dataclass(frozen=True)
class Study:
    """What is trained. Networks are (family, name)."""

    sizes: tuple[Size, ...]
    student: tuple[str, str]  # pretrained, too
    teacher: tuple[str, str]
    pretraining: Mapping[str, Any]  # what differs from the recipe's training of its teacher
    teaching: Mapping[str, Any]  # likewise, of the teacher
    batch_size: int = 32  # of the students
    views: int = 16  # cached, of each training image; a shorter training has one for each epoch
    learning_rates: tuple[float, ...] = (0.1, 0.02)  # of which validation chooses
    choice_seed: int = 100  # of the trainings that choose
    seeds: tuple[int, ...] = (0, 1, 2)


FULL = Study(
    sizes=(Size(10, epochs=30), Size(100, epochs=6)),
    student=("cifar_resnet", "resnet20"),
    teacher=("wide_resnet", "wrn_16_2"),
    pretraining={"epochs": 8},
    teaching={"epochs": 6, "batch_size": 64},
)
QUICK = Study(
    sizes=(Size(4, epochs=2),),
    student=("cifar_resnet", "resnet8"),
    teacher=("cifar_resnet", "resnet8"),
    pretraining={"epochs": 2},
    teaching={"epochs": 2},
    seeds=(0, 1),
)


def write_archives(source: Path, folder: Path, sizes: Sequence[Size]) -> None:
    """Write the images of the projects `pretraining`, `teacher` and of each size. Those of the task
    have the same images for validation and test, and the smaller training set is in the larger.

    Raises:
        UserError: the source does not have train/CLASS/ and test/CLASS/.
    """
    images: dict[str, dict[str, list[tuple[str, bytes]]]] = defaultdict(lambda: defaultdict(list))
    for name, content in sorted(read_files(source)):
        split, class_name, _ = PurePosixPath(name).parts
        images[split][class_name].append((name, content))
    if set(images) != {"train", "test"}:
        raise UserError(
            f"`{source}` has {', '.join(f'`{name}/`' for name in sorted(images))}; expected "
            "`train/CLASS/` and `test/CLASS/`. Pack it by docs/examples/cifar_archive.py."
        )
    generator = np.random.default_rng(CLASS_SEED)
    names = generator.permutation(sorted(images["train"])).tolist()
    pretraining, task = names[: len(names) // 2], names[len(names) // 2 :]
    for name in sorted(images["train"]):
        of_class = images["train"][name]
        images["train"][name] = [of_class[i] for i in generator.permutation(len(of_class))]
    plans: dict[str, tuple[list[str], int | None]]
    plans = {"pretraining": (pretraining, None), "teacher": (task, None)}
    plans |= {size.name: (task, VALIDATION_PER_CLASS + size.per_class) for size in sizes}
    for project, (classes, end) in plans.items():
        archive = folder / f"{project}.tar"
        if not archive.exists():
            partial = archive.with_suffix(".partial")
            write_tar(partial, _members(images, classes, end))
            partial.rename(archive)


def _members(
    images: Mapping[str, Mapping[str, Sequence[tuple[str, bytes]]]],
    classes: Sequence[str],
    end: int | None,
) -> Iterator[tuple[str, bytes]]:
    for name in classes:
        for path, content in images["train"][name][:VALIDATION_PER_CLASS]:
            yield path.replace("train/", "val/", 1), content
        yield from images["train"][name][VALIDATION_PER_CLASS:end]
        yield from images["test"][name]


class Workshop:
    """The folder of the projects, and the table of the results."""

    def __init__(self, source: Path, folder: Path, study: Study, results: Path):
        self.source, self.folder, self.study = source, folder.resolve(), study
        self.results = results

    @cached_property
    def recipe(self) -> dict[str, Any]:
        return yaml.safe_load(RECIPE.read_text("utf-8"))

    def project(self, name: str, changes: Mapping[str, Any]) -> Path:
        """Write a project's params.yaml, the recipe's with changed sections, and prepare its
        images."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        dataset = self.recipe["dataset"] | {"root": f"../{name}.tar"}
        params = {**self.recipe, "dataset": dataset, **changes}
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")
        if not (folder / PREPARED / "dataset.json").exists():
            write_archives(self.source, self.folder, self.study.sizes)
            run_stage("prepare", folder)
        return folder

    def supervised(self, name: str, network: tuple[str, str], training: Mapping[str, Any]) -> Path:
        """A project in which the stage `teacher` has trained a network on the labels."""
        family, network_name = network
        teacher = dict(self.recipe["teacher"], family=family, network=network_name)
        teacher["training"] = teacher["training"] | training
        folder = self.project(name, {"teacher": teacher})
        if not (folder / TEACHER.model / NETWORK).exists():
            run_stage("teacher", folder)
        return folder

    def task(self, size: Size, students: Mapping[str, Any]) -> Path:
        """A project of the task: its teacher, its soft targets, and the pretrained weights."""
        study = self.study
        teacher = self.supervised("teacher", study.teacher, study.teaching)
        folder = self.project(
            size.name,
            {
                "views": self.recipe["views"] | {"count": min(study.views, size.epochs)},
                "training": self.recipe["training"]
                | {"epochs": size.epochs, "batch_size": study.batch_size, "keep": "last"},
                "students": dict(students),
            },
        )
        link(teacher / TEACHER.model, folder / TEACHER.model)
        link(self.pretrained, folder / PRETRAINED)
        if not (folder / STORE / "store.json").exists():
            run_stage("soft_targets", folder)
        return folder

    @cached_property
    def pretrained(self) -> Path:
        study = self.study
        project = self.supervised("pretraining", study.student, study.pretraining)
        return project / TEACHER.model

    def student(self, start: str, rate: float, seed: int) -> dict[str, Any]:
        """The section of a student in params.yaml."""
        family, name = self.study.student
        network: dict[str, Any] = {"name": name}
        if start == WEIGHTS:
            digest = sha256_of_file(self.pretrained / NETWORK)
            network["weights"] = {"path": str(PRETRAINED), "sha256": digest, "head": "new"}
        training = {"learning_rate": rate, "seeds": seed}
        return {"family": family, "network": network, "training": training, "distillation": {}}

    def rows(self) -> pd.DataFrame:
        """All finished trainings, indexed by their keys."""
        if not self.results.exists():
            return pd.DataFrame(index=pd.MultiIndex.from_arrays([[]] * len(KEY), names=KEY))
        return pd.read_csv(self.results).set_index(KEY)

    def train(self, size: Size, start: str, rate: float, seed: int, role: str) -> None:
        """Train one student or baseline by its stage, unless it is in the results."""
        images = size.per_class * self.classes
        key = dict(zip(KEY, (images, size.epochs, start, rate, seed, role), strict=True))
        if tuple(key.values()) in self.rows().index:
            return
        name = f"{start}-{rate:g}-{seed}".replace(".", "_")
        folder = self.task(size, {name: self.student(start, rate, seed)})
        began = time.perf_counter()
        run_stage(role, folder, name)
        taken = time.perf_counter() - began
        outputs = ModelOutputs("distilled" if role == STUDENT else "baseline", name)
        metrics, teacher, pretraining = (
            read_json(path, produced_by=role)
            for path in (
                folder / outputs.metrics,
                self.folder / "teacher" / TEACHER.metrics,
                self.folder / "pretraining" / TEACHER.metrics,
            )
        )
        row = {
            **key,
            ACCURACY: metrics[ACCURACY],
            VALIDATION: metrics[VALIDATION],
            "first_weights": self._described(folder / outputs.model)["start"]["sha256"][:12],
            "teacher_test_accuracy": teacher[ACCURACY] if role == STUDENT else None,
            "pretraining_test_accuracy": pretraining[ACCURACY] if start == WEIGHTS else None,
            "seconds": round(taken),
            "torch": torch.__version__,
            "hardware": processor(),
        }
        append(self.results, row)
        print(f"{', '.join(map(str, key.values()))}: {row[ACCURACY]:.2%} in {taken:.0f} s",
              flush=True)  # fmt: skip

    @cached_property
    def classes(self) -> int:
        teacher = self.supervised("teacher", self.study.teacher, self.study.teaching)
        return len(self._described(teacher / TEACHER.model)["class_names"])

    def _described(self, folder: Path) -> dict[str, Any]:
        return read_json(folder / NETWORK, produced_by="dvc repro")

    def conduct(self) -> None:
        """Train what is not in the results yet: first what chooses the learning rate, then seed by
        seed and size by size both starts, without and with the teacher."""
        study = self.study
        for start in STARTS:
            for rate in study.learning_rates:
                self.train(study.sizes[0], start, rate, study.choice_seed, BASELINE)
        rate = chosen_rate(self.rows(), study)
        for seed in study.seeds:
            for size in study.sizes:
                for start in STARTS:
                    for role in ROLES:
                        self.train(size, start, rate, seed, role)


def chosen_rate(rows: pd.DataFrame, study: Study) -> float:
    """The learning rate whose baselines were best on validation, on average over the starts."""
    choosing = rows[rows.index.get_level_values("seed") == study.choice_seed]
    return float(choosing.groupby("learning_rate")[VALIDATION].mean().idxmax())


# Tables.

#: A difference of the accuracies of one seed -> the cells (start, role) it adds, those it takes.
DIFFERENCES = {
    "teacher, from scratch": ([(SCRATCH, STUDENT)], [(SCRATCH, BASELINE)]),
    "teacher, from weights": ([(WEIGHTS, STUDENT)], [(WEIGHTS, BASELINE)]),
    "weights, without teacher": ([(WEIGHTS, BASELINE)], [(SCRATCH, BASELINE)]),
    "weights, with teacher": ([(WEIGHTS, STUDENT)], [(SCRATCH, STUDENT)]),
    "weights and teacher together": ([(WEIGHTS, STUDENT)], [(SCRATCH, BASELINE)]),
    "teacher, from weights less from scratch": (
        [(WEIGHTS, STUDENT), (SCRATCH, BASELINE)],
        [(WEIGHTS, BASELINE), (SCRATCH, STUDENT)],
    ),
}


def accuracies(rows: pd.DataFrame, study: Study) -> dict[int, pd.DataFrame]:
    """Test accuracy in per cent: training images -> [seed, (start, role)], NaN if not trained."""
    rows = rows.reset_index()
    rows = rows[rows["seed"].isin(study.seeds)]
    return {
        images: 100 * of_size.pivot(index="seed", columns=["start", "role"], values=ACCURACY)
        for images, of_size in rows.groupby("train_images")
    }


def tables(results: Path = RESULTS, study: Study = FULL) -> Iterator[str]:
    """The accuracy of each cell: mean and standard deviation between seeds; and the difference of
    cells in pairs of one seed: mean and 95 % interval by Student's t. Empty: fewer than 2 seeds."""
    found = accuracies(Workshop(Path(), Path(), study, results).rows(), study)
    cells, differences = [], []
    for images, table in found.items():
        for start in STARTS:
            texts = [_shown(table.get((start, role))) for role in ROLES]
            cells.append([f"{images:,}", start, *texts])
    header = ["Training images", "start", "labels alone", "with teacher"]
    yield markdown(header, cells)
    for name, (added, taken) in DIFFERENCES.items():
        row = [name]
        for table in found.values():
            complete = table.reindex(columns=[*added, *taken]).dropna()
            points = complete[added].sum(axis=1) - complete[taken].sum(axis=1)
            row.append(mean_interval(points.to_numpy()) if len(points) > 1 else "")
        differences.append(row)
    yield markdown(["Gain by", *(f"{images:,} images" for images in found)], differences)


def _shown(accuracy: pd.Series | None) -> str:
    values = [] if accuracy is None else accuracy.dropna()
    if len(values) == 0:
        return ""
    spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread} ({len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accuracy.starts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("archive", nargs="?", type=Path, help="train/CLASS/ and test/CLASS/")
    parser.add_argument(
        "--quick", action="store_true", help="tiny trainings, with tables of theirs"
    )
    parser.add_argument("--tables", action="store_true", help="print the page's tables and end")
    arguments = parser.parse_args()
    study, folder, results = FULL, WORKSPACE, RESULTS
    if arguments.quick:
        study, folder = QUICK, WORKSPACE / "quick"
        results = folder / RESULTS.name
    if not arguments.tables:
        if arguments.archive is None:
            raise UserError(
                "ARCHIVE is missing; expected CIFAR-100 as packed by "
                "docs/examples/cifar_archive.py. Name it, or use --tables."
            )
        Workshop(arguments.archive, folder, study, results).conduct()
    print("\n\n".join(tables(results, study)))


if __name__ == "__main__":
    run_command(main)
