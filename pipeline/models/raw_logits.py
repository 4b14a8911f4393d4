"""Recognise numbers that are no raw logits: probabilities, percentages, sigmoids, hard labels.

A softmax of probabilities is nearly uniform and has the same argmax, so accuracy does not show the
mistake. The numbers alone decide; where they came from does not matter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.runtime.errors import UserError

_MOST_ROWS = 4096  # looked at, evenly spread
_FEW_ROWS = 8  # fewer have one sum too easily
_SCALES = {1: "probabilities", 100: "percentages", 255: "probabilities in 255ths"}
_SHOWN = 5  # numbers of the example
_NARROW = 65_440  # a row's span that fits into float16 less the multiple of 64 of its store


@dataclass(frozen=True)
class OtherNumbers:
    """What rows are instead of logits."""

    kind: str  # continues a sentence: "holds ...", "returns ..."
    row: int  # of an example
    example: str  # its first numbers


def recognise(rows: np.ndarray) -> OtherNumbers | None:
    """Say what rows are if they are no raw logits; None if they may be.

    Logarithms of probabilities are logits. Logits of a network that ends in a ReLU are not
    negative, but have neither one sum nor a scale.

    Args:
        rows: [n, C] numbers; rows that are not finite are left out.
    """
    numbers = np.arange(0, len(rows), max(1, len(rows) // _MOST_ROWS))
    rows = np.asarray(rows[numbers], np.float64)
    finite = np.isfinite(rows).all(1)
    numbers, rows = numbers[finite], rows[finite]
    if not len(rows) or rows.shape[1] < 2:
        return None
    kind = _hard_labels(rows) or _one_sum(rows) or _one_scale(rows)
    if kind is None:
        return None
    row = int(np.ptp(rows, axis=1).argmax())
    return OtherNumbers(kind, int(numbers[row]), some_numbers(rows[row]))


def check_raw(
    rows: np.ndarray, subject: str, advice: str, row_name: Callable[[int], str] | None = None
) -> None:
    """Refuse rows that are no raw logits.

    Args:
        rows: [n, C] numbers.
        subject: the start of the message, with its verb: "`table.csv` holds".
        advice: what to change.
        row_name: the name of a row, by its number.

    Raises:
        UserError: says what the rows are, and shows one.
    """
    found = recognise(rows)
    if found is not None:
        name = f" of {row_name(found.row)}" if row_name else ""
        raise UserError(
            f"{subject} {found.kind}; expected logits. {advice} One of the rows{name}: "
            f"{found.example}."
        )


def advice_for_network(family: str, network: str) -> str:
    """Say what to change in a network that does not return raw logits."""
    if family == "onnx":
        return "Export the network without its last softmax or sigmoid."
    return (
        f"Let `{network}` of pipeline/networks/{family}.py return the input of its last softmax or "
        "sigmoid."
    )


def beyond_float16(logits: np.ndarray) -> np.ndarray:
    """Find the logits that cannot be stored, [n, C]: not finite, or beyond float16 in a row that is
    too wide to be moved into it."""
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = np.ptp(logits, axis=1, keepdims=True) <= _NARROW  # false if not finite
        if narrow.all():
            return np.zeros(logits.shape, bool)
        return ~(narrow | np.isfinite(logits.astype(np.float16)))


def some_numbers(row: np.ndarray) -> str:
    """The first numbers of a row, rounded, for a message."""
    more = ", ..." if len(row) > _SHOWN else ""
    return "[" + ", ".join(f"{number:.4g}" for number in row[:_SHOWN].tolist()) + more + "]"


def _vary(rows: np.ndarray) -> bool:
    """False for one row, or for a network that returns the same for all images."""
    return bool((rows != rows[0]).any())


def _hard_labels(rows: np.ndarray) -> str | None:
    """0 and 1, 100 or 255 alone: one-hot labels, or several labels a row. Two other numbers may be
    the logits of a rule: their softmax is what it says."""
    low, high = rows.min(), rows.max()
    if low != 0 or high not in _SCALES or not ((rows == low) | (rows == high)).all():
        return None
    labelled = (rows == high).any(1)
    if not _vary(rows) or labelled.sum() < max(2, len(rows) / 2):
        return None  # a network that returns the same for all images, or nothing for most
    return f"hard labels, which are 0 or {high:.4g}"


def _one_sum(rows: np.ndarray) -> str | None:
    """Nothing negative, and rows of one sum: probabilities of any scale."""
    if rows.min() < 0:
        return None
    sums = rows.sum(1)
    total = float(np.median(sums))
    near = np.abs(sums - total) <= 0.02 * total  # rounded to few digits, or half precision
    if total <= 0 or near.mean() < 0.9:
        return None
    scale = next((s for s in _SCALES if abs(total - s) <= 0.02 * s), None)
    if len(rows) < _FEW_ROWS:
        rounding = 1e-5 if len(rows) == 1 else 1e-3
        if scale is None or (np.abs(sums - scale) > rounding * scale).any():
            return None
    # Independent numbers would have sums that vary as much as all of them together.
    elif not _vary(rows) or sums[near].var() > 0.01 * rows[near].var(0).sum():
        return None
    # Training by cross-entropy keeps the sum of a row's logits nearly constant; so a large number
    # that they share does not make them probabilities, which have some near 0.
    # Two numbers of an unknown scale are the logits of a rule.
    is_rule = scale is None and ((rows == 0) | (rows == rows.max())).all()
    if is_rule or (scale != 1 and rows.min() > 0.3 * total / rows.shape[1]):
        return None
    name = "scaled probabilities" if scale is None else _SCALES[scale]
    return f"{name}, which are not negative and add up to {scale or f'{total:.4g}'}"


def _one_scale(rows: np.ndarray) -> str | None:
    """Numbers from 0 to 1, 100 or 255, as of a sigmoid, or of a softmax's largest alone."""
    if len(rows) < _FEW_ROWS or rows.min() < 0:
        return None
    highest, lowest = rows.max(0), rows.min(0)  # [C]
    scale = next((s for s in _SCALES if highest.max() <= 1.001 * s), None)
    if scale is None:
        return None
    # A network that ends in a ReLU may stay within a scale by chance. But it hardly has several
    # classes with nearly all of it in one image and nearly nothing in another; and if it has, many
    # of its numbers are exactly 0, and few rows reach the end of the scale.
    decided = (highest >= 0.7 * scale) & (lowest <= 0.3 * scale)
    saturated = highest.max() >= 0.99 * scale and np.mean(rows.max(1) >= 0.9 * scale) >= 0.2
    of_sigmoid = scale == 1 and np.mean(rows == 0) < 0.1
    if decided.sum() < 2 or not (saturated or of_sigmoid):
        return None
    return f"numbers from 0 to {scale}, as of a sigmoid or of some of a row's {_SCALES[scale]}"
