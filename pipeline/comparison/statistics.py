"""How sure the figures are: intervals over the choice of test samples, and paired tests.

They answer one question: would another set of test samples, drawn alike, say the same? What another
training seed would change is not in them.
"""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
RESAMPLES = 5_000
SEED = 0
CHUNK = 4_000_000  # drawn indices held at once


def bootstrap_means(values: np.ndarray, *, resamples: int = RESAMPLES) -> np.ndarray:
    """[resamples, M] the means of M values over samples drawn with replacement: [N, M] -> means.

    All M are of the same draws, so differences of columns are paired. The seed is fixed: equal
    values give equal means.
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
    """[2, ...] the percentile interval at 95 % of [resamples, ...] bootstrap means."""
    return np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The exact two-sided p-value of McNemar's test on two models' right answers, [N] bool each.

    Of the samples that exactly one model has right, either is as likely to be that one under the
    null hypothesis: a binomial test at 1/2. 1 where there is no such sample.
    """
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    discordant = only_first + only_second
    tail = ways = 1  # of getting 0 of them
    for i in range(min(only_first, only_second)):
        ways = ways * (discordant - i) // (i + 1)  # exact: whole numbers of any size
        tail += ways
    return min(1.0, 2 * tail / 2**discordant)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for being several (Holm 1979): each holds at its level for all."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
