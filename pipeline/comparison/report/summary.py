"""A comparison in sentences."""

from collections.abc import Mapping

from pipeline.comparison.compare import Comparison, ModelMetrics
from pipeline.comparison.figures import Figures
from pipeline.comparison.report.costs import Costs, cost_sentences
from pipeline.comparison.report.numbers import join_and, percent, percent_range, points, whole
from pipeline.comparison.statistics import Gain


def gain_with_interval(gain: Gain) -> str:
    return f"{points(gain.gain)} ({points(gain.low)} to {points(gain.high)})"


def model_label(model: ModelMetrics) -> str:
    return f"{model.name}, {model.role}"


def gain_sentences(figures: Figures) -> list[str]:
    """What distillation did to accuracy and to robust accuracy."""
    gains = {name: s.tested_gain for name, s in figures.students.items()}
    robust_gains = {name: s.tested_robust_gain for name, s in figures.students.items()}
    return [
        f"On {figures.test_images:,} test images, {describe_gains(gains, 'accuracy')}.",
        f"Under common corruptions, {describe_gains(robust_gains, 'robust accuracy')}.",
    ]


def sentences(figures: Figures, comparison: Comparison, costs: Costs) -> list[str]:
    """The comparison in words: gains, recommendation, agreement, calibration, speed and cache."""
    teacher, gains = comparison.teacher, comparison.gains.values()
    distilled, baselines = [gain.first for gain in gains], [gain.second for gain in gains]
    size = "" if teacher.parameters is None else f" with {whole(teacher.parameters)} parameters"
    lines = [
        *gain_sentences(figures),
        recommendation_sentence(comparison),
        f"The teacher has {percent(teacher.accuracy)}{size}. It "
        f"agrees with distilled students on {percent_range(m.agreement for m in distilled)} of the "
        f"images, with baselines on {percent_range(m.agreement for m in baselines)}.",
        f"Expected calibration error: the teacher {percent(teacher.ece)}, distilled students "
        f"{percent_range(m.ece for m in distilled)}, baselines "
        f"{percent_range(m.ece for m in baselines)}.",
    ]
    if comparison.pairs:
        significant = sum(pair.significant for pair in comparison.pairs)
        lines.append(
            f"Of {len(comparison.pairs)} pairs of distilled students, {significant} differ "
            "significantly."
            if significant
            else "No two distilled students differ significantly on these images."
        )
    caveat = (
        f"One test image is {100 / len(comparison.labels):.2g} points. The intervals (95 %) cover "
        "the choice of the test images, not the seed of the training."
    )
    return [*lines, *cost_sentences(costs), caveat]


def describe_gains(gains: Mapping[str, Gain], metric: str) -> str:
    """The gains in a metric, grouped by their verdict."""
    students: dict[str, list[str]] = {"gain": [], "loss": [], "not significant": []}
    for name, gain in gains.items():
        near, far = sorted((abs(gain.low), abs(gain.high)))
        size = f" by {100 * abs(gain.gain):.2f} points ({100 * near:.2f} to {100 * far:.2f})"
        students[gain.verdict].append(name + size if gain.significant else name)
    parts = [
        f"distillation {verb} the {metric} of {join_and(students[change])}"
        for change, verb in (("gain", "raised"), ("loss", "lowered"))
        if students[change]
    ]
    rest = students["not significant"]
    if rest and len(rest) == len(gains) > 1:
        parts.append("no gain is significant")
    elif rest:
        verb = "gains of {} are" if len(rest) > 1 else "gain of {} is"
        parts.append(f"the {verb.format(join_and(rest))} not significant")
    return "; ".join(parts)


def recommendation_sentence(comparison: Comparison) -> str:
    difference = comparison.recommendation
    chosen, best = difference.first, difference.second
    start = (
        f"To ship: {model_label(chosen)}: {percent(chosen.accuracy)} with "
        f"{whole(chosen.parameters)} parameters. It is the"
    )
    if chosen is best:
        return (
            f"{start} most accurate student or baseline, and every smaller one is significantly "
            "worse."
        )
    return (
        f"{start} smallest network that is not significantly worse than the most accurate one "
        f"({model_label(best)}, {percent(best.accuracy)}): the difference is "
        f"{points(difference.gain)} points, {points(difference.low)} to {points(difference.high)}."
    )
