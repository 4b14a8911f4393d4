"""The students' side of the store: open it, verify it, gather soft targets by view and sample.

docs/soft_targets_format.md is normative. Reads formats 1 and 2.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.data.prepared.dataset import SPLITS, Dataset
from pipeline.runtime.derived_random import permutation
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import STORE
from pipeline.store.format.encodings import columns, decode, unpack_ids
from pipeline.store.format.schema import (
    FORMAT_VERSION,
    INDEX,
    SHARD_SAMPLES,
    ShardKey,
    StoreIdentity,
    attributes,
    canary_digests,
    canary_samples,
    policy_of,
    shard_keys,
)
from pipeline.store.format.shards import (
    ArrayRef,
    Header,
    ShardError,
    check_attributes,
    check_shapes,
    check_shard,
    check_sum,
    read_header,
    row_shapes,
)
from pipeline.views.loader import open_views
from pipeline.views.params import ViewsParams
from pipeline.views.policy import ViewPolicy

AGAIN = "dvc repro soft_targets"
_SHOWN = 10  # problems in one message
_COUNTED = 1000  # problems of a store; an index may ask for any number of shards


class SoftTargetBatch(NamedTuple):
    logits: np.ndarray  # [B, C], float16 of a dense store, float32 of a top_k one
    kept: np.ndarray | None  # [B, C] bool: the others share the tail's mass; None: all kept


@dataclass(frozen=True)
class StoreIndex:
    """What `store.json` says."""

    format_version: int
    identity: StoreIdentity
    split_sizes: Mapping[str, int]
    num_views: int
    class_names: Sequence[str]  # empty for format 1, where each shard has them
    fidelity: Mapping[str, float]  # as measured when it was written; empty for format 1

    def shards(self) -> Iterator[ShardKey]:
        return shard_keys(self.split_sizes, self.num_views)


class MappedArrays:
    """Arrays in a file, mapped into memory when first used; pickled as references."""

    def __init__(self, references: Mapping[str, ArrayRef]):
        self.references = references

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: reference.map() for name, reference in self.references.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"references": self.references}


@dataclass(frozen=True)
class Store:
    """An open store, and a dataset for a DataLoader: no file stays open, a forked worker shares
    the mapped pages, and a spawned one maps them again.

    As a dataset, it has the training samples of view 0, then those of view 1, and so on.
    """

    directory: Path
    index: StoreIndex
    shards: Mapping[tuple[str, int], Sequence[MappedArrays]]  # (split, view) -> by sample
    labels: Mapping[str, np.ndarray]  # of a top_k store, by split: rows are decoded with them
    temperature: float = 1.0  # of the softmax that the logits are for: gives top_k its tail

    @property
    def identity(self) -> StoreIdentity:
        return self.index.identity

    @property
    def num_views(self) -> int:
        return self.index.num_views

    def decoded_at(self, temperature: float) -> "Store":
        """The store for a softmax at another temperature; of dense rows, no matter."""
        return replace(self, temperature=temperature)

    def gather(self, view: int, samples: np.ndarray, *, split: str = "train") -> SoftTargetBatch:
        """Soft targets of samples in one view: any number, in any order, repeated or not."""
        return self.gather_pairs(samples, np.broadcast_to(view, np.shape(samples)), split=split)

    def gather_pairs(
        self, samples: np.ndarray, views: np.ndarray, *, split: str = "train"
    ) -> SoftTargetBatch:
        """Soft targets of (sample, view) pairs, both [B] integers.

        Raises:
            IndexError: there is no such sample or view.
        """
        arrays = self.encoded(samples, views, split=split)
        if self.identity.encoding == "dense":
            return SoftTargetBatch(arrays["logits"], None)
        labels, classes = self.labels[split][samples], self.identity.num_classes
        return SoftTargetBatch(*decode(arrays, labels, classes, temperature=self.temperature))

    def encoded(
        self, samples: np.ndarray, views: np.ndarray, *, split: str = "train"
    ) -> dict[str, np.ndarray]:
        """The rows of (sample, view) pairs as they are stored, [B, ...] each."""
        samples, views = np.asarray(samples, np.int64), np.asarray(views, np.int64)
        _check_range("sample", samples, self.index.split_sizes[split])
        _check_range("view", views, self.num_views if split == "train" else 1)
        number, rows = np.divmod(samples, SHARD_SAMPLES)
        shard = views * len(self.shards[split, 0]) + number  # [B]
        order = np.argsort(shard, kind="stable")
        starts = np.flatnonzero(np.diff(shard[order], prepend=-1)).tolist()
        if len(starts) == 1:
            arrays = self.shards[split, int(views[0])][number[0]].arrays
            return {name: array[rows] for name, array in arrays.items()}
        identity = self.identity
        gathered = {
            name: np.empty((len(samples), width), dtype)
            for name, (width, dtype) in columns(
                identity.encoding, identity.num_classes, identity.k
            ).items()
        }
        for start, stop in pairwise([*starts, len(order)]):
            wanted = order[start:stop]
            shard_of_view = self.shards[split, int(views[wanted[0]])][number[wanted[0]]]
            for name, array in shard_of_view.arrays.items():
                gathered[name][wanted] = array[rows[wanted]]
        return gathered

    def __len__(self) -> int:
        return self.num_views * self.index.split_sizes["train"]

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """What a DataLoader asks a batch by: one gather, and each row's `logits`, and `kept` of
        a top_k store. Whole batches come faster from `gather` and `gather_pairs`."""
        _check_range("position", np.asarray(positions), len(self))
        views, samples = np.divmod(positions, self.index.split_sizes["train"])
        logits, kept = self.gather_pairs(samples, views)
        if kept is None:
            return [{"logits": row} for row in logits]
        return [{"logits": row, "kept": mask} for row, mask in zip(logits, kept, strict=True)]

    def verify(self, dataset: Dataset) -> None:
        """Check every byte: each shard's checksums, and that its canaries' pixels are those that
        this code augments now. Once per run, in the parent process.

        Args:
            dataset: at the size of the views.

        Raises:
            UserError: names what differs, and what to do.
        """
        _refuse(self.directory, list(differences(self.directory, self.index, dataset)))


def _check_range(name: str, numbers: np.ndarray, count: int) -> None:
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < count:
        worst = numbers.min() if numbers.min() < 0 else numbers.max()
        raise IndexError(f"{name} {worst} of {count}")


def view_of_epoch(epoch: int, num_views: int, seed: int) -> int:
    """Which cached view an epoch, counted from 1, uses: a seeded permutation of all, drawn anew
    for each cycle."""
    cycle, position = divmod(epoch - 1, num_views)
    return int(permutation(num_views, seed, cycle)[position])


def open_store(
    dataset: Dataset, views: ViewsParams, teacher_fingerprint: str, directory: Path = STORE
) -> Store:
    """Open the store: check what it is for, and that every shard is there and says that it is
    the right one. Reads headers and no row; `Store.verify` reads all.

    Args:
        dataset: at the size of the views.

    Raises:
        UserError: anything is not as expected; says which, and what to do.
    """
    index = read_index(directory)
    check_purpose(directory, index, dataset, views, teacher_fingerprint)
    return open_shards(
        directory, index, {name: split.labels for name, split in dataset.splits.items()}
    )


def read_index(directory: Path = STORE) -> StoreIndex:
    """What the store is, by its index.

    Raises:
        UserError: absent, of a version that is not known, or not an index.
    """
    path = directory / INDEX
    content = read_json(path, produced_by=AGAIN)
    version = content.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        newer = isinstance(version, int) and version > FORMAT_VERSION
        remedy = "Update Teach Once" if newer else f"Run `{AGAIN}`"
        raise UserError(
            f"`{path}` has format version {version}; expected 1 to {FORMAT_VERSION}. {remedy}."
        )
    expected = {field.name: field.type for field in fields(StoreIdentity)}
    expected |= {"splits": dict, "num_views": int}
    expected |= {"class_names": list, "fidelity": dict} if version > 1 else {}
    for key, kind in expected.items():
        if key not in content and key != "k":
            raise UserError(f"`{path}` lacks '{key}'. Run `{AGAIN}`.")
        if not isinstance(content.get(key), kind):
            name = getattr(kind, "__name__", kind)
            raise UserError(f"`{path}` has {key} {content[key]!r}; expected {name}. Run `{AGAIN}`.")
    identity = StoreIdentity(
        **{field.name: content.get(field.name) for field in fields(StoreIdentity)}
    )
    index = StoreIndex(
        version,
        identity,
        content["splits"],
        content["num_views"],
        content.get("class_names", []),
        content.get("fidelity", {}),
    )
    names = index.class_names
    if version > 1 and (
        len(names) != identity.num_classes or not all(isinstance(name, str) for name in names)
    ):
        raise UserError(
            f"`{path}` has num_classes {identity.num_classes} and {len(names)} class_names; "
            f"expected a text for each. Run `{AGAIN}`."
        )
    counts = [index.num_views, identity.num_classes, *index.split_sizes.values()]
    if not index.split_sizes.keys() <= set(SPLITS) or not all(_is_count(n) for n in counts):
        raise UserError(
            f"`{path}` has num_views {index.num_views}, num_classes {identity.num_classes} and "
            f"splits {index.split_sizes}; expected whole numbers from 1, of {', '.join(SPLITS)}. "
            f"Run `{AGAIN}`."
        )
    known = ("dense",) if version == 1 else ("dense", "top_k")
    if identity.encoding not in known:
        raise UserError(
            f"`{path}` has encoding {identity.encoding}; known in format {version}: "
            f"{', '.join(known)}. Run `{AGAIN}`."
        )
    if (identity.encoding == "top_k") != (identity.k in range(1, identity.num_classes + 1)):
        raise UserError(
            f"`{path}` has k {identity.k}; expected 1 to {identity.num_classes} for top_k, none "
            f"for dense. Run `{AGAIN}`."
        )
    return index


def _is_count(number: Any) -> bool:
    return type(number) is int and number > 0


def check_purpose(
    directory: Path,
    index: StoreIndex,
    dataset: Dataset,
    views: ViewsParams,
    teacher_fingerprint: str,
) -> None:
    """Raises: UserError: the store is for another dataset, teacher or view plan."""
    identity = index.identity
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    names = list(dataset.class_names) if index.format_version > 1 else []
    prepared, params = "data/prepared has", "params.yaml says"
    mismatches = [
        f"`{directory}` was written for {what} {_short(found)}, but {where} {_short(expected)}."
        for what, found, where, expected in (
            ("dataset", identity.dataset_fingerprint, "data/prepared is", dataset.fingerprint),
            ("teacher", identity.teacher_fingerprint, "models/teacher is", teacher_fingerprint),
            ("view policy", identity.policy, params, str(views.plan)),
            ("views.seed", identity.seed, params, views.seed),
            ("views.image_size", identity.image_size, params, views.image_size),
            ("views.count", index.num_views, params, views.num_views),
            ("splits", index.split_sizes, prepared, sizes),
            ("num_classes", identity.num_classes, prepared, dataset.num_classes),
            ("class_names", index.class_names, prepared, names),
        )
        if found != expected
    ]
    if mismatches:
        raise UserError("\n".join([*mismatches, f"Run `{AGAIN}`."]))


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}…"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def open_shards(directory: Path, index: StoreIndex, labels: Mapping[str, np.ndarray]) -> Store:
    """Open a store for what its own index says it is.

    Args:
        labels: by split, [N] integers, -1 for none: needed to decode top_k rows alone.

    Raises:
        UserError: a shard is absent, cannot be read, or is not the one that it should be.
    """
    shards: dict[tuple[str, int], list[MappedArrays]] = {}
    problems = []
    for key in index.shards():
        path = directory / key.file_name
        try:
            arrays = MappedArrays(_checked_rows(read_header(path), index, key))
        except ShardError as error:
            problems.append(f"`{path}` {error}.")
            if len(problems) > _COUNTED:
                break
            continue
        shards.setdefault((key.split, key.view), []).append(arrays)
    _refuse(directory, problems)
    # They are pickled for every worker that is spawned: none where not needed, and short ones.
    short = np.int16 if index.identity.num_classes <= 2**15 else np.int32
    needed = labels if index.identity.encoding == "top_k" else {}
    return Store(directory, index, shards, {k: v.astype(short) for k, v in needed.items()})


def _checked_rows(header: Header, index: StoreIndex, key: ShardKey) -> dict[str, ArrayRef]:
    """Where a shard's rows are, if the header says that it is this one of this store."""
    expected = attributes(index.identity, key) | {"format_version": index.format_version}
    check_attributes(header, expected)
    shapes = row_shapes(index.identity, key)
    check_shapes(header, shapes)
    return {name: header.arrays[name] for name in shapes}


def _refuse(directory: Path, problems: Sequence[str]) -> None:
    if problems:
        more = len(problems) - _SHOWN
        shown = [*problems[:_SHOWN], *([f"... and {more} more like it."] if more > 0 else [])]
        raise UserError("\n".join([*shown, f"Remove `{directory}` and run `{AGAIN}`."]))


def differences(directory: Path, index: StoreIndex, dataset: Dataset) -> Iterator[str]:
    """Whatever in the shards is not as written, or not as this code augments it now."""
    seed, cpu = index.identity.seed, torch.device("cpu")
    views = {
        name: open_views(split, ViewPolicy.parse(policy_of(index.identity, name)), seed, cpu)
        for name, split in dataset.splits.items()
    }
    for key in index.shards():
        path = directory / key.file_name
        (batch,) = views[key.split].batches(key.view, [canary_samples(key)])
        pixels = batch.pixels.numpy()
        try:
            if index.format_version == 1:
                _check_shard_1(path, index, key, pixels)
            else:
                check_shard(path, index.identity, key, canary_digests(pixels))
            _check_rows(read_header(path), index.identity)
        except ShardError as error:
            yield f"`{path}` {error}."


def _check_rows(header: Header, identity: StoreIdentity) -> None:
    """What a writer of somebody else's may have missed: each row must have a meaning."""
    for name in columns(identity.encoding, identity.num_classes, identity.k):
        array = header.arrays[name].map()
        if name == "class_ids":
            ids = np.sort(unpack_ids(array, identity.k, identity.num_classes))
            bad = (ids[:, -1] >= identity.num_classes) | (np.diff(ids) == 0).any(1)
            what = f"{identity.k} different classes of {identity.num_classes}"
        else:
            exponent = np.uint16(0x7C00)  # all ones where float16 is infinite or not a number
            bad = ((array.view(np.uint16) & exponent) == exponent).any(1)
            what = "finite numbers"
        if bad.any():
            raise ShardError(f"is wrong in row {bad.argmax()}: its {name} are not {what}")


def _check_shard_1(path: Path, index: StoreIndex, key: ShardKey, pixels: np.ndarray) -> None:
    """`check_shard` for format 1, which kept the canaries' pixels themselves."""
    header, samples = read_header(path), canary_samples(key)
    _checked_rows(header, index, key)
    check_shapes(
        header,
        {
            "canary_samples": (samples.shape, samples.dtype),
            "canary_pixels": (pixels.shape, pixels.dtype),
        },
    )
    check_sum(header, "logits")
    check_sum(header, "canary_pixels", "canaries_sha256")
    found = (header.arrays["canary_samples"].map(), header.arrays["canary_pixels"].map())
    if not (np.array_equal(found[0], samples) and np.array_equal(found[1], pixels)):
        raise ShardError("has canaries that differ: the images or the augmentation have changed")
