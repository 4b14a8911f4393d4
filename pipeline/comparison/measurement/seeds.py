"""Uncertainty over training seeds and test images together.

The model: the result of seed s on image n is mean + seed_s + image_n + rest_sn, all independent:
two crossed random effects. So the mean over S seeds and N images varies by the variance of seeds
over S, of images over N, and of the rest over S N. The interval adds two half-widths in squares, as
Howe (1974) adds tolerances: by Student's t with S - 1 degrees of freedom for seeds and rest, by the
normal distribution for images. The images tell the rest, too, so the first half-width is at least
that of the rest by the normal distribution: two seeds may agree by chance.
`python -m benchmarks.seed_intervals` measures the coverage.
"""

from dataclasses import dataclass

import numpy as np
import scipy

from pipeline.comparison.measurement.statistics import LEVEL

MOST_SEEDS = 100  # that a report advises


@dataclass(frozen=True)
class SeedMean:
    """The mean of a figure over two or more seeds."""

    mean: float
    deviation: float  # between the seeds
    seeds: int
    of_seeds: float  # variance of the mean by seeds, with the rest
    of_images: float  # variance of the mean by images alone
    rest: float = 0.0  # variance of the mean by the rest, as the images tell it

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, over seeds and images; of a share or a difference of shares, so that
        it ends at -1 and 1."""
        half = self._half_width(1 - LEVEL, self.seeds)
        return max(-1.0, self.mean - half), min(1.0, self.mean + half)

    @property
    def varies(self) -> bool:
        """False if all images have one result: then there is neither interval nor p-value."""
        return self.of_seeds + self.of_images + self.rest > 0

    @property
    def p_value(self) -> float:
        """Two-sided, of the mean being 0: the level at which the interval would end at 0."""
        if self.mean == 0:
            return 1.0

        def beyond(log_level: float) -> float:
            return self._half_width(np.exp(log_level), self.seeds) - abs(self.mean)

        least = np.log(1e-12)
        return (
            float(np.exp(scipy.optimize.brentq(beyond, least, 0))) if beyond(least) > 0 else 1e-12
        )

    @property
    def seeds_needed(self) -> int | None:
        """The fewest seeds with which the interval of an equal mean would exclude 0; None if even
        100 would not, or nothing varies: then more test images are needed."""
        if not self.varies:
            return None
        more = range(self.seeds, MOST_SEEDS + 1)
        return next((n for n in more if self._half_width(1 - LEVEL, n) < abs(self.mean)), None)

    def _half_width(self, level: float, seeds: int) -> float:
        t, z = scipy.stats.t.isf(level / 2, seeds - 1), scipy.stats.norm.isf(level / 2)
        of_seeds = max(t**2 * self.of_seeds, z**2 * self.rest) * self.seeds / seeds
        return float(np.sqrt(of_seeds + z**2 * self.of_images))


def seed_mean(figures: np.ndarray, resampled: np.ndarray) -> SeedMean:
    """Average a figure over seeds.

    Args:
        figures: [S] of each seed, on all images; S >= 2.
        resampled: [resamples, S], the same figures on images drawn with replacement, in each row
            the same images for all seeds, as `statistics.bootstrap_means` draws them.
    """
    seeds = len(figures)
    of_mean, of_one = resampled.mean(1).var(), resampled.var(0).mean()
    rest = max(0.0, (of_one - of_mean) / (seeds - 1))  # of the mean, by what is of one seed alone
    return SeedMean(
        mean=float(figures.mean()),
        deviation=float(figures.std(ddof=1)),
        seeds=seeds,
        of_seeds=float(figures.var(ddof=1) / seeds),
        of_images=float(max(0.0, of_mean - rest)),
        rest=float(rest),
    )
