"""The fidelity of each finished shard, measured when it is made and kept beside it.

So a resumed run, or one with more views, measures no shard again.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_json
from pipeline.runtime.validation import Record, read_model
from pipeline.store.format.schema import ShardKey
from pipeline.store.writing.fidelity import rounded

SHARD_ROWS = 128  # measured of each training shard


class Measurement(Record):
    """Of a shard's measured rows, the sum of each of `compare_rows`."""

    rows: int
    sums: Mapping[str, float]


def measured_rows(key: ShardKey) -> np.ndarray:
    """The rows of a shard that are measured, spread evenly: [<= SHARD_ROWS]; of `train` alone."""
    count = min(SHARD_ROWS, key.num_samples) if key.split == "train" else 0
    return np.arange(count) * (key.num_samples - 1) // max(1, count - 1)


def write_measurement(folder: Path, key: ShardKey, of_rows: Mapping[str, np.ndarray]) -> None:
    """Keep what `compare_rows` measured of a shard."""
    sums = {name: float(values.sum()) for name, values in of_rows.items()}
    measurement = Measurement(rows=len(measured_rows(key)), sums=sums)
    write_json(_path(folder, key), measurement.model_dump())


def has_measurement(folder: Path, key: ShardKey) -> bool:
    if key.split != "train":
        return True
    try:
        read_measurement(folder, key)
    except UserError:
        return False
    return True


def read_measurement(folder: Path, key: ShardKey) -> Measurement:
    """Read what `write_measurement` wrote.

    Raises:
        UserError: it is absent or damaged.
    """
    return read_model(_path(folder, key), Measurement, produced_by="dvc repro soft_targets")


def mean_of(measurements: Iterable[Measurement]) -> dict[str, float]:
    """The number of rows, and the mean of each figure over all of them."""
    parts = list(measurements)
    rows = sum(part.rows for part in parts)
    means = {name: sum(part.sums[name] for part in parts) / rows for name in parts[0].sums}
    return {"rows": rows, **rounded(means)}


def _path(folder: Path, key: ShardKey) -> Path:
    return folder / f"{key.file_name}.json"
