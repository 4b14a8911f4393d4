"""Views without RandAugment and mixing."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.runtime.derived_random import permutation
from pipeline.views import geometry
from pipeline.views.geometry import apply_views, view_entries
from pipeline.views.policy import PADDING, POLICIES, ViewPolicy

IMAGES = torch.from_numpy(
    np.random.default_rng(0).integers(0, 256, (40, 3, 12, 12), dtype=np.uint8)
)


def defined_view(image: np.ndarray, entry: int) -> np.ndarray:
    """Make one view pixel by pixel, as docs/soft_targets_format.md defines it."""
    flip, shift = divmod(entry, 81)
    top, left = divmod(shift, 9)
    view = np.zeros_like(image)
    height, width = image.shape[1:]
    for y in range(height):
        for x in range(width):
            source_y, source_x = y + top - PADDING, x + left - PADDING
            if 0 <= source_y < height and 0 <= source_x < width:
                view[:, y, width - 1 - x if flip else x] = image[:, source_y, source_x]
    return view


@pytest.mark.parametrize("policy", ["crop", "crop_flip"])
def test_views_are_the_pixels_of_their_definition(policy):
    samples = np.arange(40)
    for view in (0, 1, 5, 163):
        entries = view_entries(policy, 3, view, samples)
        views = apply_views(IMAGES, ViewPolicy(policy), 3, view, samples).numpy()
        for image, entry, pixels in zip(IMAGES.numpy(), entries, views, strict=True):
            assert np.array_equal(pixels, defined_view(image, entry))


def test_policy_none_shows_the_unchanged_image():
    assert torch.equal(apply_views(IMAGES, ViewPolicy("none"), 3, 5, np.arange(40)), IMAGES)


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


@pytest.mark.parametrize("changed", [{"seed": 4}, {"view": 2}, {"policy": "crop"}])
def test_another_seed_view_or_policy_gives_other_views(changed):
    key = {"policy": "crop_flip", "seed": 3, "view": 1} | changed
    samples = np.arange(40)
    views = apply_views(IMAGES, ViewPolicy(key["policy"]), key["seed"], key["view"], samples)
    assert not torch.equal(views, apply_views(IMAGES, ViewPolicy("crop_flip"), 3, 1, samples))


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_views_are_identical_for_any_batch_size_and_order(batch_size):
    whole = apply_views(IMAGES, ViewPolicy("crop_flip"), 3, 1, np.arange(40))
    order = permutation(40, batch_size)
    for start in range(0, 40, batch_size):
        samples = order[start : start + batch_size]
        assert torch.equal(
            apply_views(IMAGES[samples], ViewPolicy("crop_flip"), 3, 1, samples), whole[samples]
        )


class _ViewsInWorkers(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitems__(self, samples):
        samples = np.array(samples)
        return list(apply_views(IMAGES[samples], ViewPolicy("crop_flip"), 3, 1, samples))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_views_are_identical_for_any_worker_count(workers):
    loader = DataLoader(_ViewsInWorkers(), batch_size=6, num_workers=workers)
    whole = apply_views(IMAGES, ViewPolicy("crop_flip"), 3, 1, np.arange(40))
    assert torch.equal(torch.cat(list(loader)), whole)


def test_applying_views_does_not_change_the_images():
    before = IMAGES.clone()
    apply_views(IMAGES, ViewPolicy("crop_flip"), 0, 0, np.arange(40))
    assert torch.equal(IMAGES, before)


def test_crops_one_by_one_equal_crops_at_once():
    rng = np.random.default_rng(0)
    padded = torch.from_numpy(rng.integers(0, 256, (40, 3, 24, 20), np.uint8))
    top, left = rng.integers(0, 9, (2, 40))
    flip = rng.integers(0, 2, 40)
    one_by_one = geometry._windows_one_by_one(padded, top, left, flip)
    assert torch.equal(one_by_one, geometry._windows_at_once(padded, top, left, flip))
    assert one_by_one.shape == (40, 3, 16, 12)
