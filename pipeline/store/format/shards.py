"""One shard's file, read: where its arrays are, and whether they are what they should be.

Contract code, for a resumed run trusts finished shards by it: an edit here runs the teacher again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from pipeline.store.format.encodings import columns
from pipeline.store.format.schema import ShardKey, StoreIdentity, attributes, canary_samples, sha256


class ShardError(Exception):
    """What is wrong with a shard, as the rest of a sentence that begins with its path."""


@dataclass(frozen=True)
class ArrayRef:
    """A contiguous array in a file."""

    path: Path
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """The array, mapped into memory read-only.

        By torch, which closes the file behind the mapping: np.memmap keeps a descriptor for each
        shard, and a process may often have 1,024.
        """
        size = self.offset + self.num_bytes
        file = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8).numpy()
        file.setflags(write=False)
        return file[self.offset :].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Header:
    attributes: Mapping[str, int | str]
    arrays: Mapping[str, ArrayRef]


#: What h5py raises for a file that is none of HDF5's, or for a damaged one.
_DAMAGED = (
    *(OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError),
    *(MemoryError, NotImplementedError),
)


def read_header(path: Path) -> Header:
    """Attributes and the arrays' places; no row is read.

    Raises:
        ShardError: absent, no HDF5 file, one with links, or an array that is not contiguous in it.
    """
    if not path.is_file():
        raise ShardError("is absent")
    try:
        with h5py.File(path, "r") as file:
            found = {key: _attribute(file.attrs, key) for key in file.attrs}
            links = [n for n in file if not isinstance(file.get(n, getlink=True), h5py.HardLink)]
            if links:  # HDF5 would open what they name, wherever that is
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
    return Header(found, arrays)


def _attribute(attributes: h5py.AttributeManager, key: str) -> int | str:
    """One number or text of fixed length; HDF5 reads no other kind for it."""
    dtype = attributes.get_id(key).dtype
    if dtype.kind not in "Siu":
        raise ShardError(f"is damaged: attribute `{key}` is {dtype}")
    value = attributes[key]
    return value.decode() if isinstance(value, bytes) else int(value)


def check_attributes(header: Header, expected: Mapping[str, int | str]) -> None:
    """Raises: ShardError: an attribute is another one."""
    for key, value in expected.items():
        if header.attributes.get(key) != value:
            raise ShardError(f"says {key} {header.attributes.get(key)}; expected {value}")


def check_shapes(header: Header, expected: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Raises: ShardError: an array is absent, or has another shape or type."""
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
    """What `check_shapes` expects of a shard's rows."""
    widths = columns(identity.encoding, identity.num_classes, identity.k)
    return {name: ((key.num_samples, width), dtype) for name, (width, dtype) in widths.items()}


def check_arrays(header: Header, identity: StoreIdentity, key: ShardKey) -> None:
    """Raises: ShardError: an array is absent or has another shape, type or checksum."""
    rows, samples = row_shapes(identity, key), canary_samples(key)
    canaries = {
        "canaries": ((len(samples), 32), np.dtype(np.uint8)),
        "canary_samples": (samples.shape, samples.dtype),
    }
    check_shapes(header, rows | canaries)
    if not np.array_equal(header.arrays["canary_samples"].map(), samples):
        raise ShardError("is damaged: its canary_samples are not those of its rows")
    for name in (*rows, "canaries"):
        check_sum(header, name)


def check_sum(header: Header, name: str, attribute: str | None = None) -> None:
    """Raises: ShardError: an array is not the one whose checksum the shard states."""
    if sha256(header.arrays[name].map()) != header.attributes.get(attribute or f"{name}_sha256"):
        raise ShardError(f"is damaged: its {name} do not match their checksum")


def check_shard(path: Path, identity: StoreIdentity, key: ShardKey, canaries: np.ndarray) -> None:
    """All of a shard: what it is, that it is undamaged, and that the teacher saw these images.

    Args:
        canaries: [K, 32] uint8, `canary_digests` of the views of `canary_samples(place)` now.

    Raises:
        ShardError: anything is not as expected.
    """
    header = read_header(path)
    check_attributes(header, attributes(identity, key))
    check_arrays(header, identity, key)
    if not np.array_equal(header.arrays["canaries"].map(), canaries):
        raise ShardError("has canaries that differ: the images or the augmentation have changed")
