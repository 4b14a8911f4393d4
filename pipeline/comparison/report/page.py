"""The report: one self-contained HTML page, without network and scripts."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from importlib.metadata import version
from operator import attrgetter
from typing import Any

import numpy as np
import pandas as pd
import yaml

from pipeline.comparison import metrics as measures
from pipeline.comparison.compare import Comparison, ModelMetrics, PairedDifference, pareto_front
from pipeline.comparison.measurement.latency import DeviceSpeed
from pipeline.comparison.report import charts
from pipeline.comparison.report.costs import Costs, cache_rows, speed_rows
from pipeline.comparison.report.costs import sentences as cost_sentences
from pipeline.comparison.report.html import (
    LEGEND,
    LEGEND_OF_TWO,
    card,
    drawing,
    grid,
    interval,
    paragraphs,
    picture,
    plain_table,
    section,
    table,
)
from pipeline.comparison.report.robustness import under_corruption
from pipeline.comparison.report.style import STYLE
from pipeline.comparison.report.summary import (
    compression,
    optional_percent,
    p_text,
    percent,
    points,
    sentences,
    verdict_of,
)

MOST_CLASSES = 20  # that a heat map or bars show one by one
EXTREMES = 8  # with more classes: the largest gains and losses, and pairs of classes
STRIP = 9  # images
VERSIONS = ("torch", "torchvision", "numpy", "h5py", "pillow")


@dataclass(frozen=True)
class Origin:
    """The parameters and inputs that the figures were made from."""

    params: Mapping[str, Any]  # all of params.yaml
    fingerprints: Mapping[str, str]


def html_report(
    comparison: Comparison,
    curves: pd.DataFrame,
    pixels_of: Callable[[int], np.ndarray],
    corrupted: Mapping[str, np.ndarray],
    origin: Origin,
    costs: Costs,
) -> str:
    """Render the page.

    Args:
        curves: student, role, epoch, validation_accuracy of every epoch.
        pixels_of: the pixels [C, H, W] uint8 of a test image, by its number.
        corrupted: the pixels of one test image, by corruption.
    """
    count = len(comparison.labels)
    summary = sentences(comparison, *cost_sentences(costs))
    body = [
        "<header><h1>Comparison of distilled students with baselines</h1>",
        f'<p class="muted">{len(comparison.gains)} students, each distilled and as a baseline, '
        f"on {count:,} test images of {len(comparison.class_names):,} classes</p></header>",
        f'<section class="card summary">{paragraphs(summary)}</section>',
        section(
            "Students",
            "Gain: accuracy of the distilled student minus that of its baseline, the same network "
            "trained without the teacher, in percentage points, with its 95 % interval. Retention: "
            "accuracy of the distilled student divided by the teacher's.",
            card(students_table(comparison)),
        ),
        section(
            "Gain, accuracy and cost",
            COST_NOTE,
            LEGEND,
            grid(cost_drawings(comparison, costs), "wide"),
        ),
        section("Speed", SPEED_NOTE, f'<div class="stack">{"".join(speed_tables(costs))}</div>'),
        section("Teacher passes made and saved", CACHE_NOTE, card(plain_table(cache_rows(costs))))
        if costs.economics
        else "",
        section(
            "Training curves",
            "Accuracy on the validation images. The dot marks the best epoch.",
            LEGEND_OF_TWO,
            grid(curve_drawings(comparison, curves)),
        ),
        section(
            "Calibration",
            CONFIDENCE_NOTE,
            LEGEND,
            grid(reliabilities(comparison), "small"),
        ),
        under_corruption(comparison, corrupted),
        section("Accuracy by class", class_note(comparison), grid(class_drawings(comparison))),
        section(
            "Agreement with the teacher by class",
            "Test images by the teacher's class and the student's. On the diagonal they agree.",
            grid(confusions(comparison)),
        ),
        section(
            "Test images on which they disagree",
            "Images that teacher, student and baseline do not all predict alike, by the student's "
            "KL divergence from the teacher.",
            f'<div class="stack">{"".join(strips(comparison, pixels_of))}</div>',
        ),
        section("Students compared", PAIRS_NOTE, card(pairs_table(comparison.pairs)))
        if comparison.pairs
        else "",
        section("Every measure", MEASURES_NOTE, card(measures_table(comparison))),
        section("What was run", "", card(origin_of(origin), "long")),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a class or a student is called, the page can load nothing and run nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>What distillation bought</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


COST_NOTE = (
    "Dots are test accuracies with their 95 % intervals. The dashed line is the Pareto front: no "
    "network is both cheaper and more accurate than one on it."
)
SPEED_NOTE = (
    "From an image in memory to its logits, in float32, all networks in turn. Speed-up: the "
    "teacher's time for one image over the network's, median of rounds, with its 95 % interval. A "
    "baseline is the same network as its student. These figures are a clock's: they differ from "
    "run to run, and from machine to machine."
)
CACHE_NOTE = (
    "A pass is one image through the teacher. It takes as long for the cache as in a training "
    "step, so the number of passes decides. benchmarks/README.md compares the cost of writing and "
    "reading the store with that of a forward pass."
)
CONFIDENCE_NOTE = (
    "Accuracy of the predictions with a certain confidence. Below the diagonal a network is "
    "overconfident; a dot's area is its share of the images."
)
PAIRS_NOTE = (
    "Accuracy of the first distilled student minus that of the second. McNemar's exact test, its "
    "p-values adjusted for the number of pairs (Holm)."
)
MEASURES_NOTE = (
    "NLL: negative log-likelihood of the label, and KL(teacher || model), means in nats. ECE: "
    "expected calibration error, 15 bins; scaled: after dividing the logits by the temperature T "
    "that minimises the NLL of the validation images (-: every validation image is classified "
    "correctly, so NLL has no minimum). Agreement: share of test images with the "
    "teacher's class."
)


def verdict_mark(difference: PairedDifference) -> str:
    words = verdict_of(difference)
    return f'<span class="verdict {words.replace(" ", "-")}">{words}</span>'


def students_table(comparison: Comparison) -> str:
    teacher = comparison.teacher
    rows = [
        {
            "student": escape(name),
            "distilled": percent(gain.first.accuracy),
            "baseline": percent(gain.second.accuracy),
            "gain": f"{points(gain.gain)} {interval(points(gain.low), points(gain.high))}",
            "verdict": verdict_mark(gain),
            "retention": percent(gain.first.accuracy / teacher.accuracy),
            "agreement": percent(gain.first.agreement),
            "parameters": f"{gain.first.parameters:,} "
            + fewer(teacher.parameters, gain.first.parameters),
            "MACs": f"{charts.si3(gain.first.macs)} " + fewer(teacher.macs, gain.first.macs),
        }
        for name, gain in comparison.gains.items()
    ]
    return table(rows)


def fewer(teachers: int | None, students: int) -> str:
    return "" if teachers is None else f"<small>{compression(teachers, students)} fewer</small>"


def in_three(number: int | None) -> str:
    return "-" if number is None else charts.si3(number)


def measures_table(comparison: Comparison) -> str:
    rows = [
        {
            "network": f"{escape(m.name)} <small>{'' if m.role == 'teacher' else m.role}</small>",
            "accuracy": f"{percent(m.accuracy)} "
            f"{interval(f'{100 * m.low:.2f}', f'{100 * m.high:.2f}')}",
            "top-5": percent(m.top5),
            "NLL": f"{m.nll:.4f}",
            "ECE": percent(m.ece),
            "ECE, scaled": optional_percent(m.ece_scaled),
            "T": "-" if m.temperature is None else f"{m.temperature:.3f}",
            "macro-F1": percent(m.macro_f1),
            "agreement": percent(m.agreement),
            "KL": f"{m.kl:.4f}",
            "parameters": in_three(m.parameters),
            "MACs": in_three(m.macs),
            "size": in_three(m.size_bytes) + ("" if m.size_bytes is None else "B"),
        }
        for m in comparison.models
    ]
    return table(rows, "dense")


def pairs_table(pairs: Sequence[PairedDifference]) -> str:
    rows = [
        {
            "pair": f"{escape(pair.first.name)} <small>minus</small> {escape(pair.second.name)}",
            "difference": f"{points(pair.gain)} {interval(points(pair.low), points(pair.high))}",
            "McNemar": p_text(pair.p_value),
            "verdict": verdict_mark(pair).replace("gain<", "better<").replace("loss<", "worse<"),
        }
        for pair in pairs
    ]
    return table(rows)


def describe_gain(gain: PairedDifference) -> str:
    return f"{points(gain.gain)} ({points(gain.low)} to {points(gain.high)})"


def speed_tables(costs: Costs) -> list[str]:
    return [
        drawing(f"{device.label}, torch {device.torch}", plain_table(speed_rows(device)))
        for device in costs.speed.values()
    ]


def latencies(costs: Costs) -> dict[str, Callable[[ModelMetrics], float | None]]:
    """By the title of an axis: a network's latency in ms; None for a teacher without one."""

    def latency(device: DeviceSpeed, model: ModelMetrics) -> float | None:
        speed = device.teacher if model.role == "teacher" else device.students[model.name]
        return speed and speed.latency_ms

    names = {"cpu": "the CPU", "cuda": "the GPU"}
    return {
        f"latency on {names[device_type]}, ms": partial(latency, device)
        for device_type, device in costs.speed.items()
    }


def cost_drawings(comparison: Comparison, costs: Costs) -> list[str]:
    whiskers = [
        charts.Whisker(name, gain.gain, gain.low, gain.high, describe_gain(gain), "distilled")
        for name, gain in comparison.gains.items()
    ]
    figures = [drawing("Gain", charts.interval_plot(whiskers, "Gain by student", "points"))]
    axes = {"parameters": attrgetter("parameters"), "MACs": attrgetter("macs"), **latencies(costs)}
    for title, cost in axes.items():
        models = [m for m in comparison.models if cost(m) is not None]
        dots = [
            charts.Point(
                m.name,
                m.role,
                cost(m),
                m.accuracy,
                m.low,
                m.high,
                named=m.role != "baseline",
            )
            for m in models
        ]
        front = [(cost(m), m.accuracy) for m in pareto_front(models, cost)]
        name = f"Accuracy against {title.removesuffix(', ms')}"
        figures.append(drawing(name, charts.scatter(dots, front, name, title)))
    return figures


def curve_drawings(comparison: Comparison, curves: pd.DataFrame) -> list[str]:
    figures = []
    for name in comparison.gains:
        series = []
        for role in ("baseline", "distilled"):
            rows = curves[(curves["student"] == name) & (curves["role"] == role)]
            series.append((role, rows["epoch"].tolist(), rows["validation_accuracy"].tolist()))
        figures.append(drawing(name, charts.curves(series, f"Validation accuracy of {name}")))
    return figures


def reliabilities(comparison: Comparison) -> list[str]:
    def describe(m: ModelMetrics) -> str:
        return f"{m.role} {percent(m.ece)}"

    groups = {"teacher": [comparison.teacher]} | {
        name: [gain.second, gain.first] for name, gain in comparison.gains.items()
    }
    return [
        drawing(
            name,
            charts.reliability_plot(
                [(m.role, m.reliability) for m in models], f"Reliability of {name}"
            ),
            f"ECE: {', '.join(describe(m) for m in reversed(models))}",
        )
        for name, models in groups.items()
    ]


def class_note(comparison: Comparison) -> str:
    counts = np.bincount(comparison.labels, minlength=len(comparison.class_names))
    note = (
        "Accuracy of the distilled student less that of its baseline, in points. A class has "
        f"{counts.min():,} to {counts.max():,} test images; one is "
        f"{100 / max(1, counts.max()):.2g} points or more. To the right the distilled student is "
        "better, to the left its baseline."
    )
    if len(comparison.class_names) > MOST_CLASSES:
        note += f" The {EXTREMES} most gained and the {EXTREMES} most lost classes; all are in "
        note += "class_accuracy.csv beside this page."
    return note


def class_drawings(comparison: Comparison) -> list[str]:
    rows_of = {}
    for name, gain in comparison.gains.items():
        rows = [
            (label, float(first - second), f"{percent(first)} and {percent(second)}")
            for label, first, second in zip(
                comparison.class_names,
                gain.first.class_accuracy,
                gain.second.class_accuracy,
                strict=True,
            )
            if not np.isnan(first)
        ]
        if len(rows) > MOST_CLASSES:
            rows.sort(key=lambda row: -row[1])
            rows = [*rows[:EXTREMES], *rows[-EXTREMES:]]
        rows_of[name] = rows
    largest = max(0.01, *(abs(value) for rows in rows_of.values() for _, value, _ in rows))
    return [
        drawing(name, charts.diverging_bars(rows, largest, f"Gain of {name} by class", "points"))
        for name, rows in rows_of.items()
    ]


def confusions(comparison: Comparison) -> list[str]:
    names = comparison.class_names
    figures = []
    for name, gain in comparison.gains.items():
        decisions = comparison.teacher.decisions, gain.first.decisions
        agreed = measures.confusion(*decisions, len(names))
        right = comparison.teacher.correct, gain.first.correct
        note = (
            f"Both right {(right[0] & right[1]).sum():,}, the teacher alone "
            f"{(right[0] & ~right[1]).sum():,}, the student alone "
            f"{(~right[0] & right[1]).sum():,}, neither {(~right[0] & ~right[1]).sum():,}."
        )
        if len(names) <= MOST_CLASSES:
            content = charts.heat_map(agreed, names, f"Teacher and {name}", "teacher", "student")
        else:
            content = frequent_disagreements(agreed, names)
        figures.append(drawing(name, content, note))
    return figures


def frequent_disagreements(agreed: np.ndarray, names: Sequence[str]) -> str:
    off = agreed - np.diag(agreed.diagonal())
    largest = np.argsort(-off, axis=None, kind="stable")[:EXTREMES]
    rows = [
        {"teacher": escape(names[r]), "student": escape(names[c]), "images": f"{off[r, c]:,}"}
        for r, c in zip(*np.unravel_index(largest, off.shape), strict=True)
        if off[r, c]
    ]
    return table(rows, "dense") if rows else "<p>They agree on every test image.</p>"


def strips(comparison: Comparison, pixels_of: Callable[[int], np.ndarray]) -> list[str]:
    names, teacher = comparison.class_names, comparison.teacher
    parts = []
    for student, gain in comparison.gains.items():
        voices = {"teacher": teacher, "student": gain.first, "baseline": gain.second}
        decisions = np.stack([model.decisions for model in voices.values()])
        (split,) = np.nonzero((decisions != decisions[0]).any(0))
        order = split[np.argsort(-gain.first.divergences[split], kind="stable")]
        cells = []
        for i in order[:STRIP]:
            label = comparison.labels[i]
            predictions = "".join(
                f'{role} <span class="{"right" if model.correct[i] else "wrong"}">'
                f"{escape(charts.shortened(names[model.decisions[i]], 20))}"
                f"{' ✓' if model.correct[i] else ' ✗'}</span><br>"
                for role, model in voices.items()
            )
            cells.append(
                f"<figure>{picture(pixels_of(i), f'test image {i}, {names[label]}')}"
                f"<figcaption><b>{escape(charts.shortened(names[label], 20))}</b><br>{predictions}"
                "</figcaption></figure>"
            )
        share = f"{len(split):,} of {len(comparison.labels):,} images"
        strip = (
            f'<div class="strip">{"".join(cells)}</div>'
            if cells
            else "<p>They agree on every image.</p>"
        )
        parts.append(
            f'<div class="card"><h3>{escape(student)} <span class="muted">{share}</span></h3>'
            f"{strip}</div>"
        )
    return parts


def origin_of(origin: Origin) -> str:
    facts = {
        **{f"{name} fingerprint": value for name, value in origin.fingerprints.items()},
        "Python": platform.python_version(),
        **{name: version(name) for name in VERSIONS},
    }
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    params = yaml.safe_dump(dict(origin.params), sort_keys=False, allow_unicode=True)
    return (
        f"<dl>{items}</dl><details open><summary>params.yaml</summary>"
        f"<pre>{escape(params)}</pre></details>"
    )
