"""compare: what distillation gained and lost, each student beside its baseline and the teacher.

Reads metrics, histories and predictions of the teacher and of each student in params.yaml, the
networks' speed, the store's index and the test images. Writes metrics/comparison.json, the report
and its tables in reports/, and the file to ship in models/chosen/. Measured times go to reports/
alone.
"""

from pipeline.runtime.command import run_command

import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.comparison import results
from pipeline.comparison.chosen_file import write_chosen
from pipeline.comparison.compare import compare
from pipeline.comparison.example_images import THUMBNAIL, clean_pixels, corrupted_examples
from pipeline.comparison.figures import (
    Figures,
    class_table,
    confusion_table,
    headline_figures,
    models_table,
)
from pipeline.comparison.measurement.latency import SPEED_FILE, this_machine
from pipeline.comparison.measurement.predictions import HELD_OUT
from pipeline.comparison.removed_students import removed_students_line
from pipeline.comparison.report.console import console_text
from pipeline.comparison.report.costs import Costs
from pipeline.comparison.report.decision_card import DecisionCard, decision_card
from pipeline.comparison.report.markdown import markdown
from pipeline.comparison.report.page import SHOWN_SEVERITY, html_report
from pipeline.data.prepared.dataset import open_dataset, verify_dataset
from pipeline.runtime.environment import REPRO
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import atomic_directory, write_bytes, write_json
from pipeline.runtime.locks import only_run_of
from pipeline.runtime.outputs import ExportOutputs
from pipeline.runtime.params import read_params, student_names
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.runtime.validation import read_model

METRICS, REPORTS = Path("metrics"), Path("reports")


def write_table(path: Path, table: pd.DataFrame) -> None:
    write_bytes(path, table.to_csv(index=False, lineterminator="\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.compare", description=__doc__)
    parser.add_argument("--show", action="store_true", help="print the last comparison again")
    if parser.parse_args().show:
        show(student_names())
        return
    with only_run_of("compare"):
        write_comparison(StageInputs("compare"))


def write_comparison(inputs: StageInputs) -> None:
    """Compare all files, write the report and the file to ship, and print the comparison."""
    names, dataset = student_names(), open_dataset()
    verify_dataset()
    store_index = results.read_store_index(dataset)
    (teacher,) = results.read_exported(ExportOutputs(), dataset)
    students = {name: results.read_exported(ExportOutputs(name), dataset) for name in names}
    labels = {name: np.array(dataset.splits[name].labels) for name in HELD_OUT}
    robustness = results.read_robustness(teacher, students, dataset)
    comparison = compare(teacher, students, labels, dataset.class_names, robustness)
    comparison = replace(comparison, refused=results.read_refused(names))
    if comparison.teacher.accuracy == 0:
        raise UserError(
            "the teacher classifies no test image correctly; expected some, for retention is a "
            "share of its accuracy. Check `teacher` in params.yaml: the order of the classes, "
            "`mean`, `std`, training."
        )
    curves, speed = results.read_training_curves(names), results.read_speed(names)
    trainings = results.read_students(names, results.read_training)
    steps = {name: tuple(t.optimiser_steps for t in pair) for name, pair in trainings.items()}
    made_passes = teacher.parameters is not None  # imported logits took no forward pass
    counts = {name: len(comparison.pairs_by_seed(name)) for name in names}
    economics = results.cache_economics(store_index, curves, counts) if made_passes else None
    no_teacher = comparison.teacher.no_file
    costs = Costs(speed.settings, no_teacher, speed.machine, this_machine(), economics)

    fingerprints = {"dataset": dataset.fingerprint, "teacher": store_index.teacher_fingerprint}
    test, figures = dataset.splits["test"], headline_figures(comparison, costs.economics, steps)
    page = html_report(
        figures,
        comparison,
        curves,
        partial(clean_pixels, test, side=THUMBNAIL),
        test.sample_ids,
        corrupted_examples(test, robustness.image_sizes[names[0]], SHOWN_SEVERITY),
        costs,
        read_params(),
        fingerprints,
    )
    inputs.check()
    with atomic_directory(REPORTS) as folder:
        write_bytes(folder / "index.html", page.encode())
        write_bytes(folder / "comparison.md", markdown(figures, comparison, costs).encode())
        write_table(folder / "class_accuracy.csv", class_table(comparison))
        write_table(folder / "comparison.csv", models_table(comparison))
        write_table(folder / "confusion.csv", confusion_table(comparison))
        write_table(folder / "training_curves.csv", curves)
    write_chosen(comparison.decision, comparison.models)
    write_json(METRICS / "comparison.json", figures.model_dump(exclude_unset=True))
    if REPRO not in os.environ:  # which prints it at its end, whatever ran
        print_comparison(figures, decision_card(figures, costs.speed), names)


def show(names: list[str]) -> None:
    """Print the last comparison again, without students that params.yaml no longer defines.

    Raises:
        UserError: there is none, or no student of it is defined now.
    """
    path, produced_by = METRICS / "comparison.json", "dvc repro compare"
    figures = read_model(path, Figures, produced_by=produced_by)
    students = {name: of for name, of in figures.students.items() if name in names}
    if not students:
        raise UserError(
            f"`{path}` compares {', '.join(figures.students)}; expected {', '.join(names)}, the "
            f"students of params.yaml. Run `{produced_by}`."
        )
    speed = results.read_speed([]).settings if SPEED_FILE.is_file() else {}
    card = decision_card(figures, speed)
    if len(students) < len(figures.students):  # all were counted, and each could be chosen
        figures, card = figures.model_copy(update={"students": students, "cache": None}), None
    print_comparison(figures, card, names)


def print_comparison(figures: Figures, card: DecisionCard | None, names: list[str]) -> None:
    print(console_text(figures, card))
    if missing := [name for name in names if name not in figures.students]:
        print(f"not compared yet: {', '.join(missing)}. Run `dvc repro`.")
    if line := removed_students_line(names):
        print(line)


if __name__ == "__main__":
    run_command(main)
