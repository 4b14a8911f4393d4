"""How fast files are: timing, the arithmetic of its figures, and what metrics/speed.json holds.

Imports nothing of ours, and no torch.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import scipy
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

SPEED_FILE = Path("metrics/speed.json")
#: The command that writes it again. Without --single-item, DVC would also run all earlier stages.
MEASURE_AGAIN = "dvc repro --force --single-item speed"
BATCH_SIZE = 64
#: Arguments of `time_interleaved`. Fewer than 6 rounds give a median no 95 % interval.
SINGLE_IMAGE = {"rounds": 100, "calls": 3, "min_rounds": 6, "max_seconds": 60}
FULL_BATCH = {"rounds": 20, "calls": 1, "min_rounds": 6, "max_seconds": 30}


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Ratio(_Figures):
    """The teacher's time over the network's, in the same round; above 1, the network is faster."""

    median: PositiveFloat
    low: PositiveFloat  # of its 95 % interval
    high: PositiveFloat

    def __str__(self) -> str:
        """`4.4 x faster (4.31 to 4.52)`, `1.25 x slower (1.20 to 1.31)`"""
        return f"{faster_or_slower(self.median)} ({self.interval})"

    @property
    def than_the_teacher(self) -> str:
        """`4.4 x faster than the teacher (4.31 to 4.52)`"""
        text = faster_or_slower(self.median)
        return f"{text} {'as' if text == 'as fast' else 'than'} the teacher ({self.interval})"

    @property
    def interval(self) -> str:
        low, high = faster_or_slower(self.low), faster_or_slower(self.high)
        if self.low < 1 < self.high and low != high:
            return f"{low} to {high}"  # 1.02 x slower to 1.1 x faster
        ends = sorted(max(end, 1 / end) for end in (self.low, self.high))
        return " to ".join(map(three_digits, ends))


class FileSpeed(_Figures):
    """Of one network, from uint8 images in memory to float32 logits in memory."""

    latency_ms: PositiveFloat  # of one image: the median of all calls
    latency_p95_ms: PositiveFloat
    images_per_second: PositiveFloat  # in batches: the median of all rounds
    speedup: Ratio | None = None  # of one image; None for the teacher, and where it was not timed
    batch_speedup: Ratio | None = None


class EngineSpeed(_Figures):
    """All networks in one engine on one device, timed in turn."""

    engine: str  # with its version: onnxruntime 1.32.0, PyTorch 2.15.0
    device: str  # the name of the CPU or GPU
    threads: PositiveInt | None = None  # of a CPU: those that computed
    rounds: PositiveInt  # of one image: so many pairs with the teacher
    batch_size: PositiveInt  # of `images_per_second`
    teacher: FileSpeed | None = None  # None where it has no file, or no network in PyTorch
    #: By student and precision. A baseline is the same graph as its student, and not timed again.
    students: dict[str, dict[Literal["float32", "int8"], FileSpeed]]

    @property
    def files(self) -> list[tuple[str, FileSpeed]]:
        """The teacher if it was timed, then the students, each with its name and precision."""
        teacher = [("teacher", self.teacher)] if self.teacher else []
        students = [
            (file_label(name, precision), speed)
            for name, of_student in self.students.items()
            for precision, speed in of_student.items()
        ]
        return [*teacher, *students]

    def find(self, name: str, precision: str = "float32") -> FileSpeed | None:
        """One student's figures; None where there was no such file."""
        return self.students.get(name, {}).get(precision)


class Machine(_Figures):
    """What measured times depend on beside the networks."""

    cpu: str
    cores: PositiveInt
    system: str
    onnxruntime: str  # its version


class Speeds(_Figures):
    """metrics/speed.json."""

    machine: Machine  # that was timed
    onnxruntime_1_thread: EngineSpeed
    onnxruntime_all_cores: EngineSpeed | None = None  # None on a machine of one core
    onnxruntime_cuda: EngineSpeed | None = None
    pytorch_cuda: EngineSpeed | None = None

    @property
    def settings(self) -> dict[str, EngineSpeed]:
        """By the setting's name; without one that was not measured."""
        return {name: value for name, value in self if isinstance(value, EngineSpeed)}


def this_machine() -> Machine:
    """The machine that runs this, without the import of onnxruntime."""
    return Machine(
        cpu=cpu_name(), cores=os.cpu_count() or 1, system=system(), onnxruntime=_onnxruntime()
    )


def _onnxruntime() -> str:
    for package in ("onnxruntime", "onnxruntime-gpu"):  # each holds the module `onnxruntime`
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"


def file_label(name: str, precision: str) -> str:
    """`resnet8`, or `resnet8 int8`"""
    return name if precision == "float32" else f"{name} {precision}"


def faster_or_slower(ratio: float) -> str:
    """`4.4 x faster` or `1.25 x slower`; `as fast` where the ratio is 1.00.

    Args:
        ratio: the time of the network that is compared with, over this one's.
    """
    times = max(ratio, 1 / ratio)
    text = f"{times:.2f}" if times < 1.995 else f"{times:.1f}" if times < 99.5 else f"{times:,.0f}"
    if text == "1.00":
        return "as fast"
    return f"{text} x {'faster' if ratio > 1 else 'slower'}"


def three_digits(number: float) -> str:
    """`4.31`, `431`, `4,312`"""
    return f"{number:#.3g}".rstrip(".") if number < 999.5 else f"{number:,.0f}"


def rate(per_second: float) -> str:
    """`1,234`, `12`, `0.402`"""
    return f"{per_second:,.0f}" if per_second >= 9.995 else three_digits(per_second)


def system() -> str:
    """`Linux x86_64`. Not the kernel's version, which changes with every update."""
    return f"{platform.system()} {platform.machine()}"


def cpu_name() -> str:
    """`AMD EPYC 7763 64-Core Processor`"""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())


def time_interleaved(
    tasks: Sequence[Callable[[], object]],
    *,
    rounds: int,
    calls: int,
    min_rounds: int,
    max_seconds: float,
    pause: float = 0,
) -> np.ndarray:
    """Time every task in every round: [tasks, rounds, calls] seconds of each call.

    Each round starts with another task, so that a disturbance of the machine affects all tasks
    equally. There are fewer rounds if they would take more than `max_seconds`, but at least
    `min_rounds`. A turn of several calls begins with one that is not counted: until then the
    processor's cache holds another network's weights.

    Args:
        pause: seconds before each turn, until the threads of other engines no longer wait in loops.
    """
    for task in tasks:
        task()  # allocations and caches of the first call
    start, times = time.perf_counter(), []
    while len(times) < rounds and (
        len(times) < min_rounds or time.perf_counter() - start < max_seconds
    ):
        seconds = np.empty((len(tasks), calls))
        first = len(times) % len(tasks)
        for number in [*range(first, len(tasks)), *range(first)]:
            if pause:
                time.sleep(pause)
            if calls > 1:
                tasks[number]()
            for call in range(calls):
                begin = time.perf_counter()
                tasks[number]()
                seconds[number, call] = time.perf_counter() - begin
        times.append(seconds)
    return np.stack(times, 1)


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Compute the median and its 95 % interval by order statistics, for any distribution.

    With fewer than 6 values it spans all of them, at less than 95 %.
    """
    low, high = scipy.stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    if np.isnan(low):
        low, high = min(values), max(values)
    return float(np.median(values)), float(low), float(high)


def file_speed(
    latencies: np.ndarray,
    batch_times: np.ndarray,
    batch_size: int,
    teacher: tuple[np.ndarray, np.ndarray] | None = None,
) -> FileSpeed:
    """Compute one network's figures, to four digits.

    Args:
        latencies: [rounds, calls] seconds of one image each.
        batch_times: [rounds] seconds of one batch each.
        teacher: the teacher's latencies and batch times, of the same rounds.
    """
    speedups = {}
    if teacher is not None:
        of_one = np.median(teacher[0], 1) / np.median(latencies, 1)
        speedups = {"speedup": _ratio(of_one), "batch_speedup": _ratio(teacher[1] / batch_times)}
    return FileSpeed(
        latency_ms=four_digits(1000 * np.median(latencies)),
        latency_p95_ms=four_digits(1000 * np.quantile(latencies, 0.95)),
        images_per_second=four_digits(batch_size / np.median(batch_times)),
        **speedups,
    )


def _ratio(ratios: np.ndarray) -> Ratio:
    names = ("median", "low", "high")
    return Ratio(**dict(zip(names, map(four_digits, median_interval(ratios)), strict=True)))


def four_digits(value: float) -> float:
    return float(f"{value:.4g}")
