"""Hashes and permutations that depend on integers alone: never on worker, rank or order."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """Hash the words to uint64: SplitMix64's finaliser, chained over them.

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
    """Permute range(length), int64, as the words decide."""
    return np.argsort(hash64(*words, np.arange(length)), kind="stable")
