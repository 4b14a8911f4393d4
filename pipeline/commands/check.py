"""Validate all of params.yaml, and the files that it names, before anything runs.

python -m pipeline.commands.check
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Callable
from pathlib import Path

from pipeline.data.sources.archives import names_in
from pipeline.data.sources.image_folder import image_folder
from pipeline.data.sources.params import DatasetParams
from pipeline.distillation.params import check_method, load_distillation
from pipeline.models.params import NetworkParams
from pipeline.runtime.errors import UserError, did_you_mean
from pipeline.runtime.params import PARAMS_FILE, load_section, read_params, student_names
from pipeline.store.writing.params import SoftTargetsParams
from pipeline.students.params import TrainingParams, load_student, load_with_overrides
from pipeline.teacher.params import TeacherParams
from pipeline.views.params import ViewsParams

SECTIONS = {
    "dataset": DatasetParams,
    "views": ViewsParams,
    "teacher": TeacherParams,
    "soft_targets": SoftTargetsParams,
    "training": TrainingParams,
}


#: What the stages write: what holds one of these, or lies in it, would depend on itself.
WRITTEN = (
    *("data/prepared", "data/soft_targets", "models/teacher", "models/students"),
    *("models/baselines", "predictions", "metrics", "reports", ".scratch", ".dvc", ".git"),
)


def problems() -> list[str]:
    """Every problem of the file, in its order; empty when a run can start."""
    found: list[str] = []

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except UserError as error:
            found.extend(line for line in str(error).splitlines() if line not in found)

    known = [*SECTIONS, "distillation", "students"]
    for name in read_params():
        if name not in known:
            suggestion = did_you_mean(str(name), known) or "."
            found.append(
                f"`{PARAMS_FILE}: {name}` is unknown{suggestion} Known: {', '.join(known)}."
            )
    for name, model in SECTIONS.items():
        attempt(lambda name=name, model=model: load_section(model, name))
    attempt(load_distillation)
    attempt(check_merged)
    attempt(check_dataset_root)
    attempt(check_teacher)
    try:
        names = student_names()
    except UserError as error:
        return [*found, str(error)]
    for name in names:
        attempt(lambda name=name: check_student(name))
    return found


def check_merged() -> None:
    """No file of DVC's has the marks of a merge; params.yaml would be no YAML with them."""
    for name, remedy in {
        "dvc.yaml": "Settle each conflict and remove the marks",
        "dvc.lock": "Remove it and run `dvc repro`: what either side has run is taken from DVC's "
        "cache, where that is",
    }.items():
        file = Path(name)
        text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
        if any(line.startswith(("<<<<<<< ", ">>>>>>> ")) for line in text.splitlines()):
            raise UserError(f"`{name}` has the marks of a merge; expected none. {remedy}.")


def check_dataset_root() -> None:
    """The root is there, apart from what the stages write, and laid out as it should be."""
    dataset = load_section(DatasetParams, "dataset")
    if dataset.source == "digits":
        return
    root = Path(dataset.root)
    if dataset.source == "torchvision" and not root.is_dir():
        raise UserError(
            f"`{PARAMS_FILE}: dataset.root` is `{dataset.root}`, which does not exist; expected "
            f"the folder where `{dataset.name}` lies or is downloaded to: make it."
        )
    if dataset.source == "image_folder" and not root.exists():
        raise UserError(
            f"`{PARAMS_FILE}: dataset.root` is `{dataset.root}`, which does not exist; expected "
            "a folder or an archive."
        )
    check_apart("dataset.root", dataset.root, "data/raw/NAME")
    if dataset.source == "image_folder":
        if root.is_file() and root.suffix != ".zip":
            next(names_in(root), None)  # all names of a tar take a pass through all of it
        else:
            image_folder(dataset)  # reads names, and no image before it is asked for


def check_apart(key: str, path: str, example: str) -> None:
    place = Path(path).resolve()
    for written in WRITTEN:
        folder = Path(written).resolve()
        if place.is_relative_to(folder) or folder.is_relative_to(place):
            raise UserError(
                f"`{PARAMS_FILE}: {key}` is `{path}`, and stages write to `{written}`; expected a "
                f"place apart from it, as `{example}`."
            )


def check_teacher() -> None:
    teacher = load_section(TeacherParams, "teacher")
    if teacher.weights == "checkpoint" and not Path(teacher.checkpoint).is_file():
        raise UserError(
            f"`{PARAMS_FILE}: teacher.checkpoint` is `{teacher.checkpoint}`, which is not a file; "
            "`weights: checkpoint` needs one."
        )
    if teacher.weights == "logits" and not is_logit_source(Path(teacher.checkpoint)):
        raise UserError(
            f"`{PARAMS_FILE}: teacher.checkpoint` is `{teacher.checkpoint}`, which is neither a "
            "table (.csv, .npz) nor the folder of a store; `weights: logits` needs one of them."
        )
    check_apart("teacher.checkpoint", teacher.checkpoint, "models/imported/NAME")
    check_statistics(teacher.network, "teacher.network")


def is_logit_source(path: Path) -> bool:
    """Whether there is what looks like one; the stage `teacher` reads it."""
    if path.is_dir():
        return (path / "store.json").is_file()
    return path.is_file() and path.suffix in (".csv", ".npz")


def check_statistics(network: NetworkParams, where: str) -> None:
    """`mean` and `std` have a value for each channel of the dataset."""
    channels = load_section(DatasetParams, "dataset").channels
    for name, values in (("mean", network.mean), ("std", network.std)):
        if values is not None and len(values) != channels:
            raise UserError(
                f"`{PARAMS_FILE}: {where}.{name}` has {len(values)} values; expected {channels}, "
                "one for each of `dataset.channels`."
            )


def check_student(name: str) -> None:
    student = load_student(name)
    check_statistics(student.network, f"students.{name}.network")
    load_with_overrides(TrainingParams, "training", student.training, name)
    distillation = load_distillation(student.distillation, name)
    check_method(
        distillation,
        name,
        encoding=load_section(SoftTargetsParams, "soft_targets").encoding,
        mixed=load_section(ViewsParams, "views").mix is not None,
    )


def main() -> None:
    argparse.ArgumentParser("python -m pipeline.commands.check", description=__doc__).parse_args()
    found = problems()
    if found:
        raise UserError("\n".join(found))
    print(f"{PARAMS_FILE}: no problems found")


if __name__ == "__main__":
    run_command(main)
