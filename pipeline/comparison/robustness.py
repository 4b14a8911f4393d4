"""Accuracy on corrupted images, and the interval of each gain.

Arithmetic on predicted classes; reads and writes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.comparison.measurement import statistics
from pipeline.comparison.measurement.statistics import PairedDifference


@dataclass(frozen=True)
class CorruptionPredictions:
    """One file's predicted classes of the same images, clean and corrupted."""

    clean: np.ndarray  # [N], which its test accuracy counts
    corrupted: np.ndarray  # [K, S, N] by corruption and severity
    image_size: int  # pixels, the side of the images, clean and corrupted


@dataclass(frozen=True)
class Robustness:
    """One network's accuracies, in [0, 1]."""

    clean: float
    image_size: int  # pixels, the side of the images
    table: np.ndarray  # [K, S] by corruption and severity
    shares: np.ndarray  # [N] of each image's K * S variants that are correct

    @property
    def accuracy(self) -> float:
        """Robust accuracy: the mean over corruptions and severities."""
        return float(self.table.mean())

    @property
    def by_severity(self) -> list[float]:
        """The mean over corruptions: clean, then at each severity."""
        return [self.clean, *self.table.mean(0)]

    @property
    def relative(self) -> float | None:
        """Robust accuracy over the clean accuracy of the same images; None if that is 0."""
        return self.accuracy / self.clean if self.clean else None


@dataclass(frozen=True)
class RobustComparison:
    images: int
    teacher: Robustness | None  # None for a teacher without a file
    #: By student: of the distilled and the baseline's float32 file, then of the int8 files.
    students: Mapping[str, Sequence[Robustness]]
    #: By student, robust accuracy of the distilled file minus that of its baseline's. There is no
    #: test: McNemar's needs one correct or wrong prediction per image, the variants give a share.
    gains: Mapping[str, PairedDifference[Robustness]]

    @property
    def image_sizes(self) -> Mapping[str, int]:
        """Pixels, the side of the images that each student and its baseline classified."""
        return {name: gain.first.image_size for name, gain in self.gains.items()}

    @property
    def models(self) -> list[Robustness | None]:
        """The teacher, then each student's files."""
        return [self.teacher, *(m for models in self.students.values() for m in models)]


def model_robustness(predictions: CorruptionPredictions, labels: np.ndarray) -> Robustness:
    """Compute one network's accuracies, from predictions and [N] labels of the same images."""
    correct = predictions.corrupted == labels
    return Robustness(
        clean=float((predictions.clean == labels).mean()),
        image_size=predictions.image_size,
        table=correct.mean(2),
        shares=correct.mean((0, 1)),
    )


def compare_robustness(
    teacher: CorruptionPredictions | None,
    students: Mapping[str, Sequence[CorruptionPredictions]],
    labels: np.ndarray,
) -> RobustComparison:
    """Compute every file's robustness, and each student's robust gain.

    Args:
        students: by name, the predictions of the distilled file and of the baseline's, in float32,
            then those of the int8 files.
        labels: [N] of the images.
    """
    measured = {
        name: [model_robustness(p, labels) for p in predictions]
        for name, predictions in students.items()
    }
    pairs = [models[:2] for models in measured.values()]
    # One share per image: the bootstrap draws an image's variants, which are alike, together.
    differences = np.stack([first.shares - second.shares for first, second in pairs], 1)
    bounds = statistics.interval(statistics.bootstrap_means(differences))  # [2, students]
    gains = [
        PairedDifference(
            first=first,
            second=second,
            gain=first.accuracy - second.accuracy,
            low=float(low),
            high=float(high),
        )
        for (first, second), (low, high) in zip(pairs, bounds.T, strict=True)
    ]
    return RobustComparison(
        images=len(labels),
        teacher=None if teacher is None else model_robustness(teacher, labels),
        students=measured,
        gains=dict(zip(students, gains, strict=True)),
    )
