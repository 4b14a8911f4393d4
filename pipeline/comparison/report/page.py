"""The report: one self-contained HTML page, without network and scripts."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import yaml

from pipeline.comparison.compare import Comparison
from pipeline.comparison.report.classes import agreement, class_accuracy, disagreements
from pipeline.comparison.report.costs import Costs, cost_sentences
from pipeline.comparison.report.html import card, paragraphs, section
from pipeline.comparison.report.networks import (
    all_metrics,
    cache,
    calibration,
    gain_and_cost,
    pairs,
    speed,
    students,
    training_curves,
)
from pipeline.comparison.report.robustness import under_corruption
from pipeline.comparison.report.style import STYLE
from pipeline.comparison.report.summary import sentences

TITLE = "Comparison of distilled students with baselines"
VERSIONS = ("torch", "torchvision", "numpy", "h5py", "pillow")
#: The policy lets the page load nothing and run nothing, whatever a class or a student is called.
HEAD = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data:">
<title>{TITLE}</title>
<style>{STYLE}</style>
</head>
<body>
"""


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
    sections = [
        header(comparison, costs),
        students(comparison),
        gain_and_cost(comparison, costs),
        speed(costs),
        cache(costs),
        training_curves(comparison, curves),
        calibration(comparison),
        under_corruption(comparison, corrupted),
        class_accuracy(comparison),
        agreement(comparison),
        disagreements(comparison, pixels_of),
        pairs(comparison),
        all_metrics(comparison),
        parameters_and_versions(origin),
    ]
    return HEAD + "\n".join(sections) + "\n</body>\n</html>\n"


def header(comparison: Comparison, costs: Costs) -> str:
    summary = paragraphs(sentences(comparison, *cost_sentences(costs)))
    return (
        f'<header><h1>{TITLE}</h1>\n<p class="muted">Students: {len(comparison.gains)}, each '
        f"distilled and as a baseline, on {len(comparison.labels):,} test images of "
        f"{len(comparison.class_names):,} classes</p></header>\n"
        f'<section class="card summary">{summary}</section>'
    )


def parameters_and_versions(origin: Origin) -> str:
    facts = {
        **{f"{name} fingerprint": value for name, value in origin.fingerprints.items()},
        "Python": platform.python_version(),
        **{name: version(name) for name in VERSIONS},
    }
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    params = yaml.safe_dump(dict(origin.params), sort_keys=False, allow_unicode=True)
    content = (
        f"<dl>{items}</dl><details open><summary>params.yaml</summary>"
        f"<pre>{escape(params)}</pre></details>"
    )
    return section("Parameters and versions", "", card(content, "long"))
