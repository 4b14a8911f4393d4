"""The report's section on corrupted images."""

from collections.abc import Mapping
from html import escape

import numpy as np

from pipeline import charts
from pipeline.comparison import Comparison
from pipeline.corruptions import CORRUPTIONS, SEVERITIES
from pipeline.report_parts import (
    LEGEND,
    card,
    drawing,
    grid,
    interval,
    picture,
    section,
    table,
    verdict_mark,
)
from pipeline.robust_accuracy import RobustComparison, RobustGain, Robustness
from pipeline.summary import DECIDED_BY_INTERVAL, optional_percent, percent, points, verdict

WORDS = {name: name.upper() if name == "jpeg" else name for name in CORRUPTIONS}


def under_corruption(comparison: Comparison, pictures: Mapping[str, np.ndarray]) -> str:
    """The section; nothing where no network was shown corrupted images.

    Args:
        pictures: [C, H, W] uint8 by what each is called.
    """
    robustness = comparison.robustness
    if robustness is None:
        return ""
    strip = "".join(
        f"<figure>{picture(pixels, name)}<figcaption>{escape(name)}</figcaption></figure>"
        for name, pixels in pictures.items()
    )
    return section(
        "Under corruption",
        f"Accuracy on {robustness.images:,} test images under {len(CORRUPTIONS)} common "
        f"corruptions at severities {listed_severities()} of 5. Robust accuracy is the mean over "
        "all of them; relative, its share of the accuracy on the same images, clean. The 95 % "
        "interval alone decides whether a gain is more than noise.",
        LEGEND,
        grid(drawings(robustness)),
        '<div class="stack">'
        + card(robust_table(comparison, robustness))
        + card(f'<div class="strip">{strip}</div>')
        + "</div>",
    )


def listed_severities() -> str:
    *most, last = map(str, SEVERITIES)
    return f"{', '.join(most)} and {last}"


def drawings(robustness: RobustComparison) -> list[str]:
    """All gains, then a drawing for each student."""
    whiskers = [
        charts.Whisker(name, gain.gain, gain.low, gain.high, told_gain(gain), "distilled")
        for name, gain in robustness.gains.items()
    ]
    figures = [
        drawing("Robust gain", charts.interval_plot(whiskers, "Robust gain by student", "points"))
    ]
    names = ["clean", *map(str, SEVERITIES)]
    for name, gain in robustness.gains.items():
        voices = {
            "teacher": robustness.teacher,
            "baseline": gain.baseline,
            "distilled": gain.distilled,
        }
        series = [
            (role, [model.clean, *model.table.mean(0)])
            for role, model in voices.items()
            if model is not None
        ]
        figures.append(
            drawing(name, charts.levels(series, names, f"Accuracy of {name} by severity"))
        )
    return figures


def told_gain(gain: RobustGain) -> str:
    return f"{points(gain.gain)} ({points(gain.low)} to {points(gain.high)})"


def robust_table(comparison: Comparison, robustness: RobustComparison) -> str:
    """One row for each network that was shown corrupted images."""
    rows = []
    for model in comparison.models:
        found = robustness.of(model.name, model.role)
        if found is None:
            continue
        role = "" if model.role == "teacher" else model.role
        gain = robustness.gains[model.name] if model.role == "distilled" else None
        rows.append(
            {
                "network": f"{escape(model.name)} <small>{role}</small>",
                "robust accuracy": percent(found.accuracy),
                "gain": gain_cell(gain),
                "relative": optional_percent(found.relative),
                "clean": percent(found.clean),
            }
            | by_corruption(found)
        )
    return table(rows, "dense")


def by_corruption(model: Robustness) -> dict[str, str]:
    return {
        WORDS[name]: percent(accuracy)
        for name, accuracy in zip(CORRUPTIONS, model.table.mean(1), strict=True)
    }


def gain_cell(gain: RobustGain | None) -> str:
    if gain is None:
        return "-"
    words = verdict(gain.gain, gain.low, gain.high, DECIDED_BY_INTERVAL)
    return (
        f"{points(gain.gain)} {interval(points(gain.low), points(gain.high))} {verdict_mark(words)}"
    )
