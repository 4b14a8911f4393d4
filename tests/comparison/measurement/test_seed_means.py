"""Means over seeds and test images, and their intervals."""

import numpy as np
import pytest
from scipy import stats

from pipeline.comparison.measurement.seeds import SeedMean, seed_mean
from pipeline.comparison.measurement.statistics import bootstrap_means


@pytest.fixture(scope="module")
def gains() -> np.ndarray:
    """[S, N]: seeds differ by 2 points, images and the rest by more."""
    rng = np.random.default_rng(3)
    return (
        0.05
        + 0.02 * rng.standard_normal((4, 1))
        + 0.3 * rng.standard_normal((1, 2000))
        + 0.5 * rng.standard_normal((4, 2000))
    )


def test_the_variances_are_those_of_a_two_way_analysis(gains):
    seeds, images = gains.shape
    mean = seed_mean(gains.mean(1), bootstrap_means(gains.T))
    of_seed, of_image = gains.mean(1), gains.mean(0)
    rest = gains - of_seed[:, None] - of_image + gains.mean()
    square_of_rest = (rest**2).sum() / (seeds - 1) / (images - 1)
    square_of_images = seeds * of_image.var(ddof=1)
    of_images = (square_of_images - square_of_rest) / seeds / images
    assert mean.of_seeds == pytest.approx(of_seed.var(ddof=1) / seeds)
    assert mean.of_images == pytest.approx(of_images, rel=0.1)  # the resampling's own error
    assert mean.rest == pytest.approx(square_of_rest / seeds / images, rel=0.1)
    assert mean.deviation == pytest.approx(of_seed.std(ddof=1))


def test_two_seeds_that_agree_by_chance_have_the_interval_that_the_images_tell():
    half = 1.959964 * 1e-5**0.5
    mean = SeedMean(0.01, 0.0, 2, of_seeds=0.0, of_images=0.0, rest=1e-5)
    assert mean.interval == pytest.approx((0.01 - half, 0.01 + half))


def test_without_an_effect_of_images_the_interval_is_that_of_students_t():
    figures = np.array([0.01, 0.03, 0.035])
    mean = seed_mean(figures, np.repeat(figures[None], 50, 0))
    expected = stats.t.interval(0.95, 2, figures.mean(), stats.sem(figures))
    assert mean.interval == pytest.approx(expected)
    assert mean.p_value == pytest.approx(stats.ttest_1samp(figures, 0).pvalue)


def test_the_p_value_is_five_per_cent_where_the_interval_ends_at_zero():
    width = SeedMean(0.0, 0.01, 3, 2e-5, 3e-5).interval[1]
    assert SeedMean(width, 0.01, 3, 2e-5, 3e-5).p_value == pytest.approx(0.05)
    assert SeedMean(2 * width, 0.01, 3, 2e-5, 3e-5).p_value < 0.05
    assert SeedMean(0.0, 0.0, 3, 0.0, 0.0).p_value == 1
    assert not SeedMean(0.1, 0.0, 3, 0.0, 0.0).varies
    assert SeedMean(0.1, 0.0, 3, 0.0, 0.0).seeds_needed is None
    assert SeedMean(0.1, 0.0, 3, 1e-5, 0.0).varies


def test_an_interval_of_few_seeds_ends_where_a_difference_of_shares_can():
    assert SeedMean(-0.5, 0.3, 2, 0.045, 0.0).interval == (-1, 1)


def test_the_seeds_needed_are_the_fewest_with_a_significant_equal_mean():
    mean = SeedMean(0.01, 0.01, 3, 0.01**2 / 3, 0.003**2)
    needed = mean.seeds_needed
    for seeds, significant in ((needed - 1, False), (needed, True)):
        again = SeedMean(0.01, 0.01, seeds, 0.01**2 / seeds, 0.003**2)
        assert (again.interval[0] > 0) == significant
    assert SeedMean(0.01, 0.01, 3, 0.01**2 / 3, 0.006**2).seeds_needed is None
