"""Progress: a bar on a terminal, else at most a line a minute; and one aligned line per epoch."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

from tqdm import tqdm

from pipeline.runtime.stage_times import resumed
from pipeline.runtime.time_left import Pace, about

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 60


def bar(
    items: Iterable[Item],
    description: str,
    total: int | None = None,
    seconds_left: Callable[[float], float | None] | None = None,
) -> Iterator[Item]:
    """Yield the items, with a progress bar if standard error is a terminal, and else at most a line
    a minute on standard output.

    Args:
        total: the number of items, if they have no length.
        seconds_left: estimates the time left by the share of the items that is done, for the line;
            by default, until the last item.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, description, total=total, leave=False)
        return
    total = total if total is not None else len(items) if hasattr(items, "__len__") else None
    seconds_left = seconds_left or partial(Pace().seconds_left, 1)
    printed = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        if time.perf_counter() - printed >= _SECONDS_BETWEEN_LINES:
            printed = time.perf_counter()
            left = seconds_left(done / total) if total else None
            ahead = "" if left is None else f"  {about(left)} left"
            print(
                f"  {description}: {done:,}{f' of {total:,}' if total else ''}{ahead}", flush=True
            )


class EpochLog:
    """Print one aligned line per epoch on standard output, with the time left of the training."""

    def __init__(self, epochs: int):
        self._width = len(str(epochs))
        self._epochs = epochs
        self._start, self._pace = time.perf_counter(), Pace()

    def resume(self, done: int) -> None:
        """Say that the training continues after so many epochs of an earlier run."""
        print(f"  resumes after epoch {done} of {self._epochs}", flush=True)
        resumed()

    def steps(self, batches: Iterable[Item], epoch: int, total: int) -> Iterator[Item]:
        """Yield an epoch's batches, with a bar, or a line a minute with the time left of the whole
        training."""
        seconds_left = partial(self._pace.seconds_left, self._epochs - epoch + 1)
        return bar(batches, f"epoch {epoch}", total, seconds_left)

    def line(self, epoch: int, **values: float) -> None:
        """Print an epoch, counted from 1, with its values and the seconds so far."""
        self._pace.unit_done()
        figures = "".join(
            f"  {name.replace('_', ' ')} {value:7.4f}" for name, value in values.items()
        )
        seconds = time.perf_counter() - self._start
        left = self._pace.seconds_left(self._epochs - epoch)
        ahead = f"  {about(left)} left" if epoch < self._epochs else ""
        print(
            f"  epoch {epoch:{self._width}}/{self._epochs}{figures}  {seconds:7.1f} s{ahead}",
            flush=True,
        )
