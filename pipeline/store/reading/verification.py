"""Check the shards of a store: their headers on opening, every byte on verifying."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.data.prepared.dataset import Dataset
from pipeline.store.format.encodings import columns, unpack_ids
from pipeline.store.format.schema import (
    ShardKey,
    StoreIdentity,
    StoreIndex,
    shard_attributes,
)
from pipeline.store.format.shards import (
    ArrayRef,
    Header,
    ShardError,
    check_attributes,
    check_shapes,
    check_shard,
    read_header,
    row_shapes,
)
from pipeline.store.format.views_by_split import canaries_of, open_views_by_split


def row_references(header: Header, index: StoreIndex, key: ShardKey) -> dict[str, ArrayRef]:
    """Locate the rows of a shard.

    Raises:
        ShardError: the header is not that of this shard of this store.
    """
    check_attributes(header, shard_attributes(index, key))
    shapes = row_shapes(index, key)
    check_shapes(header, shapes)
    return {name: header.arrays[name] for name in shapes}


def differences(directory: Path, index: StoreIndex, dataset: Dataset) -> Iterator[str]:
    """Yield every shard whose checksums, canaries or rows are wrong, with the first reason.

    Args:
        dataset: at the size of the views.
    """
    views = open_views_by_split(dataset, index, torch.device("cpu"))
    for key in index.shards():
        path = directory / key.file_name
        try:
            check_shard(path, index, key, canaries_of(views, key))
            labels = dataset.splits[key.split].labels[key.first_sample :][: key.num_samples]
            _check_rows(read_header(path), index, labels)
        except ShardError as error:
            yield f"`{path}` {error}."


def _check_rows(header: Header, identity: StoreIdentity, labels: np.ndarray) -> None:
    """Raise ShardError for a row without a meaning, which another writer may have stored."""

    def refuse(bad: np.ndarray, name: str, expected: str) -> None:
        if bad.any():
            raise ShardError(f"is wrong in row {bad.argmax()}: its {name} are not {expected}")

    k = identity.k
    arrays = {
        name: header.arrays[name].map()
        for name in columns(identity.encoding, identity.num_classes, k)
    }
    for name, array in arrays.items():
        if name != "class_ids":
            exponent = np.uint16(0x7C00)  # all ones if a float16 is infinite or not a number
            refuse(((array.view(np.uint16) & exponent) == exponent).any(1), name, "finite numbers")
    if k is None:
        return
    ids, values = unpack_ids(arrays["class_ids"], k, identity.num_classes), arrays["values"]
    in_order = np.sort(ids)
    twice_or_unknown = (in_order[:, -1] >= identity.num_classes) | (np.diff(in_order) == 0).any(1)
    refuse(twice_or_unknown, "class_ids", f"{k} different classes of {identity.num_classes}")
    refuse(
        (values[:, 1:k] > values[:, : k - 1]).any(1), "values", f"the {k} largest in their order"
    )
    is_label = ids == np.where(labels < 0, ids[:, 0], labels)[:, None]  # [n, k]
    differs = (is_label & (values[:, :k] != values[:, k : k + 1])).any(1)
    refuse(differs, "values", "of one logit where the label is among the largest")
