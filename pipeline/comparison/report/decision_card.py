"""The file to ship, in words: console, Markdown and the page show the same card."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.comparison.figures import DecisionFigures, Figures, FileFigures
from pipeline.comparison.measurement.latency import EngineSpeed
from pipeline.comparison.measurement.statistics import Gain
from pipeline.comparison.report.costs import NOT_MEASURED, speed_of
from pipeline.comparison.report.numbers import p_text, percent, points, whole
from pipeline.comparison.starts import FROM_SCRATCH
from pipeline.runtime.errors import counted

TITLE = "To ship"


@dataclass(frozen=True)
class DecisionCard:
    file: str  # its path
    name: str  # `mobilenet, distilled, int8`
    figures: Mapping[str, str]  # by title
    remarks: list[tuple[str, str]]  # each with its title

    @property
    def lines(self) -> list[str]:
        """Figures and remarks as text."""
        return [f"{title}: {text}" for title, text in [*self.figures.items(), *self.remarks]]


def decision_card(figures: Figures, speed: Mapping[str, EngineSpeed]) -> DecisionCard:
    """Describe the file to ship.

    Args:
        speed: by the setting; empty if none was measured.
    """
    decision = figures.decision
    if decision is None:
        reason = "No student and no baseline has a file. The cards in models/exported say why."
        return DecisionCard("no file", "", {}, [("Why", reason)])
    return DecisionCard(
        decision.path,
        file_name(decision),
        {
            "Size": size(decision),
            "Latency": latency(speed, decision),
            "Accuracy": with_interval(decision),
            f"Against the teacher's {percent(figures.teacher.accuracy)}": difference(
                decision.to_teacher.tested
            ),
            "Distilled against baseline": f"not compared: one has no {decision.precision} file"
            if decision.gain is None
            else difference(decision.gain.tested),
        },
        [
            ("Why", why(decision)),
            *(("Start", text) for text in starts(decision)),
            *(("Warning", text) for text in warnings(decision, figures)),
            ("Runner-up", runner_up(decision)),
            *(("Trade-off", text) for text in trade_offs(decision)),
        ],
    )


def file_name(file: FileFigures) -> str:
    """`mobilenet, distilled, int8`"""
    return f"{file.student}, {file.role}, {file.precision}"


def size(decision: DecisionFigures) -> str:
    text = counted(decision.bytes, "byte")
    if decision.teacher_bytes is None:
        return text
    ratio = times_smaller(decision.teacher_bytes, decision.bytes)
    compared = "as large as" if ratio.startswith("1.0 x") else f"{ratio} than"
    return f"{text} ({compared} the teacher's file)"


def times_smaller(first: int, second: int) -> str:
    """Say how much smaller the second is than the first: `2.9 x smaller`, `1.2 x larger`."""
    ratio, change = (first / second, "smaller") if first >= second else (second / first, "larger")
    return f"{whole(round(ratio)) if ratio >= 100 else f'{ratio:.1f}'} x {change}"


def latency(speed: Mapping[str, EngineSpeed], file: FileFigures) -> str:
    """`4.4 x faster than the teacher (4.31 to 4.52), one image, 1 thread`

    A baseline's file has its student's time: it is the same graph.
    """
    text = speed_of(speed, file.student, file.precision)
    if text != NOT_MEASURED:
        return f"{text}, one image, 1 thread"
    if not speed:
        return text
    return (
        f"{text}: only distilled files are timed, and {file.student} has none in {file.precision}"
    )


def with_interval(file: FileFigures) -> str:
    return f"{percent(file.accuracy)} ({percent(file.low)} to {percent(file.high)})"


def difference(gain: Gain) -> str:
    """`-1.39 points (-3.06 to +0.28), not significant`; with McNemar's p where it decides."""
    text = f"{points(gain.gain)} points ({points(gain.low)} to {points(gain.high)})"
    verdict = "significant" if gain.significant else "not significant"
    interval_excludes_0 = not gain.low <= 0 <= gain.high
    p_value = f" ({p_text(gain.p_value)})" if interval_excludes_0 and not gain.significant else ""
    return f"{text}, {verdict}{p_value}"


def loss(gain: Gain) -> str:
    """`0.84 points (0.10 to 1.60)`, of a negative gain"""
    low, high = (points(-bound).removeprefix("+") for bound in (gain.high, gain.low))
    return f"{points(-gain.gain).removeprefix('+')} points ({low} to {high})"


def why(decision: DecisionFigures) -> str:
    """The reasons for this file, and for this training of its network."""
    of_all = "It is the most accurate file of the students and baselines"
    best = f"{file_name(decision.best)}, {percent(decision.best.accuracy)}"
    reason = {
        "most_accurate_and_smallest": f"{of_all}, and none is smaller by more than 1 %.",
        "most_accurate": f"{of_all}. Every one that is smaller by more than 1 % is significantly "
        "less accurate.",
        "smallest_not_worse": "It is the smallest file that is not significantly less accurate "
        f"than the best one ({best}). The difference is "
        f"{difference(decision.to_best.tested)}.",
    }[decision.reason]
    is_distilled = decision.role == "distilled"
    other = "Its baseline" if is_distilled else "The distilled student"
    training = {
        "better": "It is significantly more accurate than "
        f"{'its baseline' if is_distilled else 'the distilled student'}.",
        "indistinguishable": "It does not differ significantly from its baseline, so the distilled "
        "one is chosen.",
        "other_worse": f"{other} is significantly less accurate than the best file.",
        "other_has_no_file": f"{other} has no {decision.precision} file.",
    }[decision.training]
    return f"{reason} {training}"


def starts(decision: DecisionFigures) -> Iterator[str]:
    """Say what the file's training started from, if that is not scratch."""
    if decision.start not in (None, FROM_SCRATCH):
        yield f"{decision.start}."


def warnings(decision: DecisionFigures, figures: Figures) -> Iterator[str]:
    """Say what a user should know before this file ships."""
    if decision.below_teacher:
        yield (
            f"This file is significantly less accurate than the teacher: "
            f"{percent(decision.accuracy)} instead of {percent(figures.teacher.accuracy)}. It "
            f"loses {loss(decision.to_teacher.tested)}."
        )
    if decision.unequal_training:
        yield (
            "The distilled int8 file had quantisation-aware training (`export.int8_training`), and "
            "its baseline had none: their difference is not the effect of the teacher alone."
        )
    if decision.baseline_better:
        student, lost = figures.students[decision.student], loss(decision.gain.tested)
        if student.tested_gain.verdict == "loss" and not decision.unequal_training:
            yield (
                f"Distillation made {decision.student} significantly less accurate. Trained "
                f"without the teacher, it is better by {lost}."
            )
        else:
            yield f"The distilled file is significantly less accurate than its baseline: by {lost}."


def runner_up(decision: DecisionFigures) -> str:
    other = decision.runner_up
    if other is None:
        return "none. No other network has a file."
    return (
        f"{file_name(other)} ({other.path}): {percent(other.accuracy)}, "
        f"{counted(other.bytes, 'byte')}. Its difference from the file to ship is "
        f"{difference(other.to_chosen.tested)}."
    )


def trade_offs(decision: DecisionFigures) -> Iterator[str]:
    """A smaller file, if there is one that costs little."""
    if (other := decision.trade_off) is None:
        return
    gain = other.to_chosen.tested
    cost = f"loses {loss(gain)}" if gain.gain < 0 else f"loses nothing: {difference(gain)}"
    yield (
        f"{file_name(other)} ({other.path}) is {times_smaller(decision.bytes, other.bytes)} and "
        f"{cost}. It is significantly less accurate than the best file."
    )
