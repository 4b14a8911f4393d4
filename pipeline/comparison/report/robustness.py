"""The section on corrupted images."""

from collections.abc import Mapping
from html import escape

import numpy as np

from pipeline.comparison.compare import Comparison
from pipeline.comparison.measurement.corruptions import CORRUPTIONS, SEVERITIES
from pipeline.comparison.report import charts
from pipeline.comparison.report.html import LEGEND, card, drawing, grid, picture, section, table
from pipeline.comparison.report.numbers import join_and, percent
from pipeline.comparison.report.summary import gain_with_interval, verdict
from pipeline.comparison.robustness import RobustComparison

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
        charts.Whisker(name, gain.gain, gain.low, gain.high, gain_with_interval(gain), "distilled")
        for name, gain in robustness.gains.items()
    ]
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
    limits, levels = (min(shares), max(shares)), ["clean", *map(str, SEVERITIES)]
    figures = [
        drawing("Robust gain", charts.interval_plot(whiskers, "Robust gain by student", "points"))
    ]
    for name, gain in robustness.gains.items():
        title = f"Accuracy of {name} under corruption"
        plot = charts.levels(curves[name], levels, limits, title, "severity")
        change = verdict(gain.gain, gain.low, gain.high)
        caption = f"Robust gain: {gain_with_interval(gain)}, {change}."
        figures.append(drawing(name, plot, caption))
    return figures


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
                "relative": percent(robust.relative),
                "clean": percent(robust.clean),
                **dict(by_corruption),
            }
        )
    return table(rows, "dense")
