"""The comparison as tables, for CSV files."""

from typing import Any

import numpy as np
import pandas as pd

from pipeline.comparison.compare import COSTS, Comparison


def models_table(comparison: Comparison) -> pd.DataFrame:
    """Tabulate every figure, one row per model."""
    rows = []
    for model in comparison.models:
        robust = comparison.robustness and comparison.robustness.of(model.name, model.role)
        accuracy = robust.accuracy if robust else None
        rows.append({"model": model.name, **model.figures, "robust_accuracy": accuracy})
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
