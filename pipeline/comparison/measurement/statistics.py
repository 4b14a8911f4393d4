"""Uncertainty over the choice of test samples: bootstrap intervals and paired tests.

One question: would other test samples of the same distribution give the same result? seeds.py adds
the effect of another training seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import scipy

LEVEL = 0.95
RESAMPLES = 5_000
SEED = 0
CHUNK = 4_000_000  # drawn indices in memory at once

Model = TypeVar("Model")


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A difference of two accuracies."""

    gain: float
    low: float  # of the gain's 95 % interval
    high: float
    p_value: float = 0.0  # McNemar's, two-sided; 0 without a test: then the interval decides

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0 and McNemar's test rejects.

        The interval has its rate for large samples; the test is stricter if few images differ.
        """
        return not self.low <= 0 <= self.high and self.p_value < 1 - LEVEL

    @property
    def verdict(self) -> str:
        """gain, loss or not significant"""
        if not self.significant:
            return "not significant"
        return "gain" if self.gain > 0 else "loss"


@dataclass(frozen=True, kw_only=True)
class PairedDifference(Gain, Generic[Model]):
    """Accuracy of `first` minus that of `second`, on the same test images."""

    first: Model
    second: Model


def bootstrap_means(values: np.ndarray, *, resamples: int = RESAMPLES) -> np.ndarray:
    """Average M values over samples drawn with replacement: [N, M] -> [resamples, M].

    All M columns share the draws, so their differences are paired. The seed is fixed: equal values
    give equal means.
    """
    num_samples = len(values)
    rng = np.random.default_rng(SEED)
    step = max(1, CHUNK // num_samples)
    means = []
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = rng.integers(0, num_samples, (count, num_samples))
        drawn += np.arange(count)[:, None] * num_samples
        times = np.bincount(drawn.ravel(), minlength=count * num_samples)
        means.append(times.reshape(count, num_samples) @ values.astype(np.float64) / num_samples)
    return np.concatenate(means)


def interval(means: np.ndarray) -> np.ndarray:
    """Compute the 95 % percentile interval of bootstrap means: [resamples, ...] -> [2, ...]."""
    return np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def share_intervals(correct: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Compute the 95 % intervals of M shares of N samples, [2, M]: from their bootstrap means; of
    a share of 0 or 1, which the bootstrap never changes, Clopper and Pearson's (1934).

    Args:
        correct: [N, M] bool.
        means: [resamples, M], of `bootstrap_means`.
    """
    low, high = interval(means)
    exact = ((1 - LEVEL) / 2) ** (1 / len(correct))
    return np.stack(
        [np.where(correct.all(0), exact, low), np.where(correct.any(0), high, 1 - exact)]
    )


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the exact two-sided p-value of McNemar's test.

    A binomial test at 1/2 on the samples that exactly one model classifies correctly: under the
    null hypothesis, each model is equally likely to be that one. 1 if there is no such sample.

    Args:
        first, second: [N] bool, whether each model's prediction is correct.
    """
    only_first, only_second = (first & ~second).sum(), (second & ~first).sum()
    discordant = only_first + only_second
    return float(scipy.stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for the number of tests, to control the family-wise error (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.arange(len(order), 0, -1) * np.asarray(p_values)[order]
    adjusted = np.minimum(1, np.maximum.accumulate(scaled))
    return adjusted[np.argsort(order)].tolist()
