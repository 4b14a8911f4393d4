"""Views without RandAugment and mixing."""

import foreign_views
import numpy as np
import pytest
import torch

from pipeline.views import geometry
from pipeline.views.geometry import apply_views, view_entries
from pipeline.views.policy import POLICIES, ViewPolicy

IMAGES = torch.from_numpy(
    np.random.default_rng(0).integers(0, 256, (40, 3, 12, 12), dtype=np.uint8)
)


@pytest.mark.parametrize("policy", ["crop", "crop_flip"])
def test_views_of_any_cycle_are_the_pixels_of_their_definition(policy):
    for view in (0, 5, 163):
        views = apply_views(IMAGES, ViewPolicy(policy), 3, view, np.arange(40)).numpy()
        for sample, pixels in enumerate(views):
            expected = foreign_views.view_of(IMAGES.numpy(), policy, 3, view, sample)
            assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("policy", [name for name, count in POLICIES.items() if count])
@pytest.mark.parametrize("cycle", [0, 1])
def test_every_cycle_visits_each_distinct_view_of_each_sample_exactly_once(policy, cycle):
    distinct = POLICIES[policy]
    samples = np.array([0, 1, 17, 49_999, 1_281_166])
    views = range(cycle * distinct, (cycle + 1) * distinct)
    entries = np.stack([view_entries(policy, 11, view, samples) for view in views])
    assert np.array_equal(np.sort(entries, 0), np.tile(np.arange(distinct)[:, None], (1, 5)))


def test_entries_are_uniform_and_independent_of_one_another():
    samples = np.arange(162 * 200)
    first, second = (view_entries("crop_flip", 0, view, samples) for view in (0, 1))
    for values, cells in ((first, 162), ((second - first) % 162 - 1, 161)):
        counts = np.bincount(values, minlength=cells)
        expected = len(samples) / cells
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < cells + 5 * np.sqrt(2 * cells)


def test_crops_one_by_one_equal_crops_at_once():
    rng = np.random.default_rng(0)
    padded = torch.from_numpy(rng.integers(0, 256, (40, 3, 24, 20), np.uint8))
    top, left = rng.integers(0, 9, (2, 40))
    flip = rng.integers(0, 2, 40)
    one_by_one = geometry._windows_one_by_one(padded, top, left, flip)
    assert torch.equal(one_by_one, geometry._windows_at_once(padded, top, left, flip))
    assert one_by_one.shape == (40, 3, 16, 12)
