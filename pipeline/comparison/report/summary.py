"""A comparison in sentences."""

from collections.abc import Mapping

from pipeline.comparison.compare import Comparison
from pipeline.comparison.figures import Figures
from pipeline.comparison.measurement.statistics import LEVEL, Gain, holm
from pipeline.comparison.report.costs import Costs, cost_sentences
from pipeline.comparison.report.numbers import (
    join_and,
    percent,
    percent_range,
    points,
    points_of_one,
    whole,
)
from pipeline.comparison.report.start_texts import scratch_sentence, start_sentences
from pipeline.runtime.errors import counted


def gain_with_interval(gain: Gain) -> str:
    return f"{points(gain.gain)} ({points(gain.low)} to {points(gain.high)})"


def gain_sentences(figures: Figures) -> list[str]:
    """Say how distilled students differ from their baselines, clean and corrupted, and what each
    started from where that is not scratch."""
    gains = {name: s.tested_gain for name, s in figures.students.items()}
    robust_gains = {name: s.tested_robust_gain for name, s in figures.students.items()}
    return [
        f"On {counted(figures.test_images, 'test image')}, {describe_gains(gains)}.",
        *adjusted_sentence(gains),
        *seed_sentences(figures),
        f"Under common corruptions, {describe_gains(robust_gains)}.",
        *budget_sentences(figures),
        *start_sentences(figures),
    ]


def adjusted_sentence(gains: Mapping[str, Gain]) -> list[str]:
    """Say which differences stay significant among several students; nothing of one student."""
    found = [name for name, gain in gains.items() if gain.significant]
    if len(gains) == 1 or not found:
        return []
    p_values = dict(zip(gains, holm([gain.p_value for gain in gains.values()]), strict=True))
    kept = [name for name in found if p_values[name] < 1 - LEVEL]
    if len(kept) == len(found):
        text = {1: "it stays", 2: "both stay"}.get(len(found), f"all {len(found)} stay")
    else:
        verb = "stays" if len(kept) == 1 else "stay"
        text = f"{join_and(kept)} alone {verb}" if kept else "none stays"
    return [f"Adjusted for {len(gains)} students (Holm), {text} significant."]


def seed_sentences(figures: Figures) -> list[str]:
    """Say what other training seeds change, and how many of them a significant gain needs."""
    of_one = [name for name, student in figures.students.items() if student.seeds is None]
    lines = []
    if of_one:
        who = "" if len(of_one) == len(figures.students) else f" of {join_and(of_one)}"
        lines.append(
            f"One seed{who}: another seed would change the gain, which the interval does not "
            "cover. `training.seeds: [0, 1, 2]` trains three."
        )
    for name, student in figures.students.items():
        if (seeds := student.seeds) is None:
            continue
        mean = f"{counted(len(seeds.trainings), 'seed')}, {points(student.gain)} points on average"
        if student.tested_gain.significant:
            outlook = "Its interval covers seeds and test images"
        elif seeds.needed is None:
            outlook = "More seeds would not make it significant; more test images may"
        else:
            outlook = f"An equal mean of {seeds.needed} seeds would be significant"
        lines.append(
            f"{name}: {mean} (deviation {100 * student.gain_deviation:.2f} points). {outlook}."
        )
    return lines


def budget_sentences(figures: Figures) -> list[str]:
    """A warning if a student and its baseline made different numbers of optimiser steps."""
    unequal = [
        f"{name} made {counted(s.optimiser_steps, 'optimiser step')} distilled and "
        f"{whole(s.baseline_optimiser_steps)} as a baseline"
        for name, s in figures.students.items()
        if s.optimiser_steps is not None
    ]
    if not unequal:
        return []
    gains = "Its gain is" if len(unequal) == 1 else "Their gains are"
    return [f"Warning: {'; '.join(unequal)}. {gains} not the effect of the teacher alone."]


def teacher_sentences(comparison: Comparison) -> list[str]:
    """The teacher's accuracy, its agreement with the networks, and calibration; of several seeds
    the means."""
    teacher, pairs = comparison.teacher, [*map(comparison.pairs_by_seed, comparison.gains)]

    def means(figure: str, *, baseline: bool = False) -> str:
        """The range over the students of means over the seeds."""
        of_each = ([getattr(pair[baseline], figure) for pair in of] for of in pairs)
        return percent_range(sum(values) / len(values) for values in of_each)

    students, others = (
        ("the distilled student", "its baseline")
        if len(pairs) == 1
        else ("distilled students", "their baselines")
    )
    size = ""
    if teacher.parameters is not None:
        size = f" with {counted(teacher.parameters, 'parameter')}"
    return [
        f"The teacher has {percent(teacher.accuracy)}{size}. It agrees with {students} on "
        f"{means('agreement')} of the images, with {others} on "
        f"{means('agreement', baseline=True)}.",
        f"Expected calibration error: the teacher {percent(teacher.ece)}, {students} "
        f"{means('ece')}, {others} {means('ece', baseline=True)}.",
    ]


def sentences(figures: Figures, comparison: Comparison, costs: Costs) -> list[str]:
    """The comparison in words: gains, agreement, calibration, speed and cache."""
    lines = [
        *gain_sentences(figures),
        *scratch_sentence(figures),
        *teacher_sentences(comparison),
        *pair_sentences(comparison),
        *cost_sentences(costs),
    ]
    caveat = (
        f"One test image is {points_of_one(len(comparison.labels))} points. The intervals (95 %) "
        f"cover the choice of the test images, {covered(figures)}."
    )
    if figures.decision is not None:
        caveat += (
            " The file to ship is chosen by these images: on others its accuracy is probably a "
            "little lower."
        )
    return [*lines, caveat]


def covered(figures: Figures) -> str:
    """Whether the intervals of gains cover the training seed."""
    several = [name for name, student in figures.students.items() if student.seeds is not None]
    if not several:
        return "not the seed of the training"
    of = "" if len(several) == len(figures.students) else f", for {join_and(several)},"
    return f"and{of} the seed of the training; those of single files leave the seed out"


def pair_sentences(comparison: Comparison) -> list[str]:
    """Whether distilled students differ from each other; nothing if there is one."""
    significant, pairs = sum(pair.significant for pair in comparison.pairs), len(comparison.pairs)
    if pairs == 0:
        return []
    if pairs == 1:
        differ = "differ" if significant else "do not differ"
        return [f"The two distilled students {differ} significantly on these images."]
    if not significant:
        return ["No two distilled students differ significantly on these images."]
    differ = counted(significant, "differs", "differ")
    return [f"Of {pairs} pairs of distilled students, {differ} significantly on these images."]


def describe_gains(gains: Mapping[str, Gain]) -> str:
    """The gains, grouped by their verdict."""
    students: dict[str, list[str]] = {"gain": [], "loss": [], "not significant": []}
    for name, gain in gains.items():
        size = f" (by {absolute_with_interval(gain)})" if gain.significant else ""
        students[gain.verdict].append(name + size)
    parts = [
        f"distilled {join_and(students[change])} "
        + (
            f"is {than} its baseline"
            if len(students[change]) == 1
            else f"are {than} their baselines"
        )
        for change, than in (("gain", "more accurate than"), ("loss", "less accurate than"))
        if students[change]
    ]
    rest = students["not significant"]
    if rest and len(rest) == len(gains) > 1:
        parts.append("no gain is significant")
    elif rest:
        verb = "gains of {} are" if len(rest) > 1 else "gain of {} is"
        parts.append(f"the {verb.format(join_and(rest))} not significant")
    return "; ".join(parts)


def absolute_with_interval(gain: Gain) -> str:
    """`1.95 points, 0.56 to 3.62`: the size of a significant difference."""
    near, far = sorted((abs(gain.low), abs(gain.high)))
    return f"{100 * abs(gain.gain):.2f} points, {100 * near:.2f} to {100 * far:.2f}"
