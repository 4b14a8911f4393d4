"""The charts of the page and what they show: from the comparison to `charts`."""

from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup

from pipeline.comparison.compare import Comparison, ModelMetrics, PairedDifference, pareto_front
from pipeline.comparison.measurement.corruptions import SEVERITIES
from pipeline.comparison.measurement.latency import DeviceSpeed
from pipeline.comparison.report import charts
from pipeline.comparison.report.numbers import percent
from pipeline.comparison.report.summary import gain_with_interval, verdict
from pipeline.comparison.robustness import RobustComparison, RobustGain

MOST_CLASSES = 20  # that a heat map or bars show one by one
EXTREMES = 8  # with more classes: the largest gains and losses, and pairs of classes


class Drawing(NamedTuple):
    """A chart with its title and caption."""

    title: str
    chart: Markup
    note: str = ""


def intervals(
    title: str, gains: Mapping[str, PairedDifference] | Mapping[str, RobustGain]
) -> Drawing:
    rows = [(name, g.gain, g.low, g.high, gain_with_interval(g)) for name, g in gains.items()]
    return Drawing(title, charts.interval_plot(rows, f"{title} by student", "points"))


def gain_and_cost(comparison: Comparison, speed: Mapping[str, DeviceSpeed]) -> list[Drawing]:
    """The gains, and accuracy against each cost."""
    drawings = [intervals("Gain", comparison.gains)]
    axes = {"parameters": attrgetter("parameters"), "MACs": attrgetter("macs"), **latencies(speed)}
    for axis_title, cost in axes.items():
        models = [m for m in comparison.models if cost(m) is not None]
        dots = [
            charts.Point(
                m.name, m.role, cost(m), m.accuracy, m.low, m.high, named=m.role != "baseline"
            )
            for m in models
        ]
        front = [(cost(m), m.accuracy) for m in pareto_front(models, cost)]
        title = f"Accuracy against {axis_title.removesuffix(', ms')}"
        drawings.append(Drawing(title, charts.scatter(dots, front, title, axis_title)))
    return drawings


def latencies(
    speed: Mapping[str, DeviceSpeed],
) -> dict[str, Callable[[ModelMetrics], float | None]]:
    """A network's latency in ms, by the title of the axis; None for a teacher without a network."""

    def latency(device: DeviceSpeed, model: ModelMetrics) -> float | None:
        network = device.teacher if model.role == "teacher" else device.students[model.name]
        return network and network.latency_ms

    device_names = {"cpu": "the CPU", "cuda": "the GPU"}
    return {
        f"latency on {device_names[device_type]}, ms": partial(latency, device)
        for device_type, device in speed.items()
    }


def training_curves(comparison: Comparison, curves: pd.DataFrame) -> list[Drawing]:
    drawings = []
    for name in comparison.gains:
        series = []
        for role in ("baseline", "distilled"):
            rows = curves[(curves["student"] == name) & (curves["role"] == role)]
            series.append((role, rows["epoch"].tolist(), rows["validation_accuracy"].tolist()))
        drawings.append(Drawing(name, charts.curves(series, f"Validation accuracy of {name}")))
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
    curves = {}
    for name, gain in robustness.gains.items():
        models = {
            "teacher": robustness.teacher,
            "baseline": gain.baseline,
            "distilled": gain.distilled,
        }
        curves[name] = [(r, [m.clean, *m.table.mean(0)]) for r, m in models.items() if m]
    shares = [share for series in curves.values() for _, values in series for share in values]
    limits, levels = (min(shares), max(shares)), ["clean", *map(str, SEVERITIES)]
    drawings = [intervals("Robust gain", robustness.gains)]
    for name, gain in robustness.gains.items():
        title = f"Accuracy of {name} under corruption"
        plot = charts.levels(curves[name], levels, limits, title, "severity")
        change = verdict(gain.gain, gain.low, gain.high)
        note = f"Robust gain: {gain_with_interval(gain)}, {change}."
        drawings.append(Drawing(name, plot, note))
    return drawings


def class_gains(comparison: Comparison) -> list[Drawing]:
    bars = {name: class_rows(gain, comparison) for name, gain in comparison.gains.items()}
    largest = max(0.01, *(abs(value) for rows in bars.values() for _, value, _ in rows))
    return [
        Drawing(name, charts.diverging_bars(rows, largest, f"Gain of {name} by class", "points"))
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
