"""Write the files of a store: shards and the index, as docs/soft_targets_format.md defines them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np

from pipeline.models.raw_logits import beyond_float16
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.files import write_bytes, write_json
from pipeline.store.format.encodings import columns, encode, less_offset
from pipeline.store.format.schema import (
    FORMAT_VERSION,
    INDEX,
    ShardKey,
    StoreIdentity,
    StoreIndex,
    canary_samples,
    sha256,
    shard_attributes,
)


def write_shard(
    path: Path,
    identity: StoreIdentity,
    key: ShardKey,
    logits: np.ndarray,
    labels: np.ndarray,
    canaries: np.ndarray,
) -> None:
    """Write one shard: whole and flushed to disk under its name, or not at all.

    Args:
        logits: [num_samples, num_classes] float32, raw.
        labels: [num_samples] int64, -1 if unlabelled: top_k keeps the label's logit.
        canaries: [<= CANARIES, 32] uint8, the digests of `canary_samples(key)`.

    Raises:
        UserError: a logit is not finite, or its row is too wide for float16; or the disk is full or
            read-only.
    """
    check_storable(key, logits)
    arrays = encode(less_offset(logits), labels, identity.encoding, identity.k)
    write_bytes(path, _file_image(identity, key, arrays, canaries))


def check_storable(key: ShardKey, logits: np.ndarray) -> None:
    """Raise UserError if a logit is not finite, or its row is too wide for float16."""
    wrong = beyond_float16(logits)
    if wrong.any():
        bad_rows = wrong.any(1)
        bad = int(np.argmax(bad_rows))
        value = logits[bad][wrong[bad]][0]
        raise UserError(
            f"the teacher's logit is {value} for sample {key.first_sample + bad} of {key.split}, "
            f"view {key.view} ({counted(int(bad_rows.sum()), 'such sample')} in this shard); "
            "expected finite logits within float16's ±65504, or all of a row so near each other. "
            "Check the teacher's weights, its `mean` and `std`, and `soft_targets.precision`."
        )


def shard_bytes(identity: StoreIdentity, key: ShardKey) -> int:
    """The exact size of a shard's file, known before its rows are."""
    # Of a pair, the strong views have a policy, and so a text, of their own.
    return _shard_bytes(identity, replace(key, view=key.view % 2, first_sample=0))


@lru_cache  # a store has few shapes of shards, and HDF5's overhead follows no simple rule
def _shard_bytes(identity: StoreIdentity, key: ShardKey) -> int:
    widths = columns(identity.encoding, identity.num_classes, identity.k)
    arrays = {
        name: np.zeros((key.num_samples, width), dtype) for name, (width, dtype) in widths.items()
    }
    canaries = np.zeros((len(canary_samples(key)), 32), np.uint8)
    return len(_file_image(identity, key, arrays, canaries))


def _file_image(
    identity: StoreIdentity, key: ShardKey, arrays: Mapping[str, np.ndarray], canaries: np.ndarray
) -> bytes:
    """The HDF5 file, built in memory: h5py reports no error when it writes to a full disk."""
    with h5py.File("shard", "w", driver="core", backing_store=False) as file:
        for name, value in shard_attributes(identity, key).items():
            text = isinstance(value, str)
            file.attrs[name] = np.bytes_(value.encode()) if text else np.int64(value)
        checked = {**arrays, "canaries": canaries}
        for name, array in checked.items():
            file.attrs[f"{name}_sha256"] = np.bytes_(sha256(array))
        for name, array in {**checked, "canary_samples": canary_samples(key)}.items():
            file.create_dataset(name, data=array, track_times=False)
        file.flush()
        return file.id.get_file_image()


def write_index(
    directory: Path,
    identity: StoreIdentity,
    class_names: Sequence[str],
    split_sizes: Mapping[str, int],
    num_views: int,
    fidelity: Mapping[str, float],
) -> None:
    """Write the index: the shards of the complete store, and the fidelity of its rows."""
    index = StoreIndex(
        format_version=FORMAT_VERSION,
        **identity.fields(),
        splits=dict(split_sizes),
        num_views=num_views,
        fidelity=dict(fidelity),
        class_names=list(class_names),
    )
    write_json(directory / INDEX, index.content())
