"""How fast networks are: timing, the arithmetic of its figures, and what metrics/speed.json holds.

Imports nothing of ours, and no torch.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator
from scipy.stats import quantile_test

SPEED_FILE = Path("metrics/speed.json")
#: The command that writes it again. Without --single-item, DVC would also run all earlier stages.
MEASURE_AGAIN = "dvc repro --force --single-item speed"
BATCH_SIZE = 64
ROUNDS, CALLS = 20, 5
#: Arguments of `time_interleaved`. Fewer than 6 rounds give a median no 95 % interval.
SINGLE_IMAGE = {"calls": CALLS, "min_rounds": 6, "max_seconds": 30}
FULL_BATCH = {"calls": 1, "min_rounds": 3, "max_seconds": 10}


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class NetworkSpeed(_Figures):
    """From uint8 views on the device to logits, in float32. The teacher has no `speedup`."""

    latency_ms: PositiveFloat  # of one image: the median of all calls
    latency_p95_ms: PositiveFloat
    images_per_second: PositiveFloat  # in batches: the median of all rounds
    speedup: PositiveFloat | None = None  # teacher's latency over this one's, median of rounds
    speedup_low: PositiveFloat | None = None  # of its 95 % interval
    speedup_high: PositiveFloat | None = None
    runtime: str | None = None  # where it is not PyTorch: onnxruntime

    @model_validator(mode="after")
    def _whole_interval(self) -> Self:
        if len({v is None for v in (self.speedup, self.speedup_low, self.speedup_high)}) > 1:
            raise ValueError("speedup, speedup_low and speedup_high belong together")
        return self


class Machine(NamedTuple):
    """What measured times depend on beside the networks."""

    cpu: str
    cores: int
    system: str
    torch: str  # without the name of its build


class DeviceSpeed(_Figures):
    """All networks on one device, timed in turn."""

    name: str
    cores: PositiveInt | None = None  # of a CPU: of the machine
    threads: PositiveInt | None = None  # of a CPU: that computed
    system: str
    torch: str
    batch_size: PositiveInt  # of `images_per_second`
    teacher: NetworkSpeed | None = None  # None for imported logits
    students: dict[str, NetworkSpeed]

    @property
    def networks(self) -> list[tuple[str, NetworkSpeed]]:
        """The teacher if it was timed, then the students, each with its name."""
        teacher = [("teacher", self.teacher)] if self.teacher else []
        return [*teacher, *self.students.items()]


class Speeds(_Figures):
    """metrics/speed.json."""

    cpu: DeviceSpeed
    cuda: DeviceSpeed | None = None

    @model_validator(mode="after")
    def _cores(self) -> Self:
        if self.cpu.cores is None:
            raise ValueError("cpu.cores is missing: it says with the name which machine was timed")
        return self

    @property
    def machine(self) -> Machine:
        """The machine that was timed."""
        return Machine(self.cpu.name, self.cpu.cores, self.cpu.system, _release(self.cpu.torch))

    @property
    def devices(self) -> dict[str, DeviceSpeed]:
        """By the device's type; without one that was not measured."""
        return {name: device for name, device in self if device is not None}


def this_machine() -> Machine:
    """The machine that runs this, without the import of torch."""
    return Machine(cpu_name(), os.cpu_count() or 1, system(), _release(version("torch")))


def _release(torch: str) -> str:
    """2.15.0+cu132 -> 2.15.0"""
    return torch.partition("+")[0]


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
    tasks: Sequence[Callable[[], object]], *, calls: int, min_rounds: int, max_seconds: float
) -> np.ndarray:
    """Time every task in every round: [tasks, rounds, calls] seconds of each call.

    Each round starts with another task, so that a disturbance of the machine affects all tasks
    equally. There are ROUNDS rounds, or fewer if they would take more than `max_seconds` per task,
    but at least `min_rounds`. A turn of several calls begins with one that is not counted: until
    then the processor's cache holds another network's weights.
    """
    for task in tasks:
        task()  # allocations and caches of the first call
    start, times = time.perf_counter(), []
    while len(times) < ROUNDS and (
        len(times) < min_rounds or time.perf_counter() - start < max_seconds * len(tasks)
    ):
        seconds = np.empty((len(tasks), calls))
        first = len(times) % len(tasks)
        for number in [*range(first, len(tasks)), *range(first)]:
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
    low, high = quantile_test(values, p=0.5).confidence_interval(0.95)
    if np.isnan(low):
        low, high = min(values), max(values)
    return float(np.median(values)), float(low), float(high)


def network_speed(
    latencies: np.ndarray,
    batch_times: np.ndarray,
    batch_size: int,
    teacher_latencies: np.ndarray | None = None,
) -> NetworkSpeed:
    """Compute one network's figures, to four digits.

    Args:
        latencies: [rounds, calls] seconds of one image each.
        batch_times: [rounds] seconds of one batch each.
        teacher_latencies: [rounds, calls], of the same rounds.
    """
    figures = {
        "latency_ms": 1000 * np.median(latencies),
        "latency_p95_ms": 1000 * np.quantile(latencies, 0.95),
        "images_per_second": batch_size / np.median(batch_times),
    }
    if teacher_latencies is not None:
        ratios = np.median(teacher_latencies, 1) / np.median(latencies, 1)
        names = ("speedup", "speedup_low", "speedup_high")
        figures |= zip(names, median_interval(ratios), strict=True)
    return NetworkSpeed(**{name: float(f"{value:.4g}") for name, value in figures.items()})
