"""The comparison as figures for metrics/comparison.json and as tables for CSV files."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipeline.comparison.compare import COSTS, Comparison, ModelMetrics
from pipeline.comparison.robustness import RobustComparison


def headline_figures(comparison: Comparison) -> dict[str, Any]:
    """The figures of metrics/comparison.json, to 6 decimals."""

    def rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()}

    def quality(model: ModelMetrics) -> dict[str, Any]:
        names = ("agreement", "kl", "ece", "ece_scaled", "macro_f1", "parameters", "macs")
        return {name: getattr(model, name) for name in names}

    teacher = {"accuracy": comparison.teacher.accuracy} | quality(comparison.teacher)
    del teacher["agreement"], teacher["kl"]  # with itself
    teacher |= robust_figures(comparison.teacher, comparison.robustness)
    return {
        "test_images": len(comparison.labels),
        "teacher": rounded(teacher),
        "students": {
            name: rounded(
                {
                    "accuracy": gain.first.accuracy,
                    "baseline": gain.second.accuracy,
                    "gain": gain.gain,
                    "gain_low": gain.low,
                    "gain_high": gain.high,
                    "p_value": gain.p_value,
                    **quality(gain.first),
                    **robust_figures(gain.first, comparison.robustness),
                }
            )
            for name, gain in comparison.gains.items()
        },
    }


def robust_figures(model: ModelMetrics, robustness: RobustComparison | None) -> dict[str, float]:
    """A network's robust accuracy, and the gain of a distilled one; empty if not measured."""
    robust = robustness.of(model.name, model.role) if robustness else None
    if robust is None:
        return {}
    figures = {"robust_accuracy": robust.accuracy}
    if model.role == "distilled":
        gain = robustness.gains[model.name]
        figures |= {"robust_gain": gain.gain}
        figures |= {"robust_gain_low": gain.low, "robust_gain_high": gain.high}
    return figures


def models_table(comparison: Comparison) -> pd.DataFrame:
    """Tabulate every figure, one row per model."""
    rows = []
    for model in comparison.models:
        robust = robust_figures(model, comparison.robustness).get("robust_accuracy")
        rows.append({"model": model.name, **model.figures, "robust_accuracy": robust})
    integers = dict.fromkeys(COSTS, "Int64")  # nullable: a teacher without a network has none
    return pd.DataFrame(rows).drop(columns="name").astype(integers)


def class_table(comparison: Comparison) -> pd.DataFrame:
    """Tabulate accuracy: one row per class, one column per model."""
    columns: dict[str, Any] = {
        "class": comparison.class_names,
        "test_images": np.bincount(comparison.labels, minlength=len(comparison.class_names)),
    }
    for model in comparison.models:
        name = model.name if model.role == "teacher" else f"{model.role}/{model.name}"
        columns[name] = model.class_accuracy
    return pd.DataFrame(columns)
