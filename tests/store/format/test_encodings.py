"""An encoded row keeps the kept logits exactly, and the tail in two sums."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.store.format.encodings import columns, decode, encode, id_bits, row_bytes
from pipeline.store.writing.fidelity import store_fidelity

LARGEST = 65504.0  # of float16

ANY_LOGITS = st.floats(-LARGEST, LARGEST, width=32)
COMMON_LOGITS = st.floats(-80, 80, width=32)
TIES = st.sampled_from([0.0, -0.0, 1.0, 1.0001, -80.0, 80.0])
EDGES = st.sampled_from([LARGEST, -LARGEST, 65503.9, 6e-8, -6e-8, 2**-14, 0.0])


@st.composite
def rows(draw, logits=ANY_LOGITS | TIES | EDGES):
    """(logits [n, C] float32, labels [n] with -1 among them, k)"""
    count, num_classes = draw(st.integers(0, 5)), draw(st.integers(2, 40))
    elements = draw(
        st.sampled_from([logits, TIES, st.just(draw(logits))])
    )  # the last draws constant rows
    values = draw(arrays(np.float32, (count, num_classes), elements=elements))
    labels = draw(arrays(np.int64, count, elements=st.integers(-1, num_classes - 1)))
    return values, labels, draw(st.integers(1, num_classes))


def kept_classes(row: np.ndarray, label: int, k: int) -> tuple[list[int], set[int]]:
    """The k largest stored logits (ties: lowest class first), and these with the label."""
    half = row.astype(np.float16)
    largest = sorted(range(len(row)), key=lambda c: (-float(half[c]), c))[:k]
    return largest, {*largest, *([int(label)] if label >= 0 else [])}


def tail_log_sum_exp(row: np.ndarray, kept: set[int], temperature: float) -> float:
    tail = np.array([row[c] for c in range(len(row)) if c not in kept], np.float64)
    return float(np.logaddexp.reduce(tail / temperature)) if len(tail) else -np.inf


@given(rows(), st.sampled_from([0.25, 1.0, 2.0, 4.0, 100.0]))
def test_kept_logits_are_decoded_exactly_and_no_other_class_counts_as_kept(case, temperature):
    logits, labels, k = case
    dense, kept = decode(
        encode(logits, labels, "top_k", k), labels, logits.shape[1], temperature=temperature
    )
    assert dense.dtype == np.float32
    assert np.isfinite(dense).all()
    for i, row in enumerate(logits):
        expected = kept_classes(row, labels[i], k)[1]
        assert set(np.flatnonzero(kept[i])) == expected
        for c in expected:
            assert dense[i, c] == np.float32(np.float16(row[c]))


@given(rows(), st.sampled_from([0.1, 0.5, 0.99]))
def test_below_temperature_1_the_tail_is_not_extrapolated(case, temperature):
    logits, labels, k = case
    arrays, classes = encode(logits, labels, "top_k", k), logits.shape[1]
    at_1 = decode(arrays, labels, classes, temperature=1.0)
    below = decode(arrays, labels, classes, temperature=temperature)
    assert all(map(np.array_equal, below, at_1))


@given(rows(), st.sampled_from([0.5, 1.0, 4.0]))
def test_top_k_of_all_classes_is_dense(case, temperature):
    logits, labels, _ = case
    num_classes = logits.shape[1]
    all_kept = encode(logits, labels, "top_k", num_classes)
    dense = encode(logits, labels, "dense", None)
    decoded, kept = decode(all_kept, labels, num_classes, temperature=temperature)
    assert kept.all()
    expected, nothing = decode(dense, labels, num_classes, temperature=temperature)
    assert nothing is None
    assert np.array_equal(
        decoded.view(np.uint32), expected.view(np.uint32)
    )  # compares signs of zero too


@given(rows())
def test_ids_are_stored_largest_logit_first_and_lowest_id_first_among_ties(case):
    logits, labels, k = case
    bits, packed = id_bits(logits.shape[1]), encode(logits, labels, "top_k", k)["class_ids"]
    for i, row in enumerate(logits):
        number = int.from_bytes(packed[i].tobytes(), "little")
        ids = [(number >> (bits * j)) % 2**bits for j in range(k)]
        assert ids == kept_classes(row, labels[i], k)[0]
        assert number >> (bits * k) == 0


@given(rows(COMMON_LOGITS | TIES))
def test_the_tail_keeps_its_mass_at_temperature_1(case):
    logits, labels, k = case
    dense, kept = decode(
        encode(logits, labels, "top_k", k), labels, logits.shape[1], temperature=1.0
    )
    for i, row in enumerate(logits):
        expected = tail_log_sum_exp(row, kept_classes(row, labels[i], k)[1], 1.0)
        stored = tail_log_sum_exp(dense[i], set(np.flatnonzero(kept[i])), 1.0)
        # Half a step of float16 below 128, and half a step for the bound by the k-th logit.
        assert stored == expected or abs(stored - expected) < 0.065


@given(rows(COMMON_LOGITS | TIES))
def test_the_tail_keeps_its_mass_at_high_temperatures(case):
    logits, labels, k = case
    temperature = 1e4
    dense, kept = decode(
        encode(logits, labels, "top_k", k), labels, logits.shape[1], temperature=temperature
    )
    for i, row in enumerate(logits):
        expected = tail_log_sum_exp(row, kept_classes(row, labels[i], k)[1], temperature)
        stored = tail_log_sum_exp(dense[i], set(np.flatnonzero(kept[i])), temperature)
        assert stored == expected or abs(stored - expected) < 1e-3


@given(rows(), st.sampled_from([0.1, 1.0, 4.0]))
def test_no_tail_class_is_above_the_smallest_of_the_k(case, temperature):
    logits, labels, k = case
    dense, kept = decode(
        encode(logits, labels, "top_k", k), labels, logits.shape[1], temperature=temperature
    )
    for i, row in enumerate(logits):
        smallest = np.float16(row[kept_classes(row, labels[i], k)[0][-1]])
        assert (dense[i][~kept[i]] <= smallest).all()


@given(rows())
def test_a_row_is_encoded_independently_of_the_other_rows(case):
    logits, labels, k = case
    together = encode(logits, labels, "top_k", k)
    for i in range(len(logits)):
        alone = encode(logits[i : i + 1], labels[i : i + 1], "top_k", k)
        for name, array in together.items():
            assert np.array_equal(array[i : i + 1], alone[name])


@given(rows(), st.sampled_from(["dense", "top_k"]))
def test_the_arrays_have_the_columns_and_bytes_that_are_announced(case, encoding):
    logits, labels, k = case
    k = k if encoding == "top_k" else None
    arrays = encode(logits, labels, encoding, k)
    announced = columns(encoding, logits.shape[1], k)
    assert {name: (a.shape[1], a.dtype) for name, a in arrays.items()} == announced
    assert sum(a.nbytes for a in arrays.values()) == len(logits) * row_bytes(
        encoding, logits.shape[1], k
    )
    assert all(a.flags.c_contiguous for a in arrays.values())


@settings(max_examples=20)
@given(st.integers(2, 17), st.integers(1, 40), st.randoms(use_true_random=False))
def test_ids_of_any_width_are_packed_without_loss(bits, k, random):
    num_classes = 2**bits
    k = min(k, num_classes)
    logits = np.zeros((2, num_classes), np.float32)
    for row in logits:
        row[random.sample(range(num_classes), k)] = np.arange(k, 0, -1)
    labels = np.full(2, -1)
    arrays = encode(logits, labels, "top_k", k)
    _, kept = decode(arrays, labels, num_classes, temperature=1.0)
    assert np.array_equal(kept, logits > 0)


def test_a_row_computed_by_hand():
    logits = np.array([[0.0, 3.0, 1.0, 2.0, -1.0]], np.float32)
    arrays = encode(logits, np.array([4]), "top_k", 2)
    assert arrays["class_ids"].tolist() == [[1 | 3 << 3]]  # two ids of three bits
    tail = np.log(np.exp(0) + np.exp(1))  # classes 0 and 2; the label is 4
    np.testing.assert_allclose(arrays["values"], [[3, 2, -1, tail, 0.5]], rtol=1e-3)
    dense, kept = decode(arrays, np.array([4]), 5, temperature=2.0)
    each = 0.5 + (tail - np.log(2) - 0.5) / 2
    np.testing.assert_allclose(dense, [[each, 3, each, 2, -1]], rtol=1e-3)
    assert kept.tolist() == [[False, True, False, True, True]]


def test_an_unlabelled_sample_stores_its_largest_logit_instead_of_the_labels():
    logits = np.array([[0.0, 3.0, 1.0, 2.0, -1.0]], np.float32)
    values = encode(logits, np.array([-1]), "top_k", 2)["values"][0]
    assert values[:3].tolist() == [3, 2, 3]
    np.testing.assert_allclose(values[4], 0)  # the mean of classes 0, 2 and 4


def test_a_class_id_above_the_last_class_is_refused():
    arrays = encode(np.array([[0.0, 3.0, 1.0]], np.float32), np.array([0]), "top_k", 1)
    arrays["class_ids"][0, 0] = 3  # fits in two bits, but there are three classes
    with pytest.raises(ValueError, match="class id 3 of 3 classes"):
        decode(arrays, np.array([0]), 3, temperature=1.0)


@pytest.mark.parametrize(("num_classes", "bits"), [(2, 1), (3, 2), (10, 4), (1000, 10), (1024, 10)])
def test_an_id_takes_as_few_bits_as_the_number_of_classes_allows(num_classes, bits):
    assert id_bits(num_classes) == bits


def test_ten_of_1000_classes_take_39_bytes():
    assert row_bytes("top_k", 1000, 10) == 39


def test_fidelity_is_the_divergence_of_the_rows_that_a_student_reads():
    logits = np.random.default_rng(0).normal(0, 3, (200, 50)).astype(np.float32)
    labels = np.arange(200) % 50
    dense = store_fidelity(logits, labels, encode(logits, labels, "dense", None))
    kept_all = store_fidelity(logits, labels, encode(logits, labels, "top_k", 50))
    few = store_fidelity(logits, labels, encode(logits, labels, "top_k", 5))
    assert dense == kept_all
    assert dense["kl_at_temperature_1"] < 1e-5
    assert dense["agreement"] == few["agreement"] == 1.0
    # Hand-computed at T = 2: the tail's mass is spread evenly over its classes.
    arrays = encode(logits, labels, "top_k", 5)
    decoded, _ = decode(arrays, labels, 50, temperature=2.0)
    p, q = (np.exp(x.astype(np.float64) / 2) for x in (logits, decoded))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert few["kl_at_temperature_2"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-3)
