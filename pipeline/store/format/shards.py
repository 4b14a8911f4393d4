"""Read one shard's file and check it: its attributes, arrays, checksums and canaries."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from pipeline.store.format.encodings import columns
from pipeline.store.format.schema import (
    ShardKey,
    StoreIdentity,
    canary_samples,
    sha256,
    shard_attributes,
)


class ShardError(Exception):
    """A problem of one shard. Its message continues a sentence that begins with the path."""


@dataclass(frozen=True)
class ArrayRef:
    """The location of a contiguous array in a file."""

    path: Path
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """Map the array into memory, read-only.

        torch closes the file after mapping it. np.memmap keeps a descriptor open for each shard,
        and many systems allow a process 1,024.
        """
        size = self.offset + self.num_bytes
        file = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8).numpy()
        file.setflags(write=False)
        return file[self.offset :].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Header:
    attributes: Mapping[str, int | str]
    arrays: Mapping[str, ArrayRef]


#: What h5py raises for a damaged file, or for a file that is not HDF5.
_DAMAGED = (
    *(OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError),
    *(MemoryError, NotImplementedError),
)


def read_header(path: Path) -> Header:
    """Read the attributes and locate the arrays; reads no row.

    Raises:
        ShardError: the file is absent, damaged or not HDF5, or has a link or an array that is not
            contiguous.
    """
    if not path.is_file():
        raise ShardError("is absent")
    try:
        with h5py.File(path, "r") as file:
            attributes = {key: _attribute(file.attrs, key) for key in file.attrs}
            links = [n for n in file if not isinstance(file.get(n, getlink=True), h5py.HardLink)]
            if links:  # HDF5 would open the file that a link names
                raise ShardError(f"is damaged: `{links[0]}` is a link")
            arrays = {
                name: ArrayRef(path, dataset.id.get_offset(), tuple(dataset.shape), dataset.dtype)
                for name, dataset in file.items()
            }
    except _DAMAGED as error:
        raise ShardError(f"is damaged and cannot be read ({error})") from None
    size = path.stat().st_size
    for name, array in arrays.items():
        if array.offset is None or array.offset + array.num_bytes > size:
            raise ShardError(f"is damaged: `{name}` is at offset {array.offset} of {size} bytes")
    return Header(attributes, arrays)


def _attribute(manager: h5py.AttributeManager, key: str) -> int | str:
    """Read an integer or a text of fixed length.

    Raises:
        ShardError: the attribute has another type; HDF5 does not read its value.
    """
    dtype = manager.get_id(key).dtype
    if dtype.kind not in "Siu":
        raise ShardError(f"is damaged: attribute `{key}` is {dtype}")
    value = manager[key]
    return value.decode() if isinstance(value, bytes) else int(value)


def check_attributes(header: Header, expected: Mapping[str, int | str]) -> None:
    """Raise ShardError if an attribute is absent or differs."""
    for key, value in expected.items():
        if header.attributes.get(key) != value:
            raise ShardError(f"says {key} {header.attributes.get(key)}; expected {value}")


def check_shapes(header: Header, expected: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Raise ShardError if an array is absent, or has another shape or type."""
    for name, (shape, dtype) in expected.items():
        array = header.arrays.get(name)
        if array is None:
            raise ShardError(f"is damaged: it has no `{name}`")
        if (array.shape, array.dtype) != (shape, dtype):
            raise ShardError(
                f"is damaged: {name} are {array.dtype} {list(array.shape)}; expected {dtype} "
                f"{list(shape)}"
            )


def row_shapes(
    identity: StoreIdentity, key: ShardKey
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array of rows, as `check_shapes` takes them."""
    widths = columns(identity.encoding, identity.num_classes, identity.k)
    return {name: ((key.num_samples, width), dtype) for name, (width, dtype) in widths.items()}


def check_arrays(header: Header, identity: StoreIdentity, key: ShardKey) -> None:
    """Raise ShardError if an array is absent, or has another shape, type or checksum."""
    rows, samples = row_shapes(identity, key), canary_samples(key)
    canaries = {
        "canaries": ((len(samples), 32), np.dtype(np.uint8)),
        "canary_samples": (samples.shape, samples.dtype),
    }
    check_shapes(header, rows | canaries)
    if not np.array_equal(header.arrays["canary_samples"].map(), samples):
        raise ShardError("is damaged: its canary_samples are not those of its rows")
    for name in (*rows, "canaries"):
        if sha256(header.arrays[name].map()) != header.attributes.get(f"{name}_sha256"):
            raise ShardError(f"is damaged: its {name} do not match their checksum")


def check_shard(path: Path, identity: StoreIdentity, key: ShardKey, canaries: np.ndarray) -> None:
    """Check all of a shard: its attributes, its checksums, and that the teacher saw these images.

    Args:
        canaries: [K, 32] uint8, the digests of `canary_samples(key)` as this code augments them.

    Raises:
        ShardError: something differs.
    """
    header = read_header(path)
    check_attributes(header, shard_attributes(identity, key))
    check_arrays(header, identity, key)
    if not np.array_equal(header.arrays["canaries"].map(), canaries):
        raise ShardError("has canaries that differ: the images or the augmentation have changed")
