"""Progress: a bar on a terminal, one aligned line per epoch everywhere else and after it."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def bar(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a progress bar if standard error is a terminal."""
    return iter(tqdm(items, description, total=total, leave=False, disable=not sys.stderr.isatty()))


class EpochLog:
    """One aligned line per epoch, on standard output."""

    def __init__(self, epochs: int):
        self._width = len(str(epochs))
        self._epochs = epochs
        self._start = time.perf_counter()

    def line(self, epoch: int, **values: float) -> None:
        """Args: epoch: counted from 1."""
        figures = "".join(
            f"  {name.replace('_', ' ')} {value:7.4f}" for name, value in values.items()
        )
        seconds = time.perf_counter() - self._start
        print(
            f"  epoch {epoch:{self._width}}/{self._epochs}{figures}  {seconds:7.1f} s", flush=True
        )
