"""Progress: a bar on a terminal, one aligned line per epoch everywhere else and after it."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def bar(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a progress bar if standard error is a terminal."""
    return iter(tqdm(items, description, total=total, leave=False, disable=not sys.stderr.isatty()))


def bar_or_tenths(items: Sequence[Item], description: str) -> Iterator[Item]:
    """The items, with a progress bar as above, or else a line on standard output for every tenth
    of them that is done."""
    if sys.stderr.isatty():
        yield from bar(items, description)
        return
    start, count = time.perf_counter(), len(items)
    for done, item in enumerate(items, 1):
        yield item
        if 10 * done // count > 10 * (done - 1) // count:
            seconds = time.perf_counter() - start
            print(f"  {description} {done:{len(str(count))}}/{count}  {seconds:9.1f} s", flush=True)


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
