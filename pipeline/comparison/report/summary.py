"""A comparison in sentences."""

from collections.abc import Mapping

from pipeline.comparison.compare import Comparison, ModelMetrics, PairedDifference, is_significant
from pipeline.comparison.figures import Figures
from pipeline.comparison.report.costs import Costs, cache_sentence, cost_sentences
from pipeline.comparison.report.numbers import join_and, percent, percent_range, points, whole
from pipeline.comparison.robustness import RobustGain

#: By student: gain, low and high, and the p-value if there was a test.
Gains = Mapping[str, tuple[float, ...]]

CAVEAT = (
    "One test image is {points} points. The intervals (95 %) cover the choice of the test images, "
    "not the seed of the training."
)


def verdict(gain: float, low: float, high: float, p_value: float = 0.0) -> str:
    """Classify a gain as gain, loss or not significant; without a test its interval decides."""
    if not is_significant(low, high, p_value):
        return "not significant"
    return "gain" if gain > 0 else "loss"


def verdict_of(difference: PairedDifference) -> str:
    return verdict(difference.gain, difference.low, difference.high, difference.p_value)


def gain_with_interval(gain: PairedDifference | RobustGain) -> str:
    return f"{points(gain.gain)} ({points(gain.low)} to {points(gain.high)})"


def model_label(model: ModelMetrics) -> str:
    return f"{model.name}, {model.role}"


def headline_sentences(figures: Figures) -> list[str]:
    """What distillation did to accuracy and robust accuracy, and what the cache saved."""
    students, images = figures.students, figures.test_images
    lines = [gain_sentence({name: s.tested_gain for name, s in students.items()}, images)]
    robust = {name: s.robust_gain_interval for name, s in students.items()}
    if None not in robust.values():
        lines.append(robust_sentence(robust))
    return lines if figures.cache is None else [*lines, cache_sentence(figures.cache)]


def sentences(figures: Figures, comparison: Comparison, costs: Costs) -> list[str]:
    """The comparison in words: gains, recommendation, agreement, calibration, speed and cache."""
    teacher, gains = comparison.teacher, comparison.gains.values()
    distilled, baselines = [gain.first for gain in gains], [gain.second for gain in gains]
    size = "" if teacher.parameters is None else f" with {whole(teacher.parameters)} parameters"
    lines = [
        *headline_sentences(figures.model_copy(update={"cache": None})),
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
    caveat = CAVEAT.format(points=f"{100 / len(comparison.labels):.2g}")
    return [*lines, *cost_sentences(costs), caveat]


def gain_sentence(gains: Gains, test_images: int) -> str:
    """What distillation did to accuracy."""
    changes = describe_gains(gains, "accuracy")
    return f"On {test_images:,} test image{'s' * (test_images != 1)}, {changes}."


def robust_sentence(gains: Gains) -> str:
    """What distillation did to robust accuracy."""
    return f"Under common corruptions, {describe_gains(gains, 'robust accuracy')}."


def describe_gains(gains: Gains, metric: str) -> str:
    """The gains in a metric, grouped by their verdict."""
    students: dict[str, list[str]] = {"gain": [], "loss": [], "not significant": []}
    for name, figures in gains.items():
        gain, low, high = figures[:3]
        near, far = sorted((abs(low), abs(high)))
        size = f" by {100 * abs(gain):.2f} points ({100 * near:.2f} to {100 * far:.2f})"
        change = verdict(*figures)
        students[change].append(name if change == "not significant" else name + size)
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
    recommendation = comparison.recommendation
    chosen, best = recommendation.chosen, recommendation.best
    start = (
        f"To ship: {model_label(chosen)}: {percent(chosen.accuracy)} with "
        f"{whole(chosen.parameters)} parameters. It is the"
    )
    if chosen is best:
        return (
            f"{start} most accurate student or baseline, and every smaller one is significantly "
            "worse."
        )
    difference = recommendation.difference
    return (
        f"{start} smallest network that is not significantly worse than the most accurate one "
        f"({model_label(best)}, {percent(best.accuracy)}): the difference is "
        f"{points(difference.gain)} points, {points(difference.low)} to {points(difference.high)}."
    )
