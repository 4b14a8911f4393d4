"""Time several ways of doing one thing, interleaved in one run."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % interval, by order statistics: no distribution is assumed."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"

    def as_list(self) -> list[float]:
        return [float(f"{value:.4g}") for value in (self.median, self.low, self.high)]


def median(values: Sequence[float]) -> Interval:
    ordered = np.sort(values)
    spread = 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(len(ordered) / 2 - spread))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + spread))
    return Interval(float(np.median(ordered)), float(ordered[low]), float(ordered[high]))


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def alternate(
    ours: Callable[[int], object], theirs: Callable[[int], object], pairs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Time both in turns, each first in every other pair; returns the seconds of each, [pairs].

    Args:
        ours, theirs: take the number of the pair.
    """
    times = time_interleaved({"theirs": theirs, "ours": ours}, pairs)
    return times["ours"], times["theirs"]


def time_interleaved(
    sides: Mapping[str, Callable[[int], object]], rounds: int
) -> dict[str, np.ndarray]:
    """Time all sides in every round, another one first each time; returns the seconds of each,
    [rounds].

    Args:
        sides: each takes the number of the round.
    """
    names = list(sides)
    times = {name: np.empty(rounds) for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            times[name][turn] = seconds(lambda n=name, t=turn: sides[n](t))
    return times
