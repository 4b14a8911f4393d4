"""Each int8 file beside its float32 file, and which aims it misses."""

from collections.abc import Iterator, Mapping

import pandas as pd

from pipeline.comparison.compare import Comparison, ModelMetrics
from pipeline.comparison.measurement.latency import EngineSpeed, faster_or_slower
from pipeline.comparison.measurement.statistics import PairedDifference
from pipeline.comparison.report.numbers import percent, points, whole

#: What an int8 file is meant to reach: points lost at most, times smaller at least. And faster.
LARGEST_LOSS, LEAST_REDUCTION = 0.3, 3.5


def int8_table(comparison: Comparison, speed: Mapping[str, EngineSpeed]) -> pd.DataFrame:
    """One row per int8 file; empty if params.yaml asks for none. Latency is of one image in one
    thread; a baseline's file has the graph of its student's."""
    rows = [_row(pair, _latency_ratio(pair.first, speed)) for pair in comparison.int8]
    rows += [
        {"student": name, "training": role, "aims missed": f"not written: {reason}"}
        for (name, role), reason in comparison.refused.items()
    ]
    return pd.DataFrame(rows).fillna("-")


def _row(pair: PairedDifference[ModelMetrics], latency: float | None) -> dict[str, str]:
    int8, float32 = pair.first, pair.second
    reduction = float32.size_bytes / int8.size_bytes
    missed = list(_missed(-100 * pair.gain, reduction, latency))
    return {
        "student": int8.name,
        "training": int8.role,
        "bytes": whole(int8.size_bytes),
        "smaller": f"{reduction:.2f} x",
        "accuracy": percent(int8.accuracy),
        "against float32": points(pair.gain),
        "95% interval": f"{points(pair.low)} to {points(pair.high)}",
        "speed": "not measured" if latency is None else faster_or_slower(latency),
        "aims missed": "; ".join(missed) or "none",
    }


def _missed(loss: float, reduction: float, latency: float | None) -> Iterator[str]:
    if loss > LARGEST_LOSS + 1e-9:
        yield f"loses more than {LARGEST_LOSS} points"
    if reduction < LEAST_REDUCTION:
        yield f"less than {LEAST_REDUCTION} x smaller"
    if latency is not None and latency <= 1:
        yield "not faster"


def _latency_ratio(int8: ModelMetrics, speed: Mapping[str, EngineSpeed]) -> float | None:
    """The float32 file's latency over the int8 file's."""
    measured = speed.get("onnxruntime_1_thread")
    times = [measured and measured.find(int8.name, p) for p in ("float32", "int8")]
    return times[0].latency_ms / times[1].latency_ms if all(times) else None
