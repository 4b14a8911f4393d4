"""The view plan: a pure function of (policy, seed, view, sample), from parameters to pixels.

Views are derived, never drawn: the same uint8 pixels come out for any batch size, order, worker
or process, on any device. Views are numbered from 0 without end; a finite policy visits each of
its distinct views once per cycle, in an order of its own for every sample and every cycle.

Contract code: an edit here runs the teacher again. Imports neither ours nor torch (a tensor's
methods suffice), so that parameters can be checked without waiting for torch to load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

PADDING = 4  # pixels on every side, filled with black
_SHIFTS = 2 * PADDING + 1

#: Number of distinct views of each policy.
POLICIES: dict[str, int | None] = {
    "none": 1,
    "crop": _SHIFTS**2,
    "crop_flip": 2 * _SHIFTS**2,
    "random_resized_crop": None,  # no end of them
}

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHUFFLE_ROUNDS = 24


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser chained over the words; uint64.

    Words are integers in [0, 2**64), or arrays of them that broadcast together.
    Source: Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = (state ^ np.asarray(word).astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permutation(length: int, *words: int) -> np.ndarray:
    """A permutation of range(length), int64, derived from the words."""
    return np.argsort(hash64(*words, np.arange(length)), kind="stable")


def view_entries(policy: str, seed: int, view: int, samples: np.ndarray) -> np.ndarray:
    """Which of the policy's distinct views is view number `view` of each sample.

    For a fixed sample, views c*D ... c*D + D-1 of a policy with D distinct views are a
    permutation of range(D), keyed by (seed, sample, cycle c): a swap-or-not shuffle
    (Hoang, Morris, Rogaway 2012, arXiv:1208.1176), which needs no table.

    Args:
        samples: [B] sample numbers.

    Returns:
        [B] int64 in [0, POLICIES[policy]).
    """
    distinct = POLICIES[policy]
    cycle, position = divmod(view, distinct)
    key = hash64(seed, cycle, samples)  # [B]
    entry = np.full(np.shape(samples), position, np.int64)
    for shuffle_round in range(_SHUFFLE_ROUNDS):
        pivot = (hash64(key, shuffle_round) % np.uint64(distinct)).astype(np.int64)
        partner = (pivot - entry) % distinct
        swap = hash64(key, shuffle_round, np.maximum(entry, partner)) & np.uint64(1)
        entry = np.where(swap == 1, partner, entry)
    return entry


def apply_views(images: Tensor, policy: str, seed: int, view: int, samples: np.ndarray) -> Tensor:
    """One view of each image.

    Args:
        images: [B, C, H, W] uint8, the images of `samples`.
        samples: [B] sample numbers.

    Returns:
        [B, C, H, W] uint8, on the images' device.
    """
    if policy == "none":
        return images
    entries = view_entries(policy, seed, view, samples)
    flip, shift = np.divmod(entries, _SHIFTS**2)  # `crop` has no entry that flips
    top, left = np.divmod(shift, _SHIFTS)
    return _crop_and_flip(images, top, left, flip)


def _crop_and_flip(images: Tensor, top: np.ndarray, left: np.ndarray, flip: np.ndarray) -> Tensor:
    batch, channels, height, width = images.shape
    padded = images.new_zeros(batch, channels, height + 2 * PADDING, width + 2 * PADDING)
    padded[:, :, PADDING:-PADDING, PADDING:-PADDING] = images
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 9, 9, H, W], no copy
    views = windows[np.arange(batch), :, top, left]  # [B, C, H, W]
    flipped = np.flatnonzero(flip)
    views[flipped] = views[flipped].flip(3)
    return views


_TRIES = 10
_AREA = (0.08, 1.0)
_LOG_RATIO = (np.log(3 / 4), np.log(4 / 3))


def boxes(policy: str, seed: int, view: int, samples: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The part of each image that `random_resized_crop` shows: 0.08 to 1 of its area, of aspect
    ratio 3/4 to 4/3, log-uniform; the middle where 10 tries give no such part.

    Args:
        samples: [B] sample numbers.
        sizes: [B, 2] height and width of the images.

    Returns:
        [B, 4] int64: top, left, height, width.
    """
    height, width = (sizes[:, axis].astype(np.int64) for axis in (0, 1))
    key = hash64(seed, view, samples)
    tries = np.arange(_TRIES)[:, None]
    area = height * width * _between(*_AREA, _uniform(key, tries, 0))  # [tries, B]
    ratio = np.exp(_between(*_LOG_RATIO, _uniform(key, tries, 1)))
    wide = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    high = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (wide > 0) & (wide <= width) & (high > 0) & (high <= height)
    chosen, row = fits.argmax(0), np.arange(len(samples))
    wide, high = wide[chosen, row], high[chosen, row]
    top = np.floor(_uniform(key, _TRIES, 2) * (height - high + 1)).astype(np.int64)
    left = np.floor(_uniform(key, _TRIES, 3) * (width - wide + 1)).astype(np.int64)
    high_limit = np.rint(np.minimum(height, width * 4 / 3)).astype(np.int64)
    wide_limit = np.rint(np.minimum(width, height * 4 / 3)).astype(np.int64)
    middle = np.stack(
        [(height - high_limit) // 2, (width - wide_limit) // 2, high_limit, wide_limit], 1
    )
    return np.where(fits.any(0)[:, None], np.stack([top, left, high, wide], 1), middle)


def mirrored(policy: str, seed: int, view: int, samples: np.ndarray) -> np.ndarray:
    """[B] bool: which samples' views `random_resized_crop` mirrors, half of them."""
    return _uniform(hash64(seed, view, samples), _TRIES, 4) < 0.5


def _uniform(*words: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1)."""
    return (hash64(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _between(low: float, high: float, uniform: np.ndarray) -> np.ndarray:
    return low + (high - low) * uniform
