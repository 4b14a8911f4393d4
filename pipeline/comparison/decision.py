"""Decide which file to ship.

Ship the smallest file that is not significantly less accurate than the most accurate file. If a
network's distilled file and its baseline's both qualify, ship the distilled one, unless the
baseline is significantly better.

Arithmetic on measured files; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.comparison.measurement.statistics import PairedDifference

if TYPE_CHECKING:  # compare.py imports this module
    from pipeline.comparison.compare import ModelMetrics

#: Files whose sizes differ by at most this factor count as equally small, and the more accurate one
#: is chosen: the length of a name in a file's metadata must not decide.
EQUALLY_SMALL = 1.01
SMALLEST_SAVING = 0.25  # of the bytes, that a trade-off saves
LARGEST_LOSS = 0.02  # of accuracy, in [0, 1], that a trade-off costs

#: most_accurate: of all files; each one that is smaller by more than 1 % is significantly less
#: accurate.
#: smallest_not_worse: the smallest of those that are not significantly less accurate than the best.
Reason = Literal["most_accurate_and_smallest", "most_accurate", "smallest_not_worse"]
#: Why this training of the network. other_worse: the other one is significantly less accurate than
#: the best file, though not than this one.
TrainingReason = Literal["better", "indistinguishable", "other_worse", "other_has_no_file"]


@dataclass(frozen=True)
class Decision:
    file: ModelMetrics
    to_best: PairedDifference[ModelMetrics]  # the file minus the most accurate one
    to_teacher: PairedDifference[ModelMetrics]  # the file minus the teacher
    #: Distilled minus baseline, of this network in this precision; None if one was not measured.
    gain: PairedDifference[ModelMetrics] | None
    reason: Reason
    training: TrainingReason
    #: The file that the rule chooses without this network in this precision, minus the file.
    runner_up: PairedDifference[ModelMetrics] | None
    #: A smaller file that costs little accuracy, minus the file.
    trade_off: PairedDifference[ModelMetrics] | None


def decide(
    models: Sequence[ModelMetrics],
    difference: Callable[[int, int], PairedDifference[ModelMetrics]],
) -> Decision | None:
    """Choose the file to ship.

    Args:
        models: the teacher, then students and baselines in each precision.
        difference: accuracy of models[i] minus that of models[j], by i and j.

    Returns:
        None if no student and no baseline has a file.
    """
    rule = _Rule(models, difference)
    files = [i for i, m in enumerate(models) if m.role != "teacher" and m.path is not None]
    if not files:
        return None
    best, chosen = rule.choose(files)
    others = [i for i in files if rule.network(i) != rule.network(chosen)]
    runner_up = rule.choose(others)[1] if others else None
    trade_off = rule.trade_off(others, chosen)
    return Decision(
        file=models[chosen],
        to_best=difference(chosen, best),
        to_teacher=difference(chosen, 0),
        gain=rule.gain(chosen),
        reason=rule.reason(files, best, chosen),
        training=rule.training_reason(files, best, chosen),
        runner_up=None if runner_up is None else difference(runner_up, chosen),
        trade_off=None if trade_off is None else difference(trade_off, chosen),
    )


@dataclass(frozen=True)
class _Rule:
    """The rule, on positions in `models`."""

    models: Sequence[ModelMetrics]
    difference: Callable[[int, int], PairedDifference[ModelMetrics]]

    def network(self, i: int) -> tuple[str, str]:
        """A network in a precision: the distilled file and the baseline's are one candidate."""
        return self.models[i].name, self.models[i].precision

    def size(self, network: tuple[str, str], files: Sequence[int]) -> int:
        """Bytes of the larger of a network's two files."""
        return max(self.models[i].size_bytes for i in files if self.network(i) == network)

    def choose(self, files: Sequence[int]) -> tuple[int, int]:
        """The most accurate file, and the one to ship."""
        best = max(files, key=lambda i: (self.models[i].accuracy, -self.models[i].size_bytes))
        eligible = [i for i in files if not self.difference(i, best).significant]
        sizes = {of: self.size(of, files) for of in map(self.network, eligible)}
        smallest = [
            self.better_training([i for i in eligible if self.network(i) == network])
            for network, size in sizes.items()
            if size <= EQUALLY_SMALL * min(sizes.values())
        ]
        return best, max(smallest, key=lambda i: (self.models[i].accuracy, -sizes[self.network(i)]))

    def better_training(self, eligible: Sequence[int]) -> int:
        """Choose of one or two trainings of a network: the significantly better one, else the
        distilled."""
        if len(eligible) == 1:
            return eligible[0]
        distilled, baseline = sorted(eligible, key=lambda i: self.models[i].role == "baseline")
        gain = self.difference(distilled, baseline)
        return baseline if gain.verdict == "loss" else distilled

    def gain(self, chosen: int) -> PairedDifference[ModelMetrics] | None:
        pair = {
            m.role: i for i, m in enumerate(self.models) if self.network(i) == self.network(chosen)
        }
        return self.difference(pair["distilled"], pair["baseline"]) if len(pair) == 2 else None

    def reason(self, files: Sequence[int], best: int, chosen: int) -> Reason:
        if self.models[chosen].accuracy < self.models[best].accuracy:
            return "smallest_not_worse"
        own = self.size(self.network(chosen), files)
        is_smaller = (EQUALLY_SMALL * self.size(self.network(i), files) < own for i in files)
        return "most_accurate" if any(is_smaller) else "most_accurate_and_smallest"

    def training_reason(self, files: Sequence[int], best: int, chosen: int) -> TrainingReason:
        network = self.network(chosen)
        twins = [i for i in files if self.network(i) == network and i != chosen]
        if not twins:
            return "other_has_no_file"
        (twin,) = twins
        if self.difference(chosen, twin).verdict == "gain":
            return "better"
        return "other_worse" if self.difference(twin, best).significant else "indistinguishable"

    def trade_off(self, files: Sequence[int], chosen: int) -> int | None:
        """Find the file that saves enough bytes and loses least accuracy, if that is little."""
        most_bytes = (1 - SMALLEST_SAVING) * self.models[chosen].size_bytes
        losses = {
            i: -self.difference(i, chosen).gain
            for i in files
            if self.models[i].size_bytes <= most_bytes
        }
        best = min(losses, key=lambda i: (losses[i], self.models[i].size_bytes), default=None)
        return best if best is not None and losses[best] <= LARGEST_LOSS else None
