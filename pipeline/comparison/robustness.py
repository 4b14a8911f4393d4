"""Accuracy on corrupted images, and the interval of each gain.

Arithmetic on predicted classes; reads and writes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.comparison.measurement import statistics
from pipeline.comparison.measurement.seeds import seed_mean
from pipeline.comparison.measurement.statistics import PairedDifference
from pipeline.runtime.outputs import Precision, Role


@dataclass(frozen=True)
class CorruptionPredictions:
    """One file's predicted classes of the same images, clean and corrupted."""

    clean: np.ndarray  # [N], which its test accuracy counts
    corrupted: np.ndarray  # [K, S, N] by corruption and severity
    image_size: int  # pixels, the side of the images, clean and corrupted
    role: Role
    precision: Precision
    seed: int | None = None  # of the training
    is_main: bool = True  # not of another seed than the file to ship


@dataclass(frozen=True)
class Robustness:
    """One network's accuracies, in [0, 1]."""

    clean: float
    image_size: int  # pixels, the side of the images
    table: np.ndarray  # [K, S] by corruption and severity
    shares: np.ndarray  # [N] of each image's K * S variants that are correct

    is_main: bool = True

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
    #: By student: of the distilled and the baseline's float32 file, of the int8 files, then of the
    #: files of other seeds.
    students: Mapping[str, Sequence[Robustness]]
    #: By student, robust accuracy of the distilled file minus that of its baseline's; of several
    #: seeds the mean over them. The test of one seed flips signs: McNemar's needs one correct or
    #: wrong prediction per image, the variants give a share.
    gains: Mapping[str, PairedDifference[Robustness]]

    @property
    def image_sizes(self) -> Mapping[str, int]:
        """Pixels, the side of the images that each student and its baseline classified."""
        return {name: gain.first.image_size for name, gain in self.gains.items()}

    @property
    def every_model(self) -> list[Robustness | None]:
        """The teacher, then each student's files."""
        return [self.teacher, *(m for models in self.students.values() for m in models)]

    @property
    def models(self) -> list[Robustness | None]:
        """The same, of the main trainings alone."""
        return [m for m in self.every_model if m is None or m.is_main]


def model_robustness(predictions: CorruptionPredictions, labels: np.ndarray) -> Robustness:
    """Compute one network's accuracies, from predictions and [N] labels of the same images."""
    correct = predictions.corrupted == labels
    return Robustness(
        clean=float((predictions.clean == labels).mean()),
        image_size=predictions.image_size,
        table=correct.mean(2),
        shares=correct.mean((0, 1)),
        is_main=predictions.is_main,
    )


def compare_robustness(
    teacher: CorruptionPredictions | None,
    students: Mapping[str, Sequence[CorruptionPredictions]],
    labels: np.ndarray,
) -> RobustComparison:
    """Compute every file's robustness, and each student's robust gain.

    Args:
        students: by name, the predictions of the distilled file and of the baseline's, in float32,
            of the int8 files, and of the files of other seeds.
        labels: [N] of the images.
    """
    measured = {
        name: [model_robustness(p, labels) for p in predictions]
        for name, predictions in students.items()
    }
    return RobustComparison(
        images=len(labels),
        teacher=None if teacher is None else model_robustness(teacher, labels),
        students=measured,
        gains={name: robust_gain(students[name], models) for name, models in measured.items()},
    )


def robust_gain(
    predictions: Sequence[CorruptionPredictions], measured: Sequence[Robustness]
) -> PairedDifference[Robustness]:
    """Compare one student's files, of `compare_robustness`, with its baseline's."""
    by_seed: dict[Role, dict[int | None, Robustness]] = {"distilled": {}, "baseline": {}}
    for p, robust in zip(predictions, measured, strict=True):
        if p.precision == "float32":
            by_seed[p.role][p.seed] = robust
    first, second = measured[:2]
    common = [seed for seed in by_seed["distilled"] if seed in by_seed["baseline"]]
    pairs = [(first, second)]
    if len(common) > 1:
        pairs = [(by_seed["distilled"][seed], by_seed["baseline"][seed]) for seed in common]
    # One share per image: the bootstrap draws an image's variants, which are alike, together.
    differences = np.stack([one.shares - other.shares for one, other in pairs], 1)
    means = statistics.bootstrap_means(differences)
    gain, p_value = first.accuracy - second.accuracy, sign_flip_test(differences[:, 0])
    low, high = statistics.interval(means[:, 0])
    if len(pairs) > 1:
        mean = seed_mean(np.array([one.accuracy - other.accuracy for one, other in pairs]), means)
        gain, (low, high) = mean.mean, mean.interval
        p_value = mean.p_value if mean.varies else sign_flip_test(differences.mean(1))
    return PairedDifference(
        first=first, second=second, gain=gain, low=float(low), high=float(high), p_value=p_value
    )


def sign_flip_test(differences: np.ndarray) -> float:
    """Test that paired differences, [N], have the mean 0: the share of random signs under which
    their mean is at least as far from 0. Like McNemar's test, it holds for few images; the seed is
    fixed."""
    values = differences[differences != 0]
    rng, least = np.random.default_rng(statistics.SEED), abs(values.sum()) - 1e-9
    extreme = 0
    for _ in range(statistics.RESAMPLES):
        signs = rng.integers(0, 2, len(values)) * 2 - 1
        extreme += abs(signs @ values) >= least
    return (extreme + 1) / (statistics.RESAMPLES + 1)
