"""A teacher without a network: a store of logits that another system computed.

docs/soft_targets_format.md defines the store; `python -m pipeline.commands.import_logits` makes one
of a table. This module reads what the stage `teacher` needs of it, by h5py alone, because training
a teacher would depend on all that it imports. The stage `soft_targets` reads the store with the
store's own reader, which verifies every byte.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import nn

from pipeline.data.prepared.dataset import Dataset
from pipeline.runtime.errors import UserError, first_line
from pipeline.runtime.files import canonical_json
from pipeline.runtime.validation import read_model

INDEX = "store.json"
_SHARD_SAMPLES = 16_384
_IMPORT = "python -m pipeline.commands.import_logits"
_AGAIN = f"Write it again, as docs/soft_targets_format.md says, or by `{_IMPORT}`."


def build(network: str, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    raise UserError(
        f"`{network}` of family `logits` is no network, but logits of another system. They can be "
        "a teacher: set `weights: logits` and `teacher.checkpoint` to the folder of their store."
    )


class _Index(BaseModel):
    """The keys of a store's index that must be those of the dataset."""

    model_config = ConfigDict(frozen=True, strict=True)  # the other keys are checked later

    format_version: Literal[2]
    encoding: str
    dataset_fingerprint: str
    num_classes: int
    class_names: list[str]
    splits: dict[str, int]
    num_views: PositiveInt


@dataclass(frozen=True)
class Source:
    """An imported store."""

    path: Path
    contents_sha256: str  # of the checksums of its logits
    held_out: Mapping[str, np.ndarray]  # by split, validation and test: [N, C] float32


def open_source(path: Path, dataset: Dataset) -> Source:
    """Read the index, the checksum of every shard, and the logits of validation and test.

    Raises:
        UserError: it is not a store, is of another dataset, lacks logits, or is damaged.
    """
    if not (path / INDEX).is_file():
        raise UserError(
            f"`{path}` is no store of logits: it has no `{INDEX}`. Put there the folder of a "
            "store, as docs/soft_targets_format.md says, or make one of a table: "
            f"`{_IMPORT} {path if path.is_file() else 'TABLE'} {path.with_suffix('')}`."
        )
    index = read_model(path / INDEX, _Index, produced_by=f"{_IMPORT} TABLE")
    if index.encoding != "dense":
        raise UserError(
            f"`{path}` has encoding {index.encoding}; expected dense, because validation and test "
            "need every logit. `soft_targets.encoding` may still be top_k."
        )
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    differing = [
        f"`{path}` has {key} {_short(actual)}, but data/prepared {_short(expected)}."
        for key, actual, expected in (
            ("dataset_fingerprint", index.dataset_fingerprint, dataset.fingerprint),
            ("splits", index.splits, sizes),
            ("class_names", index.class_names, list(dataset.class_names)),
            ("num_classes", index.num_classes, dataset.num_classes),
        )
        if actual != expected
    ]
    if differing:
        raise UserError("\n".join([*differing, _AGAIN]))
    sums, held_out = {}, {}
    for split, size in sizes.items():
        for view in range(index.num_views if split == "train" else 1):
            shards = []
            for first in range(0, size, _SHARD_SAMPLES):
                shape = (min(_SHARD_SAMPLES, size - first), dataset.num_classes)
                shard = path / f"{split}_view{view:05d}_sample{first:09d}.h5"
                sums[shard.name], rows = _read_shard(shard, shape, with_rows=split != "train")
                shards.append(rows)
        if split != "train":
            held_out[split] = np.concatenate(shards).astype(np.float32)
    return Source(path, hashlib.sha256(canonical_json(sums).encode()).hexdigest(), held_out)


def _read_shard(
    path: Path, shape: tuple[int, int], *, with_rows: bool
) -> tuple[str, np.ndarray | None]:
    """The stated checksum of a shard's logits; and the logits, [num_samples, C] float16.

    Raises:
        UserError: the shard is absent or damaged, or has no plain array of this shape.
    """
    try:
        with h5py.File(path, "r") as file:
            stated = file.attrs["logits_sha256"]
            logits, link = file["logits"], file.get("logits", getlink=True)
            offset = logits.id.get_offset()  # None if HDF5 does more than copy its bytes
            if not isinstance(link, h5py.HardLink) or offset is None:
                raise ValueError("its logits are a link, in another file, chunked or compressed")
            if (logits.shape, logits.dtype) != (shape, np.dtype("<f2")):
                raise ValueError(
                    f"its logits are {logits.dtype} {list(logits.shape)}; expected float16 "
                    f"{list(shape)}"
                )
            rows = logits[()] if with_rows else None
    except (OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        state = "is damaged" if path.is_file() else "is absent"
        raise UserError(f"`{path}` {state} ({first_line(error)}). {_AGAIN}") from None
    stated = stated.decode("ascii", "replace") if isinstance(stated, bytes) else ""
    if rows is not None and hashlib.sha256(rows).hexdigest() != stated:
        raise UserError(f"`{path}` is damaged: its logits do not match their checksum. {_AGAIN}")
    return stated, rows


def _short(value: Any) -> str:
    text = str(value)
    if isinstance(value, str) and len(text) == 64:
        return f"{text[:12]}…"
    return text if len(text) <= 60 else f"{text[:57]}..."
