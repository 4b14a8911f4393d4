"""The tables of the comparison as text: the console, Markdown and the page show the same ones."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from pipeline.comparison.compare import Comparison
from pipeline.comparison.figures import Figures
from pipeline.comparison.measurement.corruptions import CORRUPTIONS
from pipeline.comparison.measurement.latency import EngineSpeed, rate, three_digits
from pipeline.comparison.report.costs import Costs
from pipeline.comparison.report.numbers import (
    compression,
    duration,
    millions,
    p_text,
    percent,
    points,
    whole,
)

CORRUPTION_NAMES = {name: name.upper() if name == "jpeg" else name for name in CORRUPTIONS}


def students_table(figures: Figures) -> pd.DataFrame:
    teacher, students = figures.teacher, figures.students
    return pd.DataFrame(
        {
            "student": name,
            "distilled": with_deviation(student.accuracy, student.accuracy_deviation),
            "baseline": with_deviation(student.baseline, student.baseline_deviation),
            "gain": points(student.gain),
            "95% interval": f"{points(student.gain_low)} to {points(student.gain_high)}",
            "p": p_text(student.p_value),
            "verdict": student.tested_gain.verdict,
            "retention": percent(student.accuracy / teacher.accuracy),
            "agreement": percent(student.agreement),
            "its 95% interval": percent_bounds(student.agreement_low, student.agreement_high),
            "parameters": whole(student.parameters),
            "compression": compression(teacher.parameters, student.parameters),
            "MACs": millions(student.macs),
            "fewer MACs": compression(teacher.macs, student.macs),
        }
        for name, student in students.items()
    )


def percent_bounds(low: float, high: float) -> str:
    """`95.26 to 98.89`, in per cent"""
    return f"{100 * low:.2f} to {100 * high:.2f}"


def with_deviation(share: float, deviation: float | None) -> str:
    """`91.84%`, or of several seeds `91.84% ± 0.31`, in points."""
    return percent(share) + (
        "" if deviation is None else f" \N{PLUS-MINUS SIGN} {100 * deviation:.2f}"
    )


def metrics_table(models: pd.DataFrame, count: Callable[[int], str] = whole) -> pd.DataFrame:
    """Every metric of every network, from the table of reports/comparison.csv.

    Args:
        count: shows parameters, MACs and bytes.
    """

    def column(name: str, shown: Callable[[float], str]) -> pd.Series:
        return models[name].astype(object).map(shown, na_action="ignore").fillna("-")

    def bound(share: float) -> str:
        return f"{100 * share:.2f}"

    return pd.DataFrame(
        {
            "network": models["model"],
            "role": list(map(file_role, models["role"], models["precision"])),
            "accuracy": column("accuracy", percent),
            "95% interval": models["low"].map(bound) + " to " + models["high"].map(bound),
            "top-5": column("top5", percent),
            "NLL": column("nll", "{:.4f}".format),
            "ECE": column("ece", percent),
            "ECE, scaled": column("ece_scaled", percent),
            "T": column("temperature", "{:.3f}".format),
            "macro-F1": column("macro_f1", percent),
            "agreement": column("agreement", percent),
            "KL": column("kl", "{:.4f}".format),
            "robust": column("robust_accuracy", percent),
            "parameters": column("parameters", count),
            "MACs": column("macs", count),
            "bytes": column("size_bytes", count),
        }
    )


def file_role(role: str, precision: str) -> str:
    """`baseline`, or `baseline, int8`; nothing for the teacher, whose name says it."""
    shown = "" if role == "teacher" else role
    return shown if precision == "float32" else f"{shown}, {precision}"


def robustness_table(comparison: Comparison) -> pd.DataFrame:
    """One row per network that was measured."""
    return pd.DataFrame(
        {
            "network": model.name,
            "role": file_role(model.role, model.precision),
            "robust accuracy": percent(robust.accuracy),
            "relative": percent(robust.relative),
            "clean": percent(robust.clean),
            **dict(zip(CORRUPTION_NAMES.values(), map(percent, robust.table.mean(1)), strict=True)),
        }
        for model, robust in zip(comparison.models, comparison.robustness.models, strict=True)
        if robust is not None
    )


def pairs_table(comparison: Comparison) -> pd.DataFrame:
    """The distilled students against each other; without rows if there is one student."""
    better = {"gain": "better", "loss": "worse"}
    return pd.DataFrame(
        {
            "pair": f"{pair.first.name} minus {pair.second.name}",
            "difference": points(pair.gain),
            "95% interval": f"{points(pair.low)} to {points(pair.high)}",
            "p": p_text(pair.p_value),
            "verdict": better.get(pair.verdict, pair.verdict),
        }
        for pair in comparison.pairs
    )


def disagreements_table(counts: np.ndarray, names: Sequence[str], most: int) -> pd.DataFrame:
    """The most frequent pairs of classes, from [C, C] counts of the teacher's and a student's."""
    counts = counts - np.diag(counts.diagonal())
    largest = np.argsort(-counts, axis=None, kind="stable")[:most]
    return pd.DataFrame(
        {"teacher": names[r], "distilled": names[c], "images": whole(counts[r, c])}
        for r, c in zip(*np.unravel_index(largest, counts.shape), strict=True)
        if counts[r, c]
    )


def speed_table(speed: EngineSpeed) -> pd.DataFrame:
    """One row per file, each student's beside the teacher's."""
    return pd.DataFrame(
        {
            "file": label,
            "one image": f"{three_digits(figures.latency_ms)} ms",
            "95th percentile": f"{three_digits(figures.latency_p95_ms)} ms",
            "than the teacher": str(figures.speedup or "-"),
            f"in batches of {speed.batch_size}": f"{rate(figures.images_per_second)} images/s",
            "than the teacher in batches": str(figures.batch_speedup or "-"),
        }
        for label, figures in speed.files
    )


def cache_table(costs: Costs) -> pd.DataFrame:
    """Without rows for imported logits."""
    if costs.economics is None:
        return pd.DataFrame()
    saved = costs.economics.passes_saved
    passes = {
        "made for the cache": costs.economics.teacher_passes,
        "a live teacher at every step": costs.economics.online_passes,
        "saved" if saved >= 0 else "more than a live teacher": abs(saved),
    }
    table = pd.DataFrame({"": list(passes), "teacher passes": list(map(whole, passes.values()))})
    if costs.of_teacher is not None:
        table["time in the teacher"] = [duration(costs.seconds(p)) for p in passes.values()]
    return table
