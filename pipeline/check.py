"""Validate all of params.yaml, and the files that it names, before anything runs.

python -m pipeline.check
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import UserError, did_you_mean, reported
from pipeline.params.dataset import DatasetParams
from pipeline.params.distillation import check_method, load_distillation
from pipeline.params.loading import PARAMS_FILE, load_section, read_params
from pipeline.params.soft_targets import SoftTargetsParams
from pipeline.params.students import load_student, load_with_overrides, student_names
from pipeline.params.teacher import TeacherParams
from pipeline.params.training import TrainingParams
from pipeline.params.views import ViewsParams

SECTIONS = {
    "dataset": DatasetParams,
    "views": ViewsParams,
    "teacher": TeacherParams,
    "soft_targets": SoftTargetsParams,
    "training": TrainingParams,
}


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
    attempt(check_lock)
    attempt(check_dataset_root)
    attempt(check_teacher)
    try:
        names = student_names()
    except UserError as error:
        return [*found, str(error)]
    for name in names:
        attempt(lambda name=name: check_student(name))
    return found


def check_lock() -> None:
    lock = Path("dvc.lock")
    text = lock.read_text("utf-8", errors="replace") if lock.is_file() else ""
    if any(line.startswith(("<<<<<<< ", ">>>>>>> ")) for line in text.splitlines()):
        raise UserError(
            f"`{lock}` has the marks of a merge; expected none. Remove it and "
            "run `dvc repro`: what either side has run is taken from DVC's cache, where that is."
        )


def check_dataset_root() -> None:
    dataset = load_section(DatasetParams, "dataset")
    expected = {
        "image_folder": "a folder or an archive",
        "torchvision": f"the folder where `{dataset.name}` lies or is downloaded to: make it",
    }
    if dataset.source in expected and not Path(dataset.root).exists():
        raise UserError(
            f"`{PARAMS_FILE}: dataset.root` is `{dataset.root}`, which does not exist; expected "
            f"{expected[dataset.source]}."
        )


def check_teacher() -> None:
    teacher = load_section(TeacherParams, "teacher")
    if teacher.weights == "checkpoint" and not Path(teacher.checkpoint).is_file():
        raise UserError(
            f"`{PARAMS_FILE}: teacher.checkpoint` is `{teacher.checkpoint}`, which is not a file; "
            "`weights: checkpoint` needs one."
        )


def check_student(name: str) -> None:
    student = load_student(name)
    load_with_overrides(TrainingParams, "training", student.training, name)
    distillation = load_distillation(student.distillation, name)
    check_method(
        distillation,
        name,
        encoding=load_section(SoftTargetsParams, "soft_targets").encoding,
        mixed=load_section(ViewsParams, "views").mix is not None,
    )


def main() -> None:
    argparse.ArgumentParser("python -m pipeline.check", description=__doc__).parse_args()
    found = problems()
    if found:
        raise UserError("\n".join(found))
    print(f"{PARAMS_FILE}: no problems found")


if __name__ == "__main__":
    with reported():
        main()
