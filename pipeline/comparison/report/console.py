"""The comparison for a terminal."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from pipeline.comparison.report.costs import cache_sentence
from pipeline.comparison.report.numbers import compression, millions, percent, points, whole
from pipeline.comparison.report.summary import gain_sentence, robust_sentence, verdict


def console_table(comparison: Mapping[str, Any]) -> str:
    """metrics/comparison.json as a table with one line per student, and in sentences."""
    teacher, students = comparison["teacher"], comparison["students"]
    gains = {
        name: (s["gain"], s["gain_low"], s["gain_high"], s["p_value"])
        for name, s in students.items()
    }
    rows = [
        {
            "student": name,
            "distilled": percent(student["accuracy"]),
            "baseline": percent(student["baseline"]),
            "gain": points(student["gain"]),
            "95% interval": f"{points(student['gain_low'])} to {points(student['gain_high'])}",
            "verdict": verdict(*gains[name]),
            "agreement": percent(student["agreement"]),
            "parameters": whole(student["parameters"]),
            "compression": compression(teacher["parameters"], student["parameters"]),
            "MACs": millions(student["macs"]),
            "fewer MACs": compression(teacher["macs"], student["macs"]),
        }
        for name, student in students.items()
    ]
    robust_gains = {
        name: (s["robust_gain"], s["robust_gain_low"], s["robust_gain_high"])
        for name, s in students.items()
        if "robust_gain" in s
    }
    size = f"{whole(teacher['parameters'])} parameters, {millions(teacher['macs'])} MACs"
    if teacher["parameters"] is None:
        size = "logits without a network"
    lines = [
        f"teacher: test accuracy {percent(teacher['accuracy'])}, {size}",
        pd.DataFrame(rows).to_string(index=False),
        gain_sentence(gains, comparison["test_images"]),
    ]
    if robust_gains:
        lines.append(robust_sentence(robust_gains))
    if "cache" in comparison:
        lines.append(cache_sentence(comparison["cache"]))
    return "\n".join(lines).replace("\N{MINUS SIGN}", "-")  # some terminals lack it
