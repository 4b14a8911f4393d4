"""Random numbers that are derived from words."""

import numpy as np

from pipeline.runtime.derived_random import hash64, permutation


def test_hash64_of_one_zero_is_splitmix64s_first_output():
    assert int(hash64(0)) == 0xE220A8397B1DCDAF


def test_a_permutation_contains_each_number_once_and_depends_on_every_word():
    assert np.array_equal(np.sort(permutation(1000, 1, 2)), np.arange(1000))
    assert not np.array_equal(permutation(1000, 1, 2), permutation(1000, 2, 1))
