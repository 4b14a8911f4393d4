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
            _check_rows(read_header(path), index)
        except ShardError as error:
            yield f"`{path}` {error}."


def _check_rows(header: Header, identity: StoreIdentity) -> None:
    """Raise ShardError for a row without a meaning, which another writer may have stored."""
    for name in columns(identity.encoding, identity.num_classes, identity.k):
        array = header.arrays[name].map()
        if name == "class_ids":
            ids = np.sort(unpack_ids(array, identity.k, identity.num_classes))
            bad = (ids[:, -1] >= identity.num_classes) | (np.diff(ids) == 0).any(1)
            expected = f"{identity.k} different classes of {identity.num_classes}"
        else:
            exponent = np.uint16(0x7C00)  # all ones if a float16 is infinite or not a number
            bad = ((array.view(np.uint16) & exponent) == exponent).any(1)
            expected = "finite numbers"
        if bad.any():
            raise ShardError(f"is wrong in row {bad.argmax()}: its {name} are not {expected}")
