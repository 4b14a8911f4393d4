"""The unmixed pixels of a view: a pure function of (policy, seed, view, sample).

Views are derived, never drawn: the same uint8 pixels come out for any batch size, order, worker,
process or device. Views are numbered from 0 without end. A policy with finitely many views visits
each of them once per cycle, in another order for every sample and every cycle. The numbers that
make a view are planned on the host for many batches at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.compute.device import to_device
from pipeline.runtime.derived_random import hash64
from pipeline.views import rand_augment
from pipeline.views.policy import PADDING, POLICIES, SHIFTS, ViewPolicy
from pipeline.views.rand_augment import AugmentPlan
from pipeline.views.random_numbers import (
    BOX,
    FLIP,
    RAND_AUGMENT,
    uniform,
    uniform_int,
    view_numbers,
)
from pipeline.views.resampling import counting, resize_boxes

_SHUFFLE_ROUNDS = 24
_AREAS = (0.08, 1.0)  # share of the image's area
_LOG_RATIO = 0.28768207245178096  # of 4/3: the width is 3/4 to 4/3 of the height
_TRIES = 10


def view_entries(geometry: str, seed: int, view: int, samples: np.ndarray) -> np.ndarray:
    """Choose one of the geometry's distinct views for view number `view` of each sample.

    For a fixed sample, views c*D ... c*D + D-1 of a policy with D distinct views are a
    permutation of range(D), keyed by (seed, sample, cycle c): a swap-or-not shuffle
    (Hoang, Morris, Rogaway 2012, arXiv:1208.1176), which needs no table.

    Returns:
        [B] int64 in [0, POLICIES[geometry]).
    """
    distinct = POLICIES[geometry]
    cycle, position = divmod(view, distinct)
    key = hash64(seed, cycle, samples)  # [B]
    entry = np.full(np.shape(samples), position, np.int64)
    for shuffle_round in range(_SHUFFLE_ROUNDS):
        pivot = (hash64(key, shuffle_round) % np.uint64(distinct)).astype(np.int64)
        partner = (pivot - entry) % distinct
        swap = hash64(key, shuffle_round, np.maximum(entry, partner)) & np.uint64(1)
        entry = np.where(swap == 1, partner, entry)
    return entry


def crop_boxes(seed: int, view: int, samples: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Choose the box that `random_resized_crop` cuts out of each image.

    A box has 8 to 100 % of the image's area, and a ratio of width to height that is log-uniform in
    3/4 to 4/3. Of 10 tries the first that fits is taken, anywhere in the image; if none fits, the
    middle of the image, with the allowed ratio nearest to the image's own (as in
    torchvision.transforms.RandomResizedCrop, after Szegedy et al. 2015, arXiv:1409.4842).

    Args:
        sizes: [B, 2] height and width of the samples' images in pixels.

    Returns:
        [B, 4] int64: top, left, height, width.
    """
    heights, widths = np.asarray(sizes, np.int64).T
    numbers = view_numbers(BOX, seed, view, samples, 4 * _TRIES)
    numbers = numbers.reshape(_TRIES, 4, len(samples))
    least, most = _AREAS
    areas = (least + (most - least) * uniform(numbers[:, 0])) * (heights * widths)
    ratios = _exp(_LOG_RATIO * (2 * uniform(numbers[:, 1]) - 1))
    wide = np.rint(np.sqrt(areas * ratios)).astype(np.int64)  # [tries, B]
    high = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (wide > 0) & (wide <= widths) & (high > 0) & (high <= heights)
    first, each = fits.argmax(0), np.arange(len(samples))
    wide, high, numbers = wide[first, each], high[first, each], numbers[first, :, each]
    any_fits = fits.any(0)
    # The middle: the whole image if its ratio is allowed, else the most of its longer side.
    wide = np.where(any_fits, wide, np.minimum(widths, np.rint(heights * 4 / 3).astype(np.int64)))
    high = np.where(any_fits, high, np.minimum(heights, np.rint(widths * 4 / 3).astype(np.int64)))
    spare_rows, spare_columns = heights - high, widths - wide
    top = np.where(any_fits, uniform_int(numbers[:, 2], spare_rows + 1), spare_rows // 2)
    left = np.where(any_fits, uniform_int(numbers[:, 3], spare_columns + 1), spare_columns // 2)
    return np.stack([top, left, high, wide], 1)


def _exp(x: np.ndarray) -> np.ndarray:
    """e**x for |x| <= 0.3, by additions, products and quotients, which every processor rounds
    alike: libraries' exponentials differ in the last bit."""
    total = np.ones_like(x)
    for n in range(14, 0, -1):
        total = 1 + x * total / n
    return total


def flips(seed: int, view: int, samples: np.ndarray) -> np.ndarray:
    """[B] bool: whether a view of `random_resized_crop` is mirrored; half of them are."""
    return view_numbers(FLIP, seed, view, samples, 1)[0] % 2 == 1


@dataclass(frozen=True)
class ViewPlan:
    """How a batch of B images becomes views, up to a mix; tensors on the views' device."""

    geometry: str  # one of POLICIES
    #: [B, 3] int64 of a crop: top, left, whether it is mirrored; [B, 5] of a resized crop: top,
    #: left, height, width, whether it is mirrored; None: the whole image.
    places: Tensor | None
    augmentation: AugmentPlan | None


def plan_views(
    policy: ViewPolicy,
    seed: int,
    view: int,
    order: Sequence[np.ndarray],
    side: int,
    device: torch.device,
) -> list[ViewPlan]:
    """Plan one view of the samples of each batch: all in one computation, and in one copy to the
    device for each kind of numbers.

    Args:
        order: the sample numbers of each batch, [B] integers.
        side: of the images in pixels.
    """
    samples, sizes = np.concatenate(order), [len(part) for part in order]
    places = augmentations = [None] * len(order)
    if policy.geometry == "random_resized_crop":
        boxes = crop_boxes(seed, view, samples, np.full((len(samples), 2), side))
        numbers = np.column_stack([boxes, flips(seed, view, samples)])
        places = to_device(numbers, device).split(sizes)
    elif policy.geometry != "none":
        entries = view_entries(policy.geometry, seed, view, samples)
        flip, shift = np.divmod(entries, SHIFTS**2)  # `crop` has no entry that flips
        numbers = np.column_stack([*np.divmod(shift, SHIFTS), flip])
        places = to_device(numbers, device).split(sizes)
    if policy.rand_augment is not None:
        count, magnitude = policy.rand_augment
        drawn = view_numbers(RAND_AUGMENT, seed, view, samples, 2 * count)
        operations = uniform_int(drawn[::2], len(rand_augment.OPERATIONS))
        signs = 1 - 2 * uniform_int(drawn[1::2], 2)
        *arrays, counts = rand_augment.plan(operations, signs, sizes, magnitude, side)
        parts = (to_device(array, device).split(sizes, 1) for array in arrays)
        augmentations = map(AugmentPlan, repeat(magnitude), *parts, counts.tolist())
    return list(map(ViewPlan, repeat(policy.geometry), places, augmentations))


def apply_views(images: Tensor, plan: ViewPlan) -> Tensor:
    """Make the planned view of each image, [B, C, S, S] uint8, by geometry and RandAugment. (A mix
    needs the views of other samples: see mixing.py.)
    """
    pixels = images
    if plan.geometry == "random_resized_crop":
        mirrored = plan.places[:, 4] > 0
        pixels = resize_boxes(images, plan.places[:, :4], mirrored, images.shape[-1])
    elif plan.geometry != "none":
        cut = _windows_one_by_one if images.device.type == "cpu" else _windows_at_once
        pixels = cut(F.pad(images, [PADDING] * 4), plan.places)
    if plan.augmentation is not None:
        pixels = rand_augment.apply(pixels, plan.augmentation)
    return pixels


def _windows_one_by_one(padded: Tensor, places: Tensor) -> Tensor:
    """Copy row by row: on a CPU 3 (32 pixels) to 6 times (224) as fast as one index of all."""
    views = padded.new_empty(*padded.shape[:2], *(s - 2 * PADDING for s in padded.shape[2:]))
    height, width = views.shape[2:]
    source, target = padded.numpy(), views.numpy()
    for i, (y, x, mirror) in enumerate(places.tolist()):
        window = source[i, :, y : y + height, x : x + width]
        target[i] = window[:, :, ::-1] if mirror else window
    return views


def _windows_at_once(padded: Tensor, places: Tensor) -> Tensor:
    height, width = (side - 2 * PADDING for side in padded.shape[2:])
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 9, 9, H, W], no copy
    rows = counting(len(padded), 1, padded.device)
    top, left, flip = places.unbind(1)
    views = windows[rows, :, top, left]  # [B, C, H, W]
    return torch.where(flip[:, None, None, None] > 0, views.flip(3), views)
