"""How fast networks are: what metrics/speed.json holds, and the arithmetic of its figures.

Imports nothing of ours.
"""

from collections.abc import Sequence
from math import comb
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    model_validator,
)


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class NetworkSpeed(_Figures):
    """From uint8 views on the device to logits, in float32. The teacher has no `speedup`."""

    latency_ms: PositiveFloat  # of one image: the median of all calls
    latency_p95_ms: PositiveFloat
    images_per_second: PositiveFloat  # in batches: the median of all rounds
    speedup: PositiveFloat | None = None  # the teacher's latency over this one's, median of rounds
    speedup_low: PositiveFloat | None = None  # of its 95 % interval
    speedup_high: PositiveFloat | None = None

    @model_validator(mode="after")
    def _whole_interval(self) -> Self:
        if len({v is None for v in (self.speedup, self.speedup_low, self.speedup_high)}) > 1:
            raise ValueError("speedup, speedup_low and speedup_high belong together")
        return self


class DeviceSpeed(_Figures):
    """All networks on one device, measured in turn."""

    name: str
    threads: PositiveInt | None = None  # of a CPU
    torch: str
    batch_size: PositiveInt  # of `images_per_second`
    teacher: NetworkSpeed | None = None  # where it is a network
    students: dict[str, NetworkSpeed]

    @property
    def described(self) -> str:
        """`AMD EPYC, 2 threads`"""
        many = "s" if self.threads != 1 else ""
        return self.name if self.threads is None else f"{self.name}, {self.threads} thread{many}"


#: metrics/speed.json, by the device's type.
SPEED = TypeAdapter(Annotated[dict[Literal["cpu", "cuda"], DeviceSpeed], Field(min_length=1)])


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and its 95 % interval by order statistics: no distribution is assumed.

    The interval is from the k-th smallest to the k-th largest of n, k as large as the binomial
    distribution allows. Of fewer than 6 values it is all of them, and holds less surely.
    """
    ordered = sorted(map(float, values))
    count, k = len(ordered), 0
    ways = 1  # of at most k values below the true median
    while 40 * ways <= 2**count:  # 2.5 %
        k += 1
        ways += comb(count, k)
    k = max(1, k)
    return float(np.median(ordered)), ordered[k - 1], ordered[count - k]


def network_speed(
    latencies: np.ndarray,
    batches: np.ndarray,
    batch_size: int,
    teacher_latencies: np.ndarray | None = None,
) -> NetworkSpeed:
    """One network's figures, of four digits.

    Args:
        latencies: [rounds, calls] seconds of one image each.
        batches: [rounds] seconds of one batch each.
        teacher_latencies: [rounds, calls], of the same rounds.
    """
    figures = {
        "latency_ms": 1000 * np.median(latencies),
        "latency_p95_ms": 1000 * np.quantile(latencies, 0.95),
        "images_per_second": batch_size / np.median(batches),
    }
    if teacher_latencies is not None:
        ratios = np.median(teacher_latencies, 1) / np.median(latencies, 1)
        names = ("speedup", "speedup_low", "speedup_high")
        figures |= zip(names, median_interval(ratios), strict=True)
    return NetworkSpeed(**{name: float(f"{value:.4g}") for name, value in figures.items()})
