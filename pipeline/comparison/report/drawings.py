"""The charts of the page and what they show: from the comparison to `charts`."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from pipeline.comparison.compare import Comparison
from pipeline.comparison.measurement.corruptions import SEVERITIES
from pipeline.comparison.measurement.latency import DeviceSpeed
from pipeline.comparison.report import charts
from pipeline.comparison.report.costs import device_label
from pipeline.comparison.report.numbers import percent
from pipeline.comparison.report.summary import gain_with_interval
from pipeline.comparison.robustness import RobustComparison
from pipeline.comparison.statistics import Gain, PairedDifference

MOST_CLASSES = 20  # that a heat map or bars show one by one
EXTREMES = 8  # with more classes: the largest gains and losses, and pairs of classes


class Drawing(NamedTuple):
    """A chart with its title and caption."""

    title: str
    chart: Markup
    note: str = ""


def intervals(title: str, gains: Mapping[str, Gain]) -> Drawing:
    rows = [(name, g.gain, g.low, g.high, gain_with_interval(g)) for name, g in gains.items()]
    return Drawing(title, charts.interval_plot(rows, f"{title} by student"))


def gain_and_cost(comparison: Comparison, speed: Mapping[str, DeviceSpeed]) -> list[Drawing]:
    """The gains, and accuracy against each cost; a teacher without a network has no cost."""
    models = comparison.models
    costs = {"parameters": [m.parameters for m in models], "MACs": [m.macs for m in models]}
    notes = {}
    for device_type, name in (("cpu", "the CPU"), ("cuda", "the GPU")):
        if device := speed.get(device_type):
            notes[f"latency on {name}, ms"] = f"Measured on {device_label(device)}"
            networks = [device.teacher, *(device.students[m.name] for m in models[1:])]
            costs[f"latency on {name}, ms"] = [n and n.latency_ms for n in networks]
    drawings = [intervals("Gain", comparison.gains)]
    for axis_title, of_models in costs.items():
        points = [
            charts.Point(m.name, m.role, cost, m.accuracy, m.low, m.high)
            for m, cost in zip(models, of_models, strict=True)
            if cost is not None
        ]
        title = f"Accuracy against {axis_title.removesuffix(', ms')}"
        chart = charts.scatter(points, title, axis_title)
        drawings.append(Drawing(title, chart, notes.get(axis_title, "")))
    return drawings


def calibration(comparison: Comparison) -> list[Drawing]:
    networks = {"teacher": [comparison.teacher]}
    networks |= {name: [gain.second, gain.first] for name, gain in comparison.gains.items()}
    drawings = []
    for name, models in networks.items():
        bins = [(model.role, model.reliability) for model in models]
        errors = ", ".join(f"{model.role} {percent(model.ece)}" for model in reversed(models))
        plot = charts.reliability_plot(bins, f"Reliability of {name}")
        drawings.append(Drawing(name, plot, f"ECE: {errors}"))
    return drawings


def under_corruption(robustness: RobustComparison) -> list[Drawing]:
    """The gains of all students, then the curves of each."""
    levels = ["clean", *map(str, SEVERITIES)]
    drawings = [intervals("Robust gain", robustness.gains)]
    shares = [m.by_severity for m in robustness.models if m]
    limits = np.min(shares), np.max(shares)  # of all charts, so that they have one scale
    y = charts.linear_axis(limits, 180, charts.TOP, charts.in_percent)
    for name, gain in robustness.gains.items():
        models = {"teacher": robustness.teacher, "baseline": gain.second, "distilled": gain.first}
        series = [(role, range(len(levels)), m.by_severity) for role, m in models.items() if m]
        title = f"Accuracy of {name} under corruption"
        plot = charts.curves(series, charts.named_axis(levels), y, title, "severity")
        note = f"Robust gain: {gain_with_interval(gain)}, {gain.verdict}."
        drawings.append(Drawing(name, plot, note))
    return drawings


def class_gains(comparison: Comparison) -> list[Drawing]:
    bars = {name: class_rows(gain, comparison) for name, gain in comparison.gains.items()}
    largest = max(0.01, *(abs(value) for rows in bars.values() for _, value, _ in rows))
    return [
        Drawing(name, charts.diverging_bars(rows, largest, f"Gain of {name} by class"))
        for name, rows in bars.items()
    ]


def class_rows(gain: PairedDifference, comparison: Comparison) -> list[tuple[str, float, str]]:
    """Class, gain and both accuracies: of all classes, or of the extremes of many."""
    accuracies = zip(
        comparison.class_names,
        gain.first.class_accuracy,
        gain.second.class_accuracy,
        strict=True,
    )
    rows = [
        (name, float(distilled - baseline), f"{percent(distilled)} and {percent(baseline)}")
        for name, distilled, baseline in accuracies
        if not np.isnan(distilled)
    ]
    if len(rows) <= MOST_CLASSES:
        return rows
    rows.sort(key=lambda row: -row[1])
    return [*rows[:EXTREMES], *rows[-EXTREMES:]]
