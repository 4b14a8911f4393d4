"""The charts of the page and what they show: from the comparison to `charts`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from pipeline.comparison.compare import Comparison, ModelMetrics
from pipeline.comparison.figures import MOST_CLASSES
from pipeline.comparison.measurement.corruptions import SEVERITIES
from pipeline.comparison.measurement.latency import EngineSpeed, file_label
from pipeline.comparison.measurement.statistics import Gain, PairedDifference
from pipeline.comparison.report import charts
from pipeline.comparison.report.costs import setting_label
from pipeline.comparison.report.numbers import percent
from pipeline.comparison.report.summary import gain_with_interval
from pipeline.comparison.report.tables import percent_bounds
from pipeline.comparison.robustness import RobustComparison
from pipeline.comparison.seeds import SeedComparison

EXTREMES = 8  # with more classes: the largest gains and losses, and pairs of classes


class Drawing(NamedTuple):
    """A chart with its title and caption."""

    title: str
    chart: Markup
    note: str = ""


def intervals(
    title: str, gains: Mapping[str, Gain], seeds: Mapping[str, SeedComparison] | None = None
) -> Drawing:
    """The gain of each student, with those of its seeds, if there are several."""
    rows = [(name, g.gain, g.low, g.high, gain_with_interval(g)) for name, g in gains.items()]
    dots = {name: dict(zip(s.seeds, s.gains, strict=True)) for name, s in (seeds or {}).items()}
    note = "The small dots are the gains of single seeds." if dots else ""
    return Drawing(title, charts.interval_plot(rows, title, dots), note)


def gain_and_cost(comparison: Comparison, speed: Mapping[str, EngineSpeed]) -> list[Drawing]:
    """The gains, and accuracy against each cost. A network without that cost is left out, such as a
    teacher without a file; int8 files differ from float32 files in bytes and latency alone."""
    float32 = [m for m in comparison.models if m.precision == "float32"]
    with_int8 = comparison.models
    drawings = [
        intervals("Gain by student", comparison.gains, comparison.seeds),
        accuracy_against("parameters", float32, [m.parameters for m in float32]),
        accuracy_against("MACs", float32, [m.macs for m in float32]),
        accuracy_against("bytes of the file", with_int8, [m.size_bytes for m in with_int8]),
    ]
    for setting, place in SHOWN_SETTINGS.items():
        if measured := speed.get(setting):
            models = float32 if setting == "pytorch_cuda" else with_int8
            latencies = [latency_ms(model, measured) for model in models]
            note = f"One image in {setting_label(measured)}"
            axis_title = f"latency {place}, ms"
            drawings.append(accuracy_against(axis_title, models, latencies, note))
    return drawings


#: Of metrics/speed.json, with the words of their charts.
SHOWN_SETTINGS = {
    "onnxruntime_1_thread": "in one thread",
    "onnxruntime_cuda": "on the GPU",
    "pytorch_cuda": "in PyTorch on the GPU",
}


def latency_ms(model: ModelMetrics, speed: EngineSpeed) -> float | None:
    """A baseline has the latency of its student, whose graph it shares."""
    is_teacher = model.role == "teacher"
    figures = speed.teacher if is_teacher else speed.find(model.name, model.precision)
    return figures and figures.latency_ms


def accuracy_against(
    axis_title: str, models: Sequence[ModelMetrics], costs: Sequence[float | None], note: str = ""
) -> Drawing:
    points = [
        charts.Point(file_label(m.name, m.precision), m.role, cost, m.accuracy, m.low, m.high)
        for m, cost in zip(models, costs, strict=True)
        if cost  # neither unknown nor 0, which a logarithmic axis has not
    ]
    title = f"Accuracy against {axis_title.removesuffix(', ms')}"
    return Drawing(title, charts.scatter(points, title, axis_title), note)


def calibration(comparison: Comparison) -> list[Drawing]:
    networks = {"teacher": [comparison.teacher]}
    networks |= {name: [gain.second, gain.first] for name, gain in comparison.gains.items()}
    drawings = []
    for name, models in networks.items():
        bins = [(model.role, model.reliability) for model in models]
        errors = ", ".join(f"{model.role} {percent(model.ece)}" for model in reversed(models))
        if name in comparison.intervals:
            low, high = comparison.intervals[name].ece
            of = [distilled.ece for distilled, _ in comparison.pairs_by_seed(name)]
            mean = f"mean of {len(of)} seeds {percent(np.mean(of))}, " if len(of) > 1 else ""
            errors += f" (distilled, {mean}95% interval: {percent_bounds(low, high)})"
        plot = charts.reliability_plot(bins, f"Reliability of {name}")
        drawings.append(Drawing(name, plot, f"ECE: {errors}"))
    return drawings


def under_corruption(robustness: RobustComparison) -> list[Drawing]:
    """The gains of all students, then the curves of each."""
    levels = ["clean", *map(str, SEVERITIES)]
    drawings = [intervals("Robust gain by student", robustness.gains)]
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
