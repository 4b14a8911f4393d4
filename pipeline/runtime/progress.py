"""Progress: a bar on a terminal, and one aligned line per epoch."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def bar(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items, with a progress bar if standard error is a terminal."""
    return iter(tqdm(items, description, total=total, leave=False, disable=not sys.stderr.isatty()))


def bar_or_lines(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yield the items, with a progress bar on a terminal, and else a line on standard output for
    every finished tenth of them."""
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
    """Print one aligned line per epoch on standard output."""

    def __init__(self, epochs: int):
        self._width = len(str(epochs))
        self._epochs = epochs
        self._start = time.perf_counter()

    def line(self, epoch: int, **values: float) -> None:
        """Print an epoch, counted from 1, with its values and the seconds so far."""
        figures = "".join(
            f"  {name.replace('_', ' ')} {value:7.4f}" for name, value in values.items()
        )
        seconds = time.perf_counter() - self._start
        print(
            f"  epoch {epoch:{self._width}}/{self._epochs}{figures}  {seconds:7.1f} s", flush=True
        )
