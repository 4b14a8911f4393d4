"""How accurate networks are on corrupted images, and which differences are more than noise.

Arithmetic on decisions; reads and writes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.comparison import statistics


@dataclass(frozen=True)
class CorruptionPredictions:
    """The class numbers that one network names for the same images, clean and corrupted."""

    clean: np.ndarray  # [N]
    corrupted: np.ndarray  # [K, S, N] by corruption and severity


@dataclass(frozen=True)
class Robustness:
    """One network's shares of right answers, in [0, 1]."""

    clean: float
    table: np.ndarray  # [K, S] by corruption and severity
    shares: np.ndarray  # [N] of each image's K * S corrupted variants

    @property
    def accuracy(self) -> float:
        """The robust accuracy: the mean over corruptions and severities."""
        return float(self.table.mean())

    @property
    def relative(self) -> float | None:
        """Robust accuracy over the accuracy on the same images, clean; None where that is 0."""
        return self.accuracy / self.clean if self.clean else None


@dataclass(frozen=True)
class RobustGain:
    """The robust accuracy of a distilled network less that of its baseline.

    The interval alone decides whether it is more than noise: McNemar's test takes answers that are
    right or wrong, and an image's variants give a share.
    """

    distilled: Robustness
    baseline: Robustness
    gain: float
    low: float  # of the gain's 95 % interval
    high: float


@dataclass(frozen=True)
class RobustComparison:
    images: int
    teacher: Robustness | None  # None: it has no network to show other pixels to
    gains: Mapping[str, RobustGain]  # by student

    def of(self, name: str, role: str) -> Robustness | None:
        """Args: role: teacher | distilled | baseline."""
        return self.teacher if role == "teacher" else getattr(self.gains[name], role)


def robustness(decisions: CorruptionPredictions, labels: np.ndarray) -> Robustness:
    """Args: labels: [N] of the same images."""
    right = decisions.corrupted == labels
    return Robustness(
        clean=float((decisions.clean == labels).mean()),
        table=right.mean(2),
        shares=right.mean((0, 1)),
    )


def compare_robustness(
    teacher: CorruptionPredictions | None,
    students: Mapping[str, tuple[CorruptionPredictions, CorruptionPredictions]],
    labels: np.ndarray,
) -> RobustComparison:
    """Args:
    students: by name, the distilled network's and its baseline's.
    labels: [N] of the images.
    """
    pairs = {name: [robustness(d, labels) for d in pair] for name, pair in students.items()}
    # Shares of each image, so that its variants, which are much alike, are drawn together.
    differences = np.stack([first.shares - second.shares for first, second in pairs.values()], 1)
    bounds = statistics.interval(statistics.bootstrap_means(differences))  # [2, students]
    return RobustComparison(
        images=len(labels),
        teacher=None if teacher is None else robustness(teacher, labels),
        gains={
            name: RobustGain(*pair, pair[0].accuracy - pair[1].accuracy, float(low), float(high))
            for (name, pair), (low, high) in zip(pairs.items(), bounds.T, strict=True)
        },
    )
