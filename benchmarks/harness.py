"""Compare sides in one run: alternate them, print a table of medians, write JSON if asked.

A benchmark has a docstring with its command, what it compares and the last figures; a function
`measure(arguments)` that yields the rows of its tables; and one call of `run_benchmark`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy import stats

from pipeline.comparison.measurement.latency import median_interval

Row = Mapping[str, Any]
Side = Callable[[int], object]  # takes the number of the round


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % interval, by order statistics: no distribution is assumed."""

    width: ClassVar[int] = 24  # of its column, in letters

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def median(values: Sequence[float]) -> Interval:
    return Interval(*median_interval(values))


def mean_interval(points: np.ndarray) -> str:
    """The mean and its 95 % interval by Student's t."""
    half = stats.t.ppf(0.975, len(points) - 1) * stats.sem(points)
    mean = points.mean()
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def alternate(sides: Mapping[str, Side], rounds: int, *, warm_up: int = 1) -> dict[str, np.ndarray]:
    """Time all sides in every round, another one first each time; returns the seconds of each,
    [rounds].

    Args:
        warm_up: rounds before, which set things up and are not timed.
    """
    names = list(sides)
    times = {name: np.empty(rounds) for name in names}
    for turn in range(-warm_up, rounds):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            taken = seconds(lambda side=sides[name], turn=turn: side(max(turn, 0)))
            if turn >= 0:
                times[name][turn] = taken
    return times


def memory_bytes(field: str) -> int:
    """`VmRSS`, this process's memory now, or `VmHWM`, its peak, on Linux. `getrusage` would include
    the memory of the parent at the moment when it started this process."""
    status = Path("/proc/self/status").read_text("utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def print_rows(rows: Iterable[Row]) -> list[Row]:
    """Print rows as they come, with a header where their columns change; returns them."""
    printed: list[Row] = []
    for row in rows:
        texts = [text_of(value) for value in row.values()]
        first, *others = row
        widths = [max(len(name), _width(row[name])) + 2 for name in others]
        if not printed or list(printed[-1]) != list(row):
            print(f"\n{first:<40}" + _cells(others, widths))
        print(f"{texts[0]:<40}" + _cells(texts[1:], widths), flush=True)
        printed.append(row)
    return printed


def text_of(value: Any) -> str:
    """A value as tables show it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _width(value: Any) -> int:
    return value.width if isinstance(value, Interval) else 12


def _cells(texts: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return [_plain(number) for number in (value.median, value.low, value.high)]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def run_benchmark(
    description: str,
    measure: Callable[[argparse.Namespace], Iterable[Row]],
    *paths: str,
    **options: tuple[Any, str],
) -> None:
    """Run a benchmark's command line: print its rows; with `--json FILE`, also write them there.

    Args:
        paths: names of required paths.
        options: default and help of each option; a list's option takes several values.
    """
    from pipeline.compute.device import default_device  # noqa: PLC0415  (loads torch)

    spec = sys.modules["__main__"].__spec__
    parser = argparse.ArgumentParser(
        f"python -m {spec.name}" if spec else None,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in paths:
        parser.add_argument(name, type=Path)
    for name, (default, text) in options.items():
        several = isinstance(default, list)
        parser.add_argument(
            f"--{name}",
            type=type(default[0] if several else default),
            nargs="+" if several else None,
            default=default,
            help=f"{text} (default: {default})",
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    arguments = parser.parse_args()
    print(f"{default_device().type}; medians of alternating rounds, ratios with 95 % intervals")
    rows = print_rows(measure(arguments))
    if arguments.json:
        plain = [{name: _plain(value) for name, value in row.items()} for row in rows]
        arguments.json.write_text(json.dumps(plain, indent=1) + "\n", "utf-8")
