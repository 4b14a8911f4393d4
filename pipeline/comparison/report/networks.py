"""The sections on the networks as wholes: gains, metrics, costs, training and calibration."""

from collections.abc import Callable
from functools import partial
from html import escape
from operator import attrgetter

import pandas as pd

from pipeline.comparison.compare import Comparison, ModelMetrics, PairedDifference, pareto_front
from pipeline.comparison.measurement.latency import DeviceSpeed
from pipeline.comparison.report import charts
from pipeline.comparison.report.costs import Costs, cache_rows, speed_rows
from pipeline.comparison.report.html import (
    LEGEND,
    LEGEND_OF_TWO,
    card,
    drawing,
    grid,
    interval,
    plain_table,
    section,
    table,
)
from pipeline.comparison.report.numbers import compression, p_text, percent, points, three_digits
from pipeline.comparison.report.summary import gain_with_interval, verdict_of

STUDENTS_NOTE = (
    "Gain: accuracy of the distilled student minus that of its baseline, the same network trained "
    "without the teacher, in percentage points, with its 95 % interval. Retention: accuracy of the "
    "distilled student divided by the teacher's."
)
COST_NOTE = (
    "Dots are test accuracies with their 95 % intervals. The dashed line is the Pareto front: no "
    "network is both cheaper and more accurate than one on it."
)
SPEED_NOTE = (
    "Time from an image in memory to its logits, in float32, with all networks measured in turn. "
    "Speed-up: the teacher's time for one image divided by the network's, median of rounds, with "
    "its 95 % interval. A baseline is as fast as its student. Times differ from run to run and "
    "from machine to machine."
)
CACHE_NOTE = (
    "A pass is one image through the teacher. It takes as long for the cache as in a training "
    "step, so the number of passes decides. benchmarks/README.md compares the cost of writing and "
    "reading the store with that of a forward pass."
)
CALIBRATION_NOTE = (
    "Accuracy of the predictions with a certain confidence. Below the diagonal a network is "
    "overconfident. A dot's area is its share of the images."
)
PAIRS_NOTE = (
    "Accuracy of the first distilled student minus that of the second. McNemar's exact test, with "
    "p-values adjusted for the number of pairs (Holm)."
)
METRICS_NOTE = (
    "NLL: negative log-likelihood of the label, and KL(teacher || model), means in nats. ECE: "
    "expected calibration error, 15 bins; scaled: after dividing the logits by the temperature T "
    "that minimises the NLL of the validation images (-: every validation image is classified "
    "correctly, so NLL has no minimum). Agreement: share of test images with the teacher's class."
)


def students(comparison: Comparison) -> str:
    teacher = comparison.teacher

    def cost(number: str, teachers: int | None, students: int) -> str:
        fewer = compression(teachers, students)
        return number if teachers is None else f"{number} <small>{fewer} fewer</small>"

    rows = [
        {
            "student": escape(name),
            "distilled": percent(gain.first.accuracy),
            "baseline": percent(gain.second.accuracy),
            "gain": f"{points(gain.gain)} {interval(points(gain.low), points(gain.high))}",
            "verdict": verdict_mark(gain),
            "retention": percent(gain.first.accuracy / teacher.accuracy),
            "agreement": percent(gain.first.agreement),
            "parameters": cost(
                f"{gain.first.parameters:,}", teacher.parameters, gain.first.parameters
            ),
            "MACs": cost(charts.si3(gain.first.macs), teacher.macs, gain.first.macs),
        }
        for name, gain in comparison.gains.items()
    ]
    return section("Students", STUDENTS_NOTE, card(table(rows)))


def verdict_mark(difference: PairedDifference) -> str:
    verdict = verdict_of(difference)
    return f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>'


def gain_and_cost(comparison: Comparison, costs: Costs) -> str:
    """The gains, and accuracy against each cost."""
    whiskers = [
        charts.Whisker(name, gain.gain, gain.low, gain.high, gain_with_interval(gain), "distilled")
        for name, gain in comparison.gains.items()
    ]
    figures = [drawing("Gain", charts.interval_plot(whiskers, "Gain by student", "points"))]
    axes = {"parameters": attrgetter("parameters"), "MACs": attrgetter("macs"), **latencies(costs)}
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
        figures.append(drawing(title, charts.scatter(dots, front, title, axis_title)))
    return section("Gain, accuracy and cost", COST_NOTE, LEGEND, grid(figures, "wide"))


def latencies(costs: Costs) -> dict[str, Callable[[ModelMetrics], float | None]]:
    """A network's latency in ms, by the title of the axis; None for a teacher without a network."""

    def latency(device: DeviceSpeed, model: ModelMetrics) -> float | None:
        network = device.teacher if model.role == "teacher" else device.students[model.name]
        return network and network.latency_ms

    device_names = {"cpu": "the CPU", "cuda": "the GPU"}
    return {
        f"latency on {device_names[device_type]}, ms": partial(latency, device)
        for device_type, device in costs.speed.items()
    }


def speed(costs: Costs) -> str:
    tables = [
        drawing(f"{device.label}, torch {device.torch}", plain_table(speed_rows(device)))
        for device in costs.speed.values()
    ]
    return section("Speed", SPEED_NOTE, f'<div class="stack">{"".join(tables)}</div>')


def cache(costs: Costs) -> str:
    if costs.economics is None:
        return ""
    return section(
        "Teacher passes made and saved", CACHE_NOTE, card(plain_table(cache_rows(costs)))
    )


def training_curves(comparison: Comparison, curves: pd.DataFrame) -> str:
    figures = []
    for name in comparison.gains:
        series = []
        for role in ("baseline", "distilled"):
            rows = curves[(curves["student"] == name) & (curves["role"] == role)]
            series.append((role, rows["epoch"].tolist(), rows["validation_accuracy"].tolist()))
        figures.append(drawing(name, charts.curves(series, f"Validation accuracy of {name}")))
    note = "Accuracy on the validation images. The dot marks the best epoch."
    return section("Training curves", note, LEGEND_OF_TWO, grid(figures))


def calibration(comparison: Comparison) -> str:
    students = {name: [gain.second, gain.first] for name, gain in comparison.gains.items()}
    figures = []
    for name, models in ({"teacher": [comparison.teacher]} | students).items():
        bins = [(model.role, model.reliability) for model in models]
        errors = ", ".join(f"{model.role} {percent(model.ece)}" for model in reversed(models))
        plot = charts.reliability_plot(bins, f"Reliability of {name}")
        figures.append(drawing(name, plot, f"ECE: {errors}"))
    return section("Calibration", CALIBRATION_NOTE, LEGEND, grid(figures, "small"))


def pairs(comparison: Comparison) -> str:
    rows = [
        {
            "pair": f"{escape(pair.first.name)} <small>minus</small> {escape(pair.second.name)}",
            "difference": f"{points(pair.gain)} {interval(points(pair.low), points(pair.high))}",
            "McNemar": p_text(pair.p_value),
            "verdict": verdict_mark(pair).replace("gain<", "better<").replace("loss<", "worse<"),
        }
        for pair in comparison.pairs
    ]
    return section("Students compared", PAIRS_NOTE, card(table(rows))) if rows else ""


def all_metrics(comparison: Comparison) -> str:
    rows = [
        {
            "network": f"{escape(m.name)} <small>{'' if m.role == 'teacher' else m.role}</small>",
            "accuracy": f"{percent(m.accuracy)} "
            f"{interval(f'{100 * m.low:.2f}', f'{100 * m.high:.2f}')}",
            "top-5": percent(m.top5),
            "NLL": f"{m.nll:.4f}",
            "ECE": percent(m.ece),
            "ECE, scaled": percent(m.ece_scaled),
            "T": "-" if m.temperature is None else f"{m.temperature:.3f}",
            "macro-F1": percent(m.macro_f1),
            "agreement": percent(m.agreement),
            "KL": f"{m.kl:.4f}",
            "parameters": three_digits(m.parameters),
            "MACs": three_digits(m.macs),
            "size": three_digits(m.size_bytes, "B"),
        }
        for m in comparison.models
    ]
    return section("All metrics", METRICS_NOTE, card(table(rows, "dense")))
