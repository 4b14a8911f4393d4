"""The trainings of one student and its baseline with several seeds, compared pair by pair.

Arithmetic on measured files; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.comparison import metrics
from pipeline.comparison.measurement import statistics
from pipeline.comparison.measurement.seeds import SeedMean, seed_mean

if TYPE_CHECKING:  # compare.py imports this module
    from pipeline.comparison.compare import ModelMetrics


@dataclass(frozen=True)
class SeedComparison:
    """Of S seeds, in the order of `seeds`."""

    seeds: Sequence[int]
    distilled: Sequence[ModelMetrics]
    baselines: Sequence[ModelMetrics]
    gain: SeedMean  # of accuracy, seed by seed

    @property
    def gains(self) -> list[float]:
        """The gain of each seed."""
        pairs = zip(self.distilled, self.baselines, strict=True)
        return [first.accuracy - second.accuracy for first, second in pairs]


def with_interval(figures: np.ndarray, resampled: np.ndarray) -> tuple[float, float]:
    """Compute the 95 % interval of a share: of one training over images, of several over seeds and
    images.

    Args:
        figures: [S] of each seed, on all images.
        resampled: [resamples, S], as `seed_mean` takes them.
    """
    if len(figures) > 1:
        low, high = seed_mean(figures, resampled).interval
    else:
        # Around the figure: a calibration error of resampled images is larger in the mean.
        half = np.subtract(*statistics.interval(resampled[:, 0])[::-1]) / 2
        low, high = figures[0] - half, figures[0] + half
    return max(0.0, float(low)), min(1.0, float(high))


def agreement_interval(
    students: Sequence[ModelMetrics], teacher: ModelMetrics
) -> tuple[float, float]:
    """The 95 % interval of the mean agreement of one student's trainings with the teacher."""
    agree = np.stack([m.decisions == teacher.decisions for m in students], 1)
    means = statistics.bootstrap_means(agree)
    if agree.mean() in (0, 1):
        low, high = statistics.share_intervals(agree, means)[:, 0]
        return float(low), float(high)
    return with_interval(agree.mean(0), means)


def calibration_interval(students: Sequence[ModelMetrics]) -> tuple[float, float]:
    """The 95 % interval of the mean calibration error of one student's trainings."""
    gaps = np.concatenate([_gaps_by_bin(m) for m in students], 1)
    means = statistics.bootstrap_means(gaps).reshape(-1, len(students), metrics.NUM_BINS)
    return with_interval(np.array([m.ece for m in students]), np.abs(means).sum(2))


def _gaps_by_bin(model: ModelMetrics) -> np.ndarray:
    """Confidence minus correctness of each image in the column of its bin: [N, NUM_BINS]. The
    calibration error is the sum over the columns of their absolute means."""
    bins = metrics.bins(model.confidences)
    gaps = np.zeros((len(bins), metrics.NUM_BINS))
    gaps[np.arange(len(bins)), bins] = model.confidences - model.correct
    return gaps
