"""Open a store, verify it, and gather soft targets by view and sample.

docs/soft_targets_format.md is normative.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.prepared.dataset import Dataset
from pipeline.runtime.derived_random import permutation
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json
from pipeline.runtime.outputs import STORE
from pipeline.store.format.encodings import columns, decode
from pipeline.store.format.schema import SHARD_SAMPLES, StoreIdentity, StoreIndex
from pipeline.store.format.shards import ArrayRef, ShardError, read_header
from pipeline.store.reading.index import AGAIN, check_purpose, read_index
from pipeline.store.reading.verification import differences, row_references
from pipeline.views.params import ViewsParams

_SHOWN = 10  # problems in one message
_COUNTED = 1000  # problems counted at most: an index can ask for any number of shards


class SoftTargetBatch(NamedTuple):
    logits: np.ndarray  # [B, C]: float16 from a dense store, float32 from a top_k store
    kept: np.ndarray | None  # [B, C] bool: the classes outside it share the tail's mass; None: all


class MappedArrays:
    """The arrays of a shard, mapped into memory on first use; pickled as references."""

    def __init__(self, references: Mapping[str, ArrayRef]):
        self.references = references

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: reference.map() for name, reference in self.references.items()}

    @cached_property
    def contents(self) -> dict[str, memoryview]:
        """The bytes of `arrays`."""
        return {name: memoryview(array).cast("B") for name, array in self.arrays.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"references": self.references}


@dataclass(frozen=True)
class Store:
    """An open store, and a dataset for a DataLoader: the training samples of view 0, then of view
    1, and so on.

    Safe to fork and to pickle: shards are mapped into memory on first use, and no file stays open.
    """

    directory: Path
    index: StoreIndex
    shards: Mapping[tuple[str, int], Sequence[MappedArrays]]  # (split, view) -> by sample
    labels: Mapping[str, np.ndarray]  # by split, to decode top_k rows; empty for dense
    rows_sha256: str  # of the checksums of all rows
    temperature: float = 1.0  # of the softmax that the logits are for: defines a top_k row's tail

    @property
    def identity(self) -> StoreIdentity:
        return StoreIdentity(**self.index.fields())

    @property
    def num_views(self) -> int:
        return self.index.num_views

    def decoded_at(self, temperature: float) -> "Store":
        """The same store, decoded for a softmax at this temperature; no effect on dense rows."""
        return replace(self, temperature=temperature)

    def gather(self, view: int, samples: np.ndarray, *, split: str = "train") -> SoftTargetBatch:
        """Soft targets of samples in one view, in any order; samples may repeat."""
        return self.gather_pairs(samples, np.asarray(view), split=split)

    def gather_pairs(
        self, samples: np.ndarray, views: np.ndarray, *, split: str = "train"
    ) -> SoftTargetBatch:
        """Soft targets of (sample, view) pairs, both [B] integers; one view may stand for all.

        Raises:
            IndexError: a sample or a view does not exist.
        """
        arrays = self.encoded(samples, views, split=split)
        if self.index.encoding == "dense":
            return SoftTargetBatch(arrays["logits"], None)
        labels, classes = self.labels[split][samples], self.index.num_classes
        return SoftTargetBatch(*decode(arrays, labels, classes, temperature=self.temperature))

    def encoded(
        self, samples: np.ndarray, views: np.ndarray, *, split: str = "train"
    ) -> dict[str, np.ndarray]:
        """The stored rows of the pairs of `gather_pairs`, not decoded: arrays [B, ...]."""
        samples, views = np.asarray(samples, np.int64), np.asarray(views, np.int64)
        _check_range("sample", samples, self.index.split_sizes[split])
        _check_range("view", views, self.num_views if split == "train" else 1)
        number, rows = np.divmod(samples, SHARD_SAMPLES)
        per_view = len(self.shards[split, 0])
        shard = (views * per_view + number).tolist()  # [B]
        shards = self._by_number[split]
        if len(set(shard)) == 1:
            return {name: array[rows] for name, array in shards[shard[0]].arrays.items()}
        index = self.index
        return {
            name: _join_rows(shards, name, shard, rows, width, dtype)
            for name, (width, dtype) in columns(index.encoding, index.num_classes, index.k).items()
        }

    @cached_property
    def _by_number(self) -> dict[str, list[MappedArrays]]:
        """The shards of each split: those of view 0, of view 1, and so on."""
        found: dict[str, list[MappedArrays]] = {}
        for split, view in sorted(self.shards):
            found.setdefault(split, []).extend(self.shards[split, view])
        return found

    def __len__(self) -> int:
        return self.num_views * self.index.split_sizes["train"]

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """A batch for a DataLoader: of each row its `logits`, and `kept` from a top_k store.
        `gather` and `gather_pairs` return whole batches faster."""
        _check_range("position", np.asarray(positions, np.int64), len(self))
        views, samples = np.divmod(positions, self.index.split_sizes["train"])
        logits, kept = self.gather_pairs(samples, views)
        if kept is None:
            return [{"logits": row} for row in logits]
        return [{"logits": row, "kept": mask} for row, mask in zip(logits, kept, strict=True)]

    def verify(self, dataset: Dataset) -> None:
        """Check every byte: each shard's checksums, and its canaries against the pixels that this
        code augments. Call once per run, in the parent process.

        Args:
            dataset: at the size of the views.

        Raises:
            UserError: a shard differs; names each.
        """
        _refuse(self.directory, list(differences(self.directory, self.index, dataset)))


def _join_rows(
    shards: Sequence[MappedArrays],
    name: str,
    shard: Sequence[int],
    rows: np.ndarray,
    width: int,
    dtype: np.dtype,
) -> np.ndarray:
    """Copy rows of an array of several shards into one, [B, width].

    Their bytes are joined: a batch of few rows of each of many shards is so copied about twice as
    fast as by indexing each shard's array (benchmarks/README.md, "Reading").

    Args:
        name: of the array.
        shard: [B], of each row.
        rows: [B], of each row in its shard.
    """
    size = width * dtype.itemsize
    joined = bytearray().join(
        [
            shards[each].contents[name][start : start + size]
            for each, start in zip(shard, (rows * size).tolist(), strict=True)
        ]
    )
    return np.ndarray((len(rows), width), dtype, joined)


def _check_range(name: str, numbers: np.ndarray, count: int) -> None:
    """Raise IndexError if one of the int64 `numbers` is not in 0 ... count - 1."""
    if numbers.size and numbers.view(np.uint64).max() >= count:  # of a negative one, 2**63 or more
        worst = numbers.min() if numbers.min() < 0 else numbers.max()
        raise IndexError(f"{name} {worst} of {count}")


def view_of_epoch(epoch: int, num_views: int, seed: int) -> int:
    """The cached view of an epoch, counted from 1: each cycle of `num_views` epochs uses every view
    once, in a seeded order of its own."""
    cycle, position = divmod(epoch - 1, num_views)
    return int(permutation(num_views, seed, cycle)[position])


def open_store(
    dataset: Dataset, views: ViewsParams, teacher_fingerprint: str, directory: Path = STORE
) -> Store:
    """Open the store, and check what it was written for and the header of every shard.

    Reads no row; `Store.verify` reads all.

    Args:
        dataset: at the size of the views.

    Raises:
        UserError: the store is for other inputs, or a shard is absent or wrong; names each.
    """
    index = read_index(directory)
    check_purpose(directory, index, dataset, views, teacher_fingerprint)
    return open_shards(
        directory, index, {name: split.labels for name, split in dataset.splits.items()}
    )


def open_shards(directory: Path, index: StoreIndex, labels: Mapping[str, np.ndarray]) -> Store:
    """Open the shards that an index lists, without asking what they were written for.

    Args:
        labels: by split, [N] integers, -1 if unlabelled; used to decode top_k rows alone.

    Raises:
        UserError: a shard is absent, cannot be read, or is another one; names each.
    """
    shards: dict[tuple[str, int], list[MappedArrays]] = {}
    problems, checksums = [], []
    for key in index.shards():
        path = directory / key.file_name
        try:
            header = read_header(path)
            arrays = MappedArrays(row_references(header, index, key))
        except ShardError as error:
            problems.append(f"`{path}` {error}.")
            if len(problems) > _COUNTED:
                break
            continue
        shards.setdefault((key.split, key.view), []).append(arrays)
        checksums += [header.attributes.get(f"{name}_sha256") for name in arrays.references]
    _refuse(directory, problems)
    # Labels are pickled for every spawned worker: keep only what is needed, in a short type.
    short = np.int16 if index.num_classes <= 2**15 else np.int32
    needed = labels if index.encoding == "top_k" else {}
    labels = {name: array.astype(short) for name, array in needed.items()}
    rows_sha256 = hashlib.sha256(canonical_json(checksums).encode()).hexdigest()
    return Store(directory, index, shards, labels, rows_sha256)


def _refuse(directory: Path, problems: Sequence[str]) -> None:
    if problems:
        more = len(problems) - _SHOWN
        shown = [*problems[:_SHOWN], *([f"... and {more} more like it."] if more > 0 else [])]
        raise UserError("\n".join([*shown, f"Remove `{directory}` and run `{AGAIN}`."]))
