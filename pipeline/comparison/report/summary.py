"""A comparison in words and small tables, for a terminal, a pull request and the report's head."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from pipeline.comparison.compare import Comparison, ModelMetrics, PairedDifference, is_significant
from pipeline.comparison.report.costs import Costs, cache_rows, cache_sentence, speed_rows
from pipeline.comparison.report.costs import sentences as cost_sentences
from pipeline.comparison.robustness import RobustComparison

#: The p-value of a gain without a test: its interval alone decides.
DECIDED_BY_INTERVAL = 0.0


def percent(share: float) -> str:
    return f"{share:.2%}"


def points(share: float) -> str:
    """A difference of shares, with its sign, in percentage points."""
    text = f"{100 * share:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "\N{MINUS SIGN}")


def p_text(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def verdict(gain: float, low: float, high: float, p_value: float) -> str:
    if not is_significant(low, high, p_value):
        return "not significant"
    return "gain" if gain > 0 else "loss"


def verdict_of(difference: PairedDifference) -> str:
    return verdict(difference.gain, difference.low, difference.high, difference.p_value)


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


def gain_sentence(gains: Mapping[str, tuple[float, float, float, float]], test_images: int) -> str:
    """What distillation did, from each student's gain, low, high and p-value."""
    changes = describe_gains(gains, "accuracy")
    return f"On {test_images:,} test image{'s' * (test_images != 1)}, {changes}."


def robust_sentence(gains: Mapping[str, tuple[float, float, float]]) -> str:
    """What distillation did to robust accuracy, from each student's gain, low and high."""
    figures = {name: (*gain, DECIDED_BY_INTERVAL) for name, gain in gains.items()}
    return f"Under common corruptions, {describe_gains(figures, 'robust accuracy')}."


def robust_sentences(comparison: Comparison) -> list[str]:
    if comparison.robustness is None:
        return []
    gains = comparison.robustness.gains
    return [robust_sentence({name: (g.gain, g.low, g.high) for name, g in gains.items()})]


def describe_gains(gains: Mapping[str, tuple[float, float, float, float]], metric: str) -> str:
    """The gains in a metric, grouped by their verdict."""
    named: dict[str, list[str]] = {"gain": [], "loss": [], "not significant": []}
    for name, figures in gains.items():
        gain, low, high, _ = figures
        near, far = sorted((abs(low), abs(high)))
        by = f" by {100 * abs(gain):.2f} points ({100 * near:.2f} to {100 * far:.2f})"
        of_student = verdict(*figures)
        named[of_student].append(name if of_student == "not significant" else name + by)
    rest = named["not significant"]
    parts = [
        f"distillation {verb} the {metric} of {join_and(named[change])}"
        for change, verb in (("gain", "raised"), ("loss", "lowered"))
        if named[change]
    ]
    if rest and len(rest) == len(gains) > 1:
        parts.append("no gain is significant")
    elif rest:
        verb = "gains of {} are" if len(rest) > 1 else "gain of {} is"
        parts.append(f"the {verb.format(join_and(rest))} not significant")
    return "; ".join(parts)


def join_and(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def format_range(values: Iterable[float]) -> str:
    """Shares as `97.49% to 98.33%`, or as one if both are equal."""
    ordered = [percent(value) for value in sorted(values)]
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def model_label(model: ModelMetrics) -> str:
    return f"{model.name}, {model.role}"


def choice_sentence(comparison: Comparison) -> str:
    chosen, best, difference = vars(comparison.recommendation).values()
    figures = f"{percent(chosen.accuracy)} with {chosen.parameters:,} parameters"
    if chosen is best:
        return (
            f"To ship: {model_label(chosen)}: {figures}. It is the most accurate student or "
            "baseline, and every smaller one is significantly worse."
        )
    return (
        f"To ship: {model_label(chosen)}: {figures}. It is the smallest network that is not "
        f"significantly worse than the most accurate one ({model_label(best)}, "
        f"{percent(best.accuracy)}): the difference is {points(difference.gain)} points, "
        f"{points(difference.low)} to {points(difference.high)}."
    )


def sentences(comparison: Comparison, *more: str) -> list[str]:
    """The comparison in words: the gains, the recommendation, agreement and calibration.

    Args:
        more: sentences to add before the caveat.
    """
    teacher, gains = comparison.teacher, comparison.gains
    distilled = [gain.first for gain in gains.values()]
    baselines = [gain.second for gain in gains.values()]
    figures = {name: (g.gain, g.low, g.high, g.p_value) for name, g in gains.items()}
    lines = [
        gain_sentence(figures, len(comparison.labels)),
        *robust_sentences(comparison),
        choice_sentence(comparison),
        f"The teacher has {percent(teacher.accuracy)}{with_parameters(teacher.parameters)}. It "
        f"agrees with distilled students on {format_range(m.agreement for m in distilled)} of the "
        f"images, with baselines on {format_range(m.agreement for m in baselines)}.",
        f"Expected calibration error: the teacher {percent(teacher.ece)}, distilled students "
        f"{format_range(m.ece for m in distilled)}, baselines "
        f"{format_range(m.ece for m in baselines)}.",
    ]
    if comparison.pairs:
        significant = sum(pair.significant for pair in comparison.pairs)
        lines.append(
            f"Of {len(comparison.pairs)} pairs of distilled students, {significant} differ "
            "significantly."
            if significant
            else "No two distilled students differ significantly on these images."
        )
    return [*lines, *more, CAVEAT.format(points=f"{100 / len(comparison.labels):.2g}")]


CAVEAT = (
    "One test image is {points} points. The intervals (95 %) cover the choice of the test images, "
    "not the seed of the training."
)


def console_table(comparison: Mapping[str, Any]) -> str:
    """metrics/comparison.json as a table with one line per student, and in sentences."""
    teacher, students = comparison["teacher"], comparison["students"]
    figures = {
        name: (s["gain"], s["gain_low"], s["gain_high"], s["p_value"])
        for name, s in students.items()
    }
    lines = [
        {
            "student": name,
            "distilled": percent(student["accuracy"]),
            "baseline": percent(student["baseline"]),
            "gain": points(student["gain"]),
            "95% interval": f"{points(student['gain_low'])} to {points(student['gain_high'])}",
            "verdict": verdict(*figures[name]),
            "agreement": percent(student["agreement"]),
            "parameters": f"{student['parameters']:,}",
            "compression": compression(teacher["parameters"], student["parameters"]),
            "MACs": millions(student["macs"]),
            "fewer MACs": compression(teacher["macs"], student["macs"]),
        }
        for name, student in students.items()
    ]
    text = (
        f"teacher: test accuracy {percent(teacher['accuracy'])}, "
        + (
            "logits without a network\n"
            if teacher["parameters"] is None
            else f"{teacher['parameters']:,} parameters, {millions(teacher['macs'])} MACs\n"
        )
        + pd.DataFrame(lines).to_string(index=False)
        + f"\n{gain_sentence(figures, comparison['test_images'])}"
    )
    robust = {
        name: (s["robust_gain"], s["robust_gain_low"], s["robust_gain_high"])
        for name, s in students.items()
        if "robust_gain" in s
    }
    text += f"\n{robust_sentence(robust)}" if robust else ""
    if "cache" in comparison:
        text += f"\n{cache_sentence(comparison['cache'])}"
    return text.replace("\N{MINUS SIGN}", "-")  # some terminals lack it


def markdown(comparison: Comparison, costs: Costs) -> str:
    """reports/comparison.md, for the text of a pull request."""
    models = {
        model_label(m): {
            "model": m.name,
            "trained": m.role if m.role != "teacher" else "",
            "accuracy": f"{percent(m.accuracy)} ({100 * m.low:.2f} to {100 * m.high:.2f})",
            "top-5": percent(m.top5),
            "NLL": f"{m.nll:.4f}",
            "ECE": percent(m.ece),
            "ECE, scaled": optional_percent(m.ece_scaled),
            "macro-F1": percent(m.macro_f1),
            "agreement": percent(m.agreement),
            "KL": f"{m.kl:.4f}",
            "robust": optional_percent(
                robust_figures(m, comparison.robustness).get("robust_accuracy")
            ),
            "parameters": whole(m.parameters),
            "MACs": millions(m.macs),
            "bytes": whole(m.size_bytes),
        }
        for m in comparison.models
    }
    gains = [
        {
            "student": name,
            "distilled": percent(gain.first.accuracy),
            "baseline": percent(gain.second.accuracy),
            "gain, points": points(gain.gain),
            "95 % interval": f"{points(gain.low)} to {points(gain.high)}",
            "McNemar": p_text(gain.p_value),
            "verdict": verdict_of(gain),
        }
        for name, gain in comparison.gains.items()
    ]
    summary = "\n".join(
        f"- {sentence}" for sentence in sentences(comparison, *cost_sentences(costs))
    )
    speed = "".join(
        f"Speed on {device.label}, in float32:\n\n{table(speed_rows(device))}\n"
        for device in costs.speed.values()
    )
    cache = table(cache_rows(costs)) if costs.economics else ""
    return (
        f"## Comparison\n\n{summary}\n\n{table(gains)}\n{speed}{cache}\n"
        f"<details><summary>Every measure</summary>\n\n{table(models.values())}\n</details>\n"
    )


def whole(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def millions(number: int | None) -> str:
    return "-" if number is None else f"{number / 1e6:.1f} M"


def compression(teachers: int | None, students: int) -> str:
    """The teacher's cost over the student's; - without a teacher's cost."""
    return "-" if teachers is None else f"{teachers / students:.1f} x"


def with_parameters(number: int | None) -> str:
    return "" if number is None else f" with {number:,} parameters"


def optional_percent(share: float | None) -> str:
    return "-" if share is None else percent(share)


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """A Markdown table with the keys as its head."""
    rows = list(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
