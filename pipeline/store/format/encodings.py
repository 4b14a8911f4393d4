"""Encode rows of logits: `dense` keeps every class, `top_k` the largest and two sums of the tail.

docs/soft_targets_format.md is normative. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

FLOAT16 = np.dtype("<f2")
BYTES = np.dtype("u1")
_LARGEST = float(np.finfo(FLOAT16).max)
_OFFSET = np.float32(64)
_CHUNK = 1024  # rows encoded at a time: bounds the memory, has no effect on the result


def id_bits(num_classes: int) -> int:
    """Bits of one packed class id."""
    return max(1, (num_classes - 1).bit_length())


def columns(encoding: str, num_classes: int, k: int | None) -> dict[str, tuple[int, np.dtype]]:
    """The arrays of an encoding, in their order: name -> (number of columns, type)."""
    if encoding == "dense":
        return {"logits": (num_classes, FLOAT16)}
    return {
        "class_ids": ((k * id_bits(num_classes) + 7) // 8, BYTES),
        "values": (k + 3, FLOAT16),
    }


def row_bytes(encoding: str, num_classes: int, k: int | None) -> int:
    return sum(
        width * dtype.itemsize for width, dtype in columns(encoding, num_classes, k).values()
    )


def encode(
    logits: np.ndarray, labels: np.ndarray, encoding: str, k: int | None
) -> dict[str, np.ndarray]:
    """Encode rows as a shard stores them.

    Args:
        logits: [n, C] float32, finite in float16: `less_offset`.
        labels: [n] int64; -1 for an unlabelled sample.
        k: 1 ... C for `top_k`, None for `dense`.

    Returns:
        The arrays of `columns`, contiguous, each [n, number of columns].
    """
    if encoding == "dense":
        return {"logits": np.ascontiguousarray(logits, FLOAT16)}
    num_rows, num_classes = logits.shape
    arrays = {
        name: np.empty((num_rows, width), dtype)
        for name, (width, dtype) in columns(encoding, num_classes, k).items()
    }
    for start in range(0, num_rows, _CHUNK):
        rows = slice(start, start + _CHUNK)
        ids, values = _top_k(logits[rows], labels[rows], k)
        arrays["class_ids"][rows] = _pack(ids, id_bits(num_classes))
        arrays["values"][rows] = values
    return arrays


def less_offset(logits: np.ndarray) -> np.ndarray:
    """Subtract a number from each row, which no softmax sees: the multiple of 64 nearest to its
    largest logit. [n, C] float32, as the argument.

    So a large number that all logits of a row share costs none of float16's digits, and the rows of
    most teachers (their largest within ±32) keep their bits. A row that float16 holds, but not
    less the multiple, stays.
    """
    nearest = _OFFSET * np.rint(logits.max(1, keepdims=True) / _OFFSET)
    fits = logits.min(1, keepdims=True) - nearest >= -_LARGEST
    return logits - np.where(fits, nearest, np.float32(0))


def decode(
    arrays: Mapping[str, np.ndarray],
    labels: np.ndarray,
    num_classes: int,
    *,
    temperature: float,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode logits of every class, for a softmax at one temperature.

    With `top_k`, a kept class has its logit. Every tail class has one value, which gives the tail
    its mass: mean + (lse - log m - mean) / T. This is the tail's cumulant generating function to
    second order, exact at T = 1 and as T goes to infinity. The value is at most the smallest of the
    k logits, which bounds every tail class.

    Args:
        arrays: n rows, as `encode` returns them.
        labels: [n] int64, the labels that the rows were encoded with.

    Returns:
        Logits [n, C] float32; and the kept classes [n, C] bool (the k and the label), or None for
        `dense`.

    Raises:
        ValueError: a class id is `num_classes` or more.
    """
    if "logits" in arrays:
        return arrays["logits"].astype(np.float32), None
    values = arrays["values"].astype(np.float32)  # [n, k + 3]
    num_rows, k = len(values), values.shape[1] - 3
    ids = np.empty((num_rows, k + 1), np.intp)  # the k classes, then the label
    ids[:, :k] = unpack_ids(arrays["class_ids"], k, num_classes)
    ids[:, k] = np.where(labels < 0, ids[:, 0], labels)
    if num_rows and ids.max() >= num_classes:
        raise ValueError(f"class id {ids.max()} of {num_classes} classes")
    label_is_among_the_k = (ids[:, :k] == ids[:, k:]).any(1)
    tail_size = num_classes - k - 1 + label_is_among_the_k
    mean = values[:, k + 2]
    excess = values[:, k + 1] - np.log(np.maximum(tail_size, 1), dtype=np.float32) - mean
    tail = np.minimum(mean + excess / np.float32(max(temperature, 1)), values[:, k - 1])

    dense = np.empty((num_rows, num_classes), np.float32)
    dense[:] = tail[:, None]
    kept = np.zeros((num_rows, num_classes), bool)
    ids += np.arange(num_rows)[:, None] * num_classes
    dense.reshape(-1)[ids] = values[:, : k + 1]
    kept.reshape(-1)[ids] = True
    return dense, kept


def _top_k(logits: np.ndarray, labels: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n, k], largest logit first (ties: lowest id first), and values [n, k + 3] float16."""
    rows = logits.astype(FLOAT16)
    ids = _largest(rows, k)
    label = np.where(labels < 0, ids[:, 0], labels)[:, None]  # [n, 1]
    in_tail = np.ones(logits.shape, bool)
    np.put_along_axis(in_tail, ids, False, 1)
    np.put_along_axis(in_tail, label, False, 1)
    values = np.zeros((len(rows), k + 3), FLOAT16)
    values[:, :k] = np.take_along_axis(rows, ids, 1)
    values[:, k : k + 1] = np.take_along_axis(rows, label, 1)
    count = np.count_nonzero(in_tail, axis=1)
    has_tail = count > 0  # in a row without a tail, both sums stay 0
    exact = logits.astype(np.float64)
    mean = np.where(in_tail, exact, 0).sum(1)[has_tail] / count[has_tail]
    exact[~in_tail] = -np.inf
    largest = exact.max(1)
    exact -= np.where(has_tail, largest, 0)[:, None]
    log_sum_exp = largest[has_tail] + np.log(np.exp(exact, out=exact).sum(1)[has_tail])
    for column, number in ((k + 1, log_sum_exp), (k + 2, mean)):
        values[has_tail, column] = np.clip(number, -_LARGEST, _LARGEST)
    return ids, values


def _largest(rows: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest, [n, k] int64; sorts unique keys, so ties have one order."""
    num_classes = rows.shape[1]
    bits = rows.view(np.int16)  # sign and magnitude; -0 and 0 become equal
    ordered = np.where(bits < 0, -(bits & 0x7FFF), bits).astype(np.int32) + 0x8000
    word, shift = (np.uint32, 16) if num_classes <= 2**16 else (np.uint64, 32)
    reversed_ids = np.arange(num_classes - 1, -1, -1, dtype=word)
    keys = (ordered.astype(word) << word(shift)) | reversed_ids
    keys = np.partition(keys, num_classes - k, axis=1)[:, num_classes - k :]
    keys.sort(axis=1)
    lowest_bits = keys[:, ::-1] & word(2**shift - 1)
    return num_classes - 1 - lowest_bits.astype(np.int64)


def _pack(ids: np.ndarray, bits: int) -> np.ndarray:
    """Pack ids: [n, k] -> [n, ceil(k * bits / 8)] uint8, the first id in the lowest bits."""
    spread = (ids[:, :, None] >> np.arange(bits)) & 1  # [n, k, bits], lowest first
    return np.packbits(spread.astype(np.uint8).reshape(len(ids), -1), axis=1, bitorder="little")


def unpack_ids(packed: np.ndarray, k: int, num_classes: int) -> np.ndarray:
    """Unpack `class_ids` of n rows: [n, k] int64, largest logit first. Does not check the ids."""
    bits = id_bits(num_classes)
    positions, shifts = _byte_positions(k, bits)
    # Beyond the last byte, `clip` repeats it, above the bits of every id.
    parts = packed.take(positions, axis=1, mode="clip").astype(np.int64)  # [n, bytes, k]
    parts <<= 8 * np.arange(len(positions))[:, None]
    return (parts.sum(1) >> shifts) & ((1 << bits) - 1)


@lru_cache
def _byte_positions(k: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes that hold each id, [bytes, k], and its lowest bit in the first of them, [k]."""
    first, shifts = np.divmod(np.arange(k) * bits, 8)
    return first + np.arange((bits + 14) // 8)[:, None], shifts
