"""The tensors of a file that torch.save wrote, without running code.

Both of its formats are read: the zip of torch 1.6 and later, and the sequence of pickles before it.
What is not a tensor stays as `InertUnpickler` makes it.
"""

import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pipeline.initial_weights.inert_pickle import Inert, InertUnpickler
from pipeline.runtime.errors import first_line

LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)
_KINDS = {
    "_rebuild_sparse_tensor": "sparse tensor",
    "_rebuild_qtensor": "quantized tensor",
    "_rebuild_meta_tensor_no_storage": "tensor without contents",
}


class Storage:
    """The bytes that tensors share, read when one of them is."""

    def __init__(self, dtype: torch.dtype, read: Callable[[], bytearray]):
        self.dtype = dtype
        self._read = read

    @cached_property
    def content(self) -> bytearray:
        """
        Raises:
            ValueError: the file is damaged.
        """
        try:
            return self._read()
        except Exception as error:  # those of zip files share no class
            raise ValueError(first_line(error)) from None


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """Read it.

        Raises:
            ValueError: it leads out of its storage, or the file is damaged.
        """
        content, size = self.storage.content, self.dtype.itemsize
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        steps = zip(self.shape, self.stride, strict=True)
        last = self.offset + sum((length - 1) * step for length, step in steps)
        if last >= len(content) // size:
            raise ValueError(
                f"a tensor of {list(self.shape)} leads out of its {len(content):,} bytes"
            )
        flat = torch.frombuffer(content, dtype=self.dtype, count=len(content) // size)
        return flat.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class Unreadable:
    """A tensor that has no plain storage."""

    kind: str


def read_zip(path: Path) -> Any:
    """Read a zip that torch.save wrote, or torch.jit.save.

    Raises:
        ValueError, pickle.UnpicklingError, ...: it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: part for part in archive.infolist()}
        name = next(name for name in parts if name.rpartition("/")[2] == "data.pkl")
        root = name.removesuffix("data.pkl")
        if parts.get(f"{root}byteorder") and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        storages: dict[tuple[str, torch.dtype], Storage] = {}

        def load_persistent(pid: Any) -> Storage:
            dtype, key, _ = _parse_storage(pid)
            part = parts.get(f"{root}data/{key}")
            if part is None:
                raise ValueError(f"it lacks its part `data/{key}`")
            return storages.setdefault(
                (key, dtype), Storage(dtype, partial(_read_part, path, part))
            )

        with archive.open(name) as file:
            return _load(file, load_persistent)


def _read_part(path: Path, part: zipfile.ZipInfo) -> bytearray:
    """Unpack a part, and compare its checksum."""
    content = bytearray(part.file_size)
    with zipfile.ZipFile(path) as archive, archive.open(part) as file:
        if file.readinto(content) != len(content) or file.read(1):
            raise ValueError(f"its part `{part.filename}` is cut short")
    return content


def read_sequence(path: Path) -> Any:
    """Read what torch.save wrote before torch 1.6.

    Raises:
        ValueError, pickle.UnpicklingError, ...: it is another pickle, or damaged.
    """
    places: dict[str, tuple[int, int]] = {}
    itemsizes: dict[str, int] = {}

    def load_persistent(pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ("module",):  # the class of a whole network
            return pid[1]
        dtype, key, view = _parse_storage(pid)
        itemsizes[key] = dtype.itemsize
        offset, length = (0, None) if view is None else view[1:]

        def read() -> bytearray:
            start, count = places[key]
            first = min(offset, count)
            count = count - first if length is None else min(length, count - first)
            content = bytearray(count * dtype.itemsize)
            with path.open("rb") as file:
                file.seek(start + first * dtype.itemsize)
                if file.readinto(content) != len(content):
                    raise ValueError("it is cut short")
            return content

        return Storage(dtype, read)

    with path.open("rb") as file:
        magic = _load(file)
        if magic != LEGACY_MAGIC:
            raise ValueError("it is a pickle that torch.save did not write")
        if (protocol := _load(file)) != _LEGACY_PROTOCOL:
            raise ValueError(f"its protocol is {protocol}; expected {_LEGACY_PROTOCOL}")
        system = _load(file)
        if not isinstance(system, dict) or not system.get("little_endian", True):
            raise ValueError("its numbers are big-endian")
        content = _load(file, load_persistent)
        for key in _load(file):
            count = int.from_bytes(file.read(8), sys.byteorder)
            places[key] = file.tell(), count
            file.seek(count * itemsizes[key], 1)
        if file.tell() > path.stat().st_size:
            raise ValueError("it is cut short")
    return content


def _load(file: BinaryIO, load_persistent: Callable[[Any], Any] | None = None) -> Any:
    return InertUnpickler(file, load_persistent).load()


def _parse_storage(pid: Any) -> tuple[torch.dtype, str, tuple[str, int, int] | None]:
    """The type, the key and the part of a storage from its entry in the pickle."""
    match pid:
        case ("storage", type() as kind, str() as key, str(), int(), *rest) if issubclass(
            kind, Inert
        ):
            dtype = _STORAGE_DTYPES.get(kind.path.rpartition(".")[2])
            if dtype is None:
                raise ValueError(f"it holds numbers of a kind that is not read, {kind.path}")
            match rest:
                case [] | [None]:
                    return dtype, key, None
                case [(str() as view_key, int() as offset, int() as length)] if (
                    offset >= 0 and length >= 0
                ):
                    return dtype, key, (view_key, offset, length)
    raise ValueError("it refers to something that is no storage of numbers")


def tensor_of(value: Inert) -> StoredTensor | Unreadable | None:
    """The tensor that torch would rebuild; None if it would be something else."""
    for _ in range(8):  # a parameter, or a tensor with attributes, is around a tensor
        module, _, function = value.path.rpartition(".")
        match module, function, value.args:
            case "torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state", (
                Inert() as inner,
                *_,
            ):
                value = inner
            case "torch._tensor", "_rebuild_from_type_v2", (
                type() as rebuild,
                _,
                tuple() as args,
                *_,
            ) if issubclass(rebuild, Inert):
                value = rebuild(*args)
            case "torch._utils", _, _ if function.startswith("_rebuild_"):
                return _stored(function, value.args)
            case _:
                return None
    return None


def _stored(function: str, args: tuple[Any, ...]) -> StoredTensor | Unreadable:
    match function, args:
        case "_rebuild_tensor" | "_rebuild_tensor_v2", (
            Storage() as storage,
            offset,
            shape,
            stride,
            *rest,
        ):
            dtype, metadata = storage.dtype, rest[2:3]
        case "_rebuild_tensor_v3", (
            Storage() as storage,
            offset,
            shape,
            stride,
            _,
            _,
            type() as kind,
            *metadata,
        ) if issubclass(kind, Inert):
            dtype = vars(torch).get(kind.path.removeprefix("torch."))
        case _:
            return Unreadable(_KINDS.get(function, f"tensor of `{function}`"))
    if not isinstance(dtype, torch.dtype) or dtype in _QUANTIZED or any(metadata):
        return Unreadable("tensor of an unknown type")
    (offset,), shape, stride = _sizes((offset,)), _sizes(shape), _sizes(stride)
    if len(shape) != len(stride):
        raise ValueError("a tensor has a shape and a stride of different lengths")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _sizes(values: Any) -> tuple[int, ...]:
    if isinstance(values, Inert) and values.args:  # torch.Size
        values = values.args[0]
    if not isinstance(values, tuple) or not all(isinstance(n, int) and n >= 0 for n in values):
        raise ValueError("a tensor has a shape that is not of whole numbers")
    return values
