"""The random numbers of a view, derived from (seed, view, sample) and the purpose they serve."""

import numpy as np

from pipeline.runtime.derived_random import hash64

# Purposes: the last word of the key that all numbers of one purpose are derived from.
BOX, FLIP, RAND_AUGMENT, PARTNER, WEIGHT, CENTRE = range(1, 7)


def view_numbers(purpose: int, seed: int, view: int, samples: np.ndarray, count: int) -> np.ndarray:
    """[count, B] uint64, independent and uniform."""
    return hash64(hash64(seed, view, samples, purpose), np.arange(count)[:, None])


def strong_seed(seed: int) -> int:
    """The seed of the strong views of a pair; the weak ones have the plan's own. No view has the
    number that is hashed."""
    return int(hash64(seed, 2**64 - 1))


def uniform(numbers: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1): the first 53 bits."""
    return (numbers >> np.uint64(11)) * 2.0**-53


def uniform_int(numbers: np.ndarray, count: int | np.ndarray) -> np.ndarray:
    """uint64 -> int64 in [0, count)."""
    return (numbers % np.asarray(count).astype(np.uint64)).astype(np.int64)
