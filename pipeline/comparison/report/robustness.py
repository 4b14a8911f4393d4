"""The section on corrupted images."""

from collections.abc import Mapping
from html import escape

import numpy as np

from pipeline.comparison.compare import Comparison
from pipeline.comparison.measurement.corruptions import CORRUPTIONS, SEVERITIES
from pipeline.comparison.report import charts
from pipeline.comparison.report.html import LEGEND, card, drawing, grid, picture, section, table
from pipeline.comparison.report.summary import (
    DECIDED_BY_INTERVAL,
    join_and,
    optional_percent,
    percent,
    points,
    verdict,
)
from pipeline.comparison.robustness import RobustComparison, RobustGain

SHOWN_SEVERITY = 3  # of the example images
NAMES = {name: name.upper() if name == "jpeg" else name for name in CORRUPTIONS}


def under_corruption(comparison: Comparison, pictures: Mapping[str, np.ndarray]) -> str:
    """The section; empty if robustness was not measured.

    Args:
        pictures: one test image [C, H, W] uint8 by corruption.
    """
    robustness = comparison.robustness
    if robustness is None:
        return ""
    note = (
        f"Accuracy on {robustness.images:,} test images under {len(CORRUPTIONS)} common "
        f"corruptions at severities {join_and(map(str, SEVERITIES))} of 5; the curves are means "
        "over the corruptions. Robust accuracy is the mean over all corruptions and severities; "
        "relative: divided by the accuracy on the same images without corruption. The 95 % "
        "interval alone decides whether a gain is significant."
    )
    strip = "".join(
        f"<figure>{picture(pixels, NAMES[name])}<figcaption>{NAMES[name]}</figcaption></figure>"
        for name, pixels in pictures.items()
    )
    cards = [
        card(robust_table(comparison, robustness)),
        card(f'<h3>A test image at severity {SHOWN_SEVERITY}</h3><div class="strip">{strip}</div>'),
    ]
    return section(
        "Under corruption",
        note,
        LEGEND,
        grid(drawings(robustness)),
        f'<div class="stack">{"".join(cards)}</div>',
    )


def drawings(robustness: RobustComparison) -> list[str]:
    """The gains of all students, then the curves of each."""
    whiskers = [
        charts.Whisker(name, gain.gain, gain.low, gain.high, describe_gain(gain), "distilled")
        for name, gain in robustness.gains.items()
    ]
    names = ["clean", *map(str, SEVERITIES)]
    curves = {
        name: [
            (role, [model.clean, *model.table.mean(0)])
            for role, model in (
                ("teacher", robustness.teacher),
                ("baseline", gain.baseline),
                ("distilled", gain.distilled),
            )
            if model is not None
        ]
        for name, gain in robustness.gains.items()
    }
    shares = [share for series in curves.values() for _, values in series for share in values]
    span = min(shares), max(shares)
    return [
        drawing("Robust gain", charts.interval_plot(whiskers, "Robust gain by student", "points")),
        *(
            drawing(
                name,
                charts.levels(
                    series, names, span, f"Accuracy of {name} under corruption", "severity"
                ),
                f"Robust gain: {describe_gain(gain)}, {verdict_of(gain)}.",
            )
            for (name, series), gain in zip(curves.items(), robustness.gains.values(), strict=True)
        ),
    ]


def describe_gain(gain: RobustGain) -> str:
    return f"{points(gain.gain)} ({points(gain.low)} to {points(gain.high)})"


def verdict_of(gain: RobustGain) -> str:
    return verdict(gain.gain, gain.low, gain.high, DECIDED_BY_INTERVAL)


def robust_table(comparison: Comparison, robustness: RobustComparison) -> str:
    """One row per network that was measured."""
    rows = []
    for model in comparison.models:
        robust = robustness.of(model.name, model.role)
        if robust is None:
            continue
        role = "" if model.role == "teacher" else model.role
        by_corruption = zip(NAMES.values(), map(percent, robust.table.mean(1)), strict=True)
        rows.append(
            {
                "network": f"{escape(model.name)} <small>{role}</small>",
                "robust accuracy": percent(robust.accuracy),
                "relative": optional_percent(robust.relative),
                "clean": percent(robust.clean),
                **dict(by_corruption),
            }
        )
    return table(rows, "dense")
