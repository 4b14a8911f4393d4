"""The course of each training: validation accuracy and NLL, training loss and learning rate."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
from markupsafe import Markup

from pipeline.comparison.report import charts

BOTTOM = 180  # pixels, of the vertical axes
_MOST_ON_A_LINEAR_AXIS = 10  # the largest loss over the smallest


class TrainingCharts(NamedTuple):
    """The charts of one network, or of a student's two trainings, by their titles."""

    name: str
    charts: dict[str, Markup]
    note: str


def training_charts(curves: pd.DataFrame) -> list[TrainingCharts]:
    """The charts of the teacher, if it was trained, and of each student with its baseline.

    Args:
        curves: a row per epoch and training, as `results.read_training_curves` returns them.
    """
    is_teacher = curves["role"] == "teacher"
    found = [_charts("teacher", rows) for _, rows in curves[is_teacher].groupby("role")]
    students = curves[~is_teacher].groupby("student", sort=False)
    return found + [_charts(name, rows) for name, rows in students]


def _charts(name: str, curves: pd.DataFrame) -> TrainingCharts:
    trainings = dict(iter(curves.groupby("role")))
    kept = {role: int(rows.loc[rows["kept"], "epoch"].iloc[0]) for role, rows in trainings.items()}
    rates = [rows["learning_rate"].tolist() for rows in trainings.values()]
    equal = len(rates) > 1 and all(of_one == rates[0] for of_one in rates)
    columns = {
        "validation_accuracy": ("Validation accuracy", _axis_of_shares),
        "validation_nll": ("Validation NLL", _axis_of_losses),
        "train_loss": ("Training loss", _axis_of_losses),
        "learning_rate": (f"Learning rate{', the same of both' * equal}", _axis_of_rates),
    }
    drawn = {
        title: charts.curves(
            [(role, rows["epoch"], rows[column]) for role, rows in trainings.items()],
            charts.epoch_axis(curves["epoch"].max()),
            axis_of(curves[column].tolist()),
            f"{title.partition(',')[0]} of {name}",
            "epoch",
            marked=kept,
        )
        for column, (title, axis_of) in columns.items()
    }
    notes = [f"{role} {kept[role]} of {len(trainings[role])}" for role in reversed(trainings)]
    return TrainingCharts(name, drawn, f"Kept epoch: {', '.join(notes)}")


def _axis_of_shares(values: Sequence[float]) -> charts.Axis:
    return charts.linear_axis(values, BOTTOM, charts.TOP, charts.in_percent)


def _axis_of_losses(values: Sequence[float]) -> charts.Axis:
    """Logarithmic if the losses differ much; a loss of 0 or less has no logarithm."""
    low, high = min(values), max(values)
    if low <= 0 or high < _MOST_ON_A_LINEAR_AXIS * low:
        return charts.linear_axis(values, BOTTOM, charts.TOP, number)
    upside_down = charts.log_axis(values, charts.TOP, BOTTOM, number)
    return replace(upside_down, start=BOTTOM, end=charts.TOP)


def _axis_of_rates(values: Sequence[float]) -> charts.Axis:
    return charts.linear_axis([0, *values], BOTTOM, charts.TOP, number)


def number(value: float) -> str:
    """Five digits at most, written as short as the room beside an axis: 0.0125, 2.5e-4"""
    text = f"{value:.5g}"
    if len(text) <= 6:
        return text
    mantissa, _, exponent = f"{value:.4e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return min(f"{mantissa}e{int(exponent)}", text, key=len)
