"""Validate all of params.yaml, and the files and networks that it names, before anything runs.

python -m pipeline.commands.check
"""

from pipeline.runtime.command import run_command

import argparse
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.comparison.removed_students import removed_students_line
from pipeline.data.sources.archives import check_end_of_tar, is_zip, read_heads
from pipeline.data.sources.image_folder import image_folder
from pipeline.data.sources.mnist_5k import mnist_5k
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.splits import TRAIN, ImageSource, hide_labels
from pipeline.distillation.params import DistillationParams, check_method, load_distillation
from pipeline.export.params import ExportParams, load_export
from pipeline.models.params import FAMILIES, NetworkParams, WeightsFile
from pipeline.runtime.environment import LAUNCHER
from pipeline.runtime.errors import UserError, counted, did_you_mean
from pipeline.runtime.params import PARAMS_FILE, load_section, read_params, student_names
from pipeline.store.format.schema import INDEX
from pipeline.store.writing.params import SoftTargetsParams
from pipeline.students.params import TrainingSection, load_student, load_training
from pipeline.students.start_file import check_start_file
from pipeline.teacher.params import TeacherParams
from pipeline.views.params import ViewsParams

SECTIONS = {
    "dataset": DatasetParams,
    "views": ViewsParams,
    "teacher": TeacherParams,
    "soft_targets": SoftTargetsParams,
    "training": TrainingSection,
    "export": ExportParams,
}

#: More epochs for each cached view than this cost accuracy (benchmarks/accuracy/views.md), unless
#: there are as many views as this (benchmarks/accuracy/long_runs.md).
EPOCHS_PER_VIEW = 20
ENOUGH_VIEWS = 8

#: Keys of methods that count epochs -> how many must follow, and what a training lacks otherwise.
AWAITED = {
    "warmup_epochs": (0, "the method's loss never has its whole weight"),
    "student_teaches_after": (1, "the student never teaches itself"),
}
AUTHORS_EPOCHS = 240  # of those methods, on CIFAR-100

MUCH_SMALLER = 2  # times: views that show so much less than the images are remarked

#: Folders that stages, DVC or Git write. An input inside or around one would depend on itself.
WRITTEN = (
    *("data/prepared", "data/soft_targets", "models/teacher", "models/students"),
    *("models/baselines", "models/int8", "models/exported", "models/chosen"),
    *("predictions", "metrics", "reports", ".scratch", ".dvc", ".git"),
)


def problems() -> list[str]:
    """List every problem, in the file's order. The list is empty if a run can start."""
    known = [*SECTIONS, "distillation", "students"]
    lines = [
        f"`{PARAMS_FILE}: {name}` is unknown{did_you_mean(str(name), known) or '.'} "
        f"Known: {', '.join(known)}."
        for name in read_params()
        if name not in known
    ]
    listed = Listed()

    def check_names() -> None:
        nonlocal listed
        listed = check_dataset()

    checks = [partial(load_section, model, name) for name, model in SECTIONS.items()]
    checks += [load_distillation, check_merge_conflicts, check_names, check_teacher]
    checks += [lambda: check_soft_targets(listed), lambda: check_students(listed)]
    return list(dict.fromkeys(lines + _problems_of(checks)))


def _problems_of(checks: Iterable[Callable[[], object]]) -> list[str]:
    lines = []
    for check in checks:
        try:
            check()
        except UserError as error:
            lines += str(error).splitlines()
    return lines


def check_merge_conflicts() -> None:
    """Refuse conflict markers in DVC's files. (With them, params.yaml would not be YAML.)"""
    for name, remedy in {
        "dvc.yaml": "Resolve each conflict and remove the markers",
        "dvc.lock": "Remove it and run `dvc repro`: DVC restores from its cache what either branch "
        "has run",
    }.items():
        file = Path(name)
        if file.is_file() and re.search(rb"^(<{7}|>{7}) ", file.read_bytes(), re.MULTILINE):
            raise UserError(f"`{name}` has merge conflict markers; expected none. {remedy}.")


@dataclass(frozen=True)
class Listed:
    """What the names of a dataset's files tell."""

    labels: Sequence[int] = ()  # of the training images
    num_classes: int | None = None


def check_dataset() -> Listed:
    """Check that the root exists, is outside the folders that stages write, and has the layout of
    its source. Read no image.
    """
    dataset = load_section(DatasetParams, "dataset")
    if dataset.source == "mnist_5k":
        return _listed(mnist_5k(dataset), dataset)
    root, expected = Path(dataset.root), "a folder or an archive"
    if dataset.source == "torchvision":
        expected = f"the folder that holds `{dataset.name}` or receives its download: create it"
    if not (root.is_dir() if dataset.source == "torchvision" else root.exists()):
        raise UserError(
            f"`{PARAMS_FILE}: dataset.root` is `{dataset.root}`, which does not exist; expected "
            f"{expected}.{tracked_elsewhere(root)}"
        )
    check_outside_written("dataset.root", dataset.root, "data/raw/NAME")
    if dataset.source == "image_folder":
        if root.is_file() and not is_zip(root):
            next(read_heads(root), None)  # to list all names, a tar must be read to its end
            check_end_of_tar(root)
        else:
            return _listed(image_folder(dataset), dataset)
    return Listed()


def _listed(source: ImageSource, dataset: DatasetParams) -> Listed:
    samples = hide_labels(source.samples, dataset)
    labels = samples.labels[samples.splits == TRAIN].tolist()
    return Listed(labels, len(source.class_names))


def check_soft_targets(listed: Listed) -> None:
    """Refuse a `k` of more classes than the dataset has, if they are known."""
    if listed.num_classes is not None:
        load_section(SoftTargetsParams, "soft_targets").check_classes(listed.num_classes)


def tracked_elsewhere(path: Path) -> str:
    """Say how to fetch a missing file or folder of `dvc add`; nothing of another."""
    file = f"{path}.dvc"
    if not Path(file).is_file():
        return ""
    return (
        f" DVC tracks it: fetch it by `dvc pull {file}`, or, without a remote, "
        f"`dvc checkout {file}`."
    )


def check_outside_written(key: str, path: str, example: str) -> None:
    absolute = Path(path).resolve()
    for written in WRITTEN:
        folder = Path(written).resolve()
        if absolute.is_relative_to(folder) or folder.is_relative_to(absolute):
            raise UserError(
                f"`{PARAMS_FILE}: {key}` is `{path}`, and stages write to `{written}`; expected a "
                f"path outside it, such as `{example}`."
            )


def check_teacher() -> None:
    teacher = load_section(TeacherParams, "teacher")
    path = Path(teacher.checkpoint)
    place = f"`{PARAMS_FILE}: teacher.checkpoint` is `{teacher.checkpoint}`"
    may_be_folder = teacher.family == "onnx"  # of the file and its weights
    if teacher.weights == "checkpoint" and not (
        path.is_file() or (may_be_folder and path.is_dir())
    ):
        raise UserError(
            f"{place}, which is not a file; `weights: checkpoint` needs one. Copy it there, or "
            "name its place below models/imported/."
            f"{tracked_elsewhere(path)}"
        )
    if teacher.weights == "logits" and not (path / INDEX).is_file():
        raise UserError(
            f"{place}, which is no folder of a store; `weights: logits` needs one. Make it of a "
            f"table: `python -m pipeline.commands.import_logits TABLE`.{tracked_elsewhere(path)}"
        )
    check_outside_written("teacher.checkpoint", teacher.checkpoint, "models/imported/NAME")
    check_statistics(teacher.network, "teacher.network")


def check_statistics(network: NetworkParams, key: str) -> None:
    """Check that `mean` and `std` have a value for each channel of the dataset."""
    channels = load_section(DatasetParams, "dataset").channels
    for name, values in (("mean", network.mean), ("std", network.std)):
        if values is not None and len(values) != channels:
            raise UserError(
                f"`{PARAMS_FILE}: {key}.{name}` has {counted(len(values), 'value')}; expected "
                f"{channels}, one for each of `dataset.channels`."
            )


def check_students(listed: Listed) -> None:
    checks = [partial(check_student_section, name, listed) for name in student_names()]
    if lines := _problems_of(checks):
        raise UserError("\n".join(lines))


def check_student_section(name: str, listed: Listed) -> None:
    student = load_student(name)
    check_statistics(student.network, f"students.{name}.network")
    if isinstance(student.network.weights, WeightsFile):
        check_start_file(student.network.weights, name)
    load_training(name, student)
    load_export(name)
    views = load_section(ViewsParams, "views")
    check_method(
        load_distillation(student.distillation, name),
        name,
        encoding=load_section(SoftTargetsParams, "soft_targets").encoding,
        mixed=views.mix is not None,
        paired=views.paired,
        labels=listed.labels,
        num_classes=listed.num_classes,
    )


def remarks() -> list[str]:
    """Say where views are much smaller than images, which students see each cached view so often
    that it costs accuracy, and which end their training before their method's schedule."""
    views, lines = load_section(ViewsParams, "views"), []
    prepared = load_section(DatasetParams, "dataset").image_size
    if prepared >= MUCH_SMALLER * views.image_size:
        lines.append(
            f"remark: `views.image_size` is {views.image_size}, and `dataset.image_size` is "
            f"{prepared}: teacher and students see {views.image_size} pixels. Set "
            "`views.image_size` to the side of the networks' input, such as 224."
        )
    count, distinct = views.views_or_pairs, views.view_policy.distinct or math.inf
    for name in student_names():
        student = load_student(name)
        epochs = load_training(name, student).epochs
        method = load_distillation(student.distillation, name)
        for key, (following, consequence) in AWAITED.items():
            awaited, latest = getattr(method, key, 0), epochs - following
            if awaited > latest:
                authors = type(method).model_fields[key].default
                lines.append(
                    f"remark: student `{name}` trains for {counted(epochs, 'epoch')}, and "
                    f"`distillation.{key}` is {awaited}: {consequence}. The authors of "
                    f"`{method.method}` have {authors} of {AUTHORS_EPOCHS}; in proportion, `{key}: "
                    f"{min(round(epochs * authors / AUTHORS_EPOCHS), latest)}`."
                )
        lines += inherited_weights(name, student.distillation, method)
        enough = min(math.ceil(epochs / EPOCHS_PER_VIEW), ENOUGH_VIEWS, distinct)
        if count < enough:
            lines.append(
                f"remark: student `{name}` sees each view about {round(epochs / count)} times "
                f"({epochs} epochs, `views.count: {count}`). As measured on CIFAR-100, 1, 2 and 4 "
                "views cost 3.3, 0.8 and 0.4 points in 40 epochs, and 12, 5 and 1.4 in 400; 8 cost "
                "less than a point. "
                f"`views.count: {enough}` shows each at most {math.ceil(epochs / enough)} times."
            )
    return lines


def inherited_weights(
    name: str, own: Mapping[str, Any], method: DistillationParams
) -> Iterator[str]:
    """Say which values of the section a standardised method uses instead of its authors'."""
    authors = getattr(type(method), "standardized_defaults", {})
    others = {key: getattr(method, key) for key in authors if key not in own}
    others = {key: value for key, value in others.items() if value != authors[key]}
    if own.get("standardize") is True and others:
        yield (
            f"remark: student `{name}` has `standardize`, with "
            f"{join_keys(others)} of the section `distillation`; its authors have "
            f"{join_keys({key: authors[key] for key in others})}. Write the ones that you want in "
            "this student."
        )


def join_keys(values: Mapping[str, Any]) -> str:
    return " and ".join(f"`{key}: {value}`" for key, value in values.items())


def check_networks() -> None:
    """Build every network and read every file of weights, in a process of its own. If one is
    refused, exit with its code; it has printed why."""
    code = str(FAMILIES.parents[1])  # this process's, whatever the current folder
    process = subprocess.run(
        [sys.executable, "-m", "pipeline.commands.check_networks"],
        # One thread: two images are too few for more, which on busy cores wait for each other.
        env=os.environ | {"PYTHONPATH": code, LAUNCHER: str(os.getpid()), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if process.returncode < 0:
        raise UserError(
            "the process that builds the networks was ended by "
            f"{signal.Signals(-process.returncode).name}; expected it to try each. Check the "
            "machine's memory; `python -m pipeline.commands.check_networks` runs it alone."
        )
    if process.returncode not in (0, 1, 130):  # those of a command, which says why
        raise UserError(
            f"the process that builds the networks ended with code {process.returncode} and said "
            "nothing; expected it to try each. A network's file may end the process itself "
            "(`os._exit`): remove that."
        )
    if process.returncode:
        raise SystemExit(process.returncode)


def main() -> None:
    argparse.ArgumentParser("python -m pipeline.commands.check", description=__doc__).parse_args()
    if lines := problems():
        raise UserError("\n".join(lines))
    check_networks()
    print(f"{PARAMS_FILE}: no problems found", *remarks(), sep="\n")
    if line := removed_students_line(student_names()):
        print(line)


if __name__ == "__main__":
    run_command(main)
