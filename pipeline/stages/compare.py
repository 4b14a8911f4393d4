"""compare: what distillation gained and lost, each student beside its baseline and the teacher.

Reads metrics, histories and predictions of the teacher and of each student in params.yaml, by
name; writes metrics/comparison.json and .csv, and metrics/training_curves.csv.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pipeline.errors import UserError, reported
from pipeline.files import atomic_file, read_json, write_json
from pipeline.params.students import student_names

METRICS, PREDICTIONS = Path("metrics"), Path("predictions")
MEASURES = [
    "test_accuracy",
    "test_top5_accuracy",
    "test_nll",
    "parameters",
    "macs",
    "size_bytes",
]
ROLES = {"distilled": "students", "baseline": "baselines"}


def read_measures(path: Path, stage: str) -> dict[str, float]:
    """The measures that are compared.

    Raises:
        UserError: the file is absent, or lacks one of them; names the stage that writes it.
    """
    metrics = read_json(path, made_by=f"dvc repro {stage}")
    missing = [name for name in MEASURES if name not in metrics]
    if missing:
        raise UserError(f"`{path}` lacks {', '.join(missing)}. Run `dvc repro --force {stage}`.")
    return {name: metrics[name] for name in MEASURES}


def read_decisions(path: Path, stage: str) -> np.ndarray:
    """[N] the predicted class of every test sample.

    Raises:
        UserError: the file is absent or damaged; says how to have it again.
    """
    try:
        return load_file(path)["test"].argmax(1)
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(
            f"`{path}` is absent or damaged ({error}). Run `dvc pull {path}` if a remote holds it, "
            f"or `dvc repro --force {stage}`."
        ) from None


def compare_student(name: str, teacher: dict[str, float]) -> dict[str, Any]:
    models = {
        role: read_measures(METRICS / kind / f"{name}.json", f"{kind.removesuffix('s')}@{name}")
        for role, kind in ROLES.items()
    }
    distilled, baseline = models["distilled"], models["baseline"]
    decisions = read_decisions(PREDICTIONS / "students" / f"{name}.safetensors", f"student@{name}")
    teacher_decisions = read_decisions(PREDICTIONS / "teacher.safetensors", "teacher")
    return {
        **models,
        "gain": distilled["test_accuracy"] - baseline["test_accuracy"],
        "retention": distilled["test_accuracy"] / teacher["test_accuracy"],
        "agreement": float(np.mean(decisions == teacher_decisions)),
        "compression": teacher["parameters"] / distilled["parameters"],
        "macs_ratio": teacher["macs"] / distilled["macs"],
    }


def rows(comparison: dict[str, Any]) -> pd.DataFrame:
    """One row per model: the teacher, and each student's distilled and baseline networks."""
    table = [{"model": "teacher", "role": "teacher", **comparison["teacher"]}]
    for name, student in comparison["students"].items():
        derived = {key: value for key, value in student.items() if key not in ROLES}
        table.append({"model": name, "role": "distilled", **student["distilled"], **derived})
        table.append({"model": name, "role": "baseline", **student["baseline"]})
    return pd.DataFrame(table)


def training_curves(names: list[str]) -> pd.DataFrame:
    """Every epoch of every student and baseline."""
    curves = []
    for name in names:
        for role, kind in ROLES.items():
            path = METRICS / "history" / kind / f"{name}.csv"
            try:
                history = pd.read_csv(path)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"`{path}` cannot be read ({error}). Run "
                    f"`dvc repro --force {kind.removesuffix('s')}@{name}`."
                ) from None
            history.insert(0, "student", name)
            history.insert(1, "role", role)
            curves.append(history)
    return pd.concat(curves, ignore_index=True)


def on_screen(comparison: dict[str, Any]) -> str:
    """The comparison as a table of text, one line per student."""
    teacher = comparison["teacher"]
    lines = [
        {
            "student": name,
            "distilled": f"{student['distilled']['test_accuracy']:.2%}",
            "baseline": f"{student['baseline']['test_accuracy']:.2%}",
            "gain": f"{100 * student['gain']:+.2f}",
            "retention": f"{student['retention']:.2%}",
            "agreement": f"{student['agreement']:.2%}",
            "parameters": f"{student['distilled']['parameters']:,}",
            "compression": f"{student['compression']:.1f} x",
            "MACs": f"{student['distilled']['macs'] / 1e6:.1f} M",
            "fewer MACs": f"{student['macs_ratio']:.1f} x",
        }
        for name, student in comparison["students"].items()
    ]
    return (
        f"teacher: test accuracy {teacher['test_accuracy']:.2%}, "
        f"{teacher['parameters']:,} parameters, {teacher['macs'] / 1e6:.1f} M MACs\n"
        + pd.DataFrame(lines).to_string(index=False)
    )


def write_table(path: Path, table: pd.DataFrame) -> None:
    with atomic_file(path) as partial:
        table.to_csv(partial, index=False, lineterminator="\n")


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.compare", description=__doc__)
    parser.add_argument("--show", action="store_true", help="print the last comparison again")
    if parser.parse_args().show:
        print(on_screen(read_json(METRICS / "comparison.json", made_by="dvc repro compare")))
        return
    names = student_names()
    teacher = read_measures(METRICS / "teacher.json", "teacher")
    if teacher["test_accuracy"] == 0:
        raise UserError(
            "the teacher names no test image's class, so nothing can be retained of its accuracy. "
            "Look at `teacher` in params.yaml: the order of the classes, `mean`, `std`, training."
        )
    comparison = {
        "teacher": teacher,
        "students": {name: compare_student(name, teacher) for name in names},
    }
    write_table(METRICS / "training_curves.csv", training_curves(names))
    write_table(METRICS / "comparison.csv", rows(comparison))
    write_json(METRICS / "comparison.json", comparison)
    print(on_screen(comparison))


if __name__ == "__main__":
    with reported():
        main()
