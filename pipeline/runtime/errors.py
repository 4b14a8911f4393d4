"""Errors that the user can fix, and the words of messages: suggestions, numbers of things."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar
from unicodedata import normalize

Value = TypeVar("Value")


class UserError(Exception):
    """A message that says what was found, what was expected and what to do."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


#: What errors say if memory is short; those of torch's allocator for the CPU and of CUDA's
#: libraries have no class of their own.
_OUT_OF_MEMORY = (
    *("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "'out of memory'"),
    *("CUDA driver error: out of memory", "Triton Error [CUDA]: out of memory"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy or torch, which need not be loaded, is one of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def is_of_ended_worker(error: BaseException) -> bool:
    """Whether torch raised an error because a process that decodes images has ended. It does so
    within the signal of that process's end: in any line of the main thread."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def ended_worker(error: BaseException) -> str:
    return (
        f"a process that decodes images has ended ({error}); expected it to live as long "
        "as this one. Look at the machine's memory, and at its shared memory (/dev/shm)."
    )


def positive_int(text: str, name: str, meaning: str, most: int | None = None) -> int:
    """Read an integer from 1 to `most` that a user typed, and refuse anything else.

    Args:
        name, meaning: for the message: what was typed, and what was expected.
    """
    if not (text.isascii() and text.isdigit() and 0 < float(text) <= (most or sys.maxsize)):
        raise UserError(
            f"{name} is `{text}`; expected {meaning}, {f'1 to {most}' if most else '1 or more'}."
        )
    return int(text)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return `; did you mean X?` with the nearest known names, or an empty text."""
    nearest = get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(f'`{n}`' for n in nearest)}?" if nearest else ""


def look_alike(names: Iterable[str], others: Iterable[str]) -> str:
    """Return `; 'a' and 'b' look the same...` for the first two names that differ in nothing but
    composed characters, or an empty text."""
    composed = {normalize("NFC", name): name for name in others}
    for name in names:
        if (other := composed.get(normalize("NFC", name), name)) != name:
            return (
                f"; {str(name)!a} and {str(other)!a} look the same: one uses composed characters, "
                "the other does not"
            )
    return ""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: `1 image`, `1,200 images`, `0 classes`.

    Args:
        noun: for one; its last word is inflected for other numbers.
        plural: for other numbers, where more than the last word differs: `row is`, `rows are`.
    """
    if number == 1:
        return f"1 {noun}"
    if plural is None:
        plural = f"{noun}{'es' if noun.endswith(('s', 'x', 'tch')) else 's'}"
    return f"{number:,} {plural}"


def look_up(family: str, network: str, networks: Mapping[str, Value]) -> Value:
    """Return a network's entry in its family's table. Refuses a network that is not there."""
    if network not in networks:
        raise UserError(
            f"family `{family}` has no network `{network}`"
            f"{did_you_mean(network, list(networks)) or '.'} Known: {', '.join(networks)}."
        )
    return networks[network]
