"""The prepared dataset, memory-mapped: pixels of one size, or encoded images of any size."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field, ValidationInfo, field_validator

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json, read_json, sha256_of_file
from pipeline.runtime.outputs import PREPARED
from pipeline.runtime.validation import Record, read_model

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
AGAIN = "dvc repro prepare"
_NOT_HASHED = {"mean", "std", "fingerprint", "duplicates", "unreadable"}  # keys of dataset.json
_CHUNK = 4096  # images at a time, for hashes


@dataclass(frozen=True)
class _Samples:
    """One split's samples, numbered from 0."""

    labels: np.ndarray  # [N] int64
    directory: Path
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sample_ids(self) -> Sequence[str]:
        """[N] stable ids: paths below the dataset's root, or indices in a packed source."""
        path = self.directory / f"{self.name}_ids.json"
        ids = read_json(path, produced_by=AGAIN).get("sample_ids")
        is_list = isinstance(ids, list) and len(ids) == len(self)
        if not (is_list and all(isinstance(sample_id, str) for sample_id in ids)):
            raise UserError(f"`{path}` does not name {len(self):,} samples. Run `{AGAIN}`.")
        return ids


@dataclass(frozen=True)
class Split(_Samples):
    """Samples as pixels."""

    images: np.ndarray  # [N, C, H, W] uint8, memory-mapped

    def resized(self, size: int) -> "Split":
        """Resize the pixels in memory, bicubic with antialiasing."""
        resized = np.empty((*self.images.shape[:2], size, size), np.uint8)
        for source, target in zip(self.images, resized, strict=True):
            for channel, plane in enumerate(source):
                image = Image.fromarray(np.ascontiguousarray(plane))
                target[channel] = image.resize((size, size), Image.Resampling.BICUBIC)
        return replace(self, images=resized)


@dataclass(frozen=True)
class EncodedSplit(_Samples):
    """Samples as encoded images: the bytes of one file after another.

    Pickles as its path: a worker process opens the files again.
    """

    offsets: np.ndarray  # [N + 1] int64: each image's first byte; the last: the end of the file
    sizes: np.ndarray  # [N, 2] int32, height and width, upright
    channels: int
    image_size: int  # pixels, the side of its views

    def __reduce__(self) -> tuple[Callable, tuple]:
        arguments = (self.directory, self.name, len(self), self.channels, self.image_size)
        return _open_encoded, arguments

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(encoded_path(self.directory, self.name), np.uint8, "r")

    def content(self, sample: int) -> bytes:
        """The bytes of one sample's image file."""
        return self._bytes[self.offsets[sample] : self.offsets[sample + 1]].tobytes()

    def resized(self, size: int) -> "EncodedSplit":
        """Change the size of the views; images are resized when they are decoded."""
        return replace(self, image_size=size)


AnySplit = Split | EncodedSplit


def encoded_path(directory: Path, name: str) -> Path:
    return directory / f"{name}_images.bin"


@dataclass(frozen=True)
class Dataset:
    """The dataset that `prepare` wrote."""

    fingerprint: str  # of pixels or encoded bytes, labels, sample ids and class names
    class_names: Sequence[str]
    channels: int
    image_size: int  # pixels, the side of a network's input
    mean: Sequence[float]  # [C], of the training pixels in [0, 1]
    std: Sequence[float]
    splits: Mapping[str, AnySplit]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def encoded(self) -> bool:
        return all(isinstance(split, EncodedSplit) for split in self.splits.values())

    def resized(self, size: int) -> "Dataset":
        """Change the size of the images. At their own size, they stay memory-mapped."""
        if size == self.image_size:
            return self
        splits = {name: split.resized(size) for name, split in self.splits.items()}
        return replace(self, image_size=size, splits=splits)


class DatasetDescription(Record):
    """dataset.json: keys that are None are not in the file."""

    format_version: Literal[FORMAT_VERSION]
    class_names: list[str] = Field(min_length=2)
    channels: Literal[1, 3]
    image_size: int = Field(gt=0)
    splits: dict[Literal[SPLITS], Annotated[int, Field(gt=0)]] = Field(min_length=len(SPLITS))
    storage: Literal["encoded"] | None = None
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    fingerprint: str
    duplicates: dict[str, Any] | None = None  # as `find_duplicates` returns them
    unreadable: int | None = None  # files left out; unreadable.json beside it lists them

    @field_validator("mean", "std")
    @classmethod
    def _one_for_each_channel(cls, values: list[float], info: ValidationInfo) -> list[float]:
        if len(values) != info.data.get("channels", len(values)):
            raise ValueError(f"{len(values)} values; expected one for each channel")
        return values


def open_dataset(directory: Path = PREPARED) -> Dataset:
    """Open the prepared dataset, read-only.

    Raises:
        UserError: it is absent, incomplete, or of another format version.
    """
    description = read_model(directory / "dataset.json", DatasetDescription, produced_by=AGAIN)
    channels, side, splits = description.channels, description.image_size, {}
    last_label = len(description.class_names) - 1
    for name in SPLITS:
        count = description.splits[name]
        if description.storage == "encoded":
            splits[name] = _open_encoded(directory, name, count, channels, side)
        else:
            images = _map(directory / f"{name}_images.npy", (count, channels, side, side), np.uint8)
            labels = _map(directory / f"{name}_labels.npy", (count,), np.int64)
            splits[name] = Split(labels, directory, name, images)
        labels, least = splits[name].labels, -1 if name == "train" else 0  # -1: unlabelled
        if not least <= labels.min() <= labels.max() <= last_label:
            raise UserError(
                f"`{directory / f'{name}_labels.npy'}` holds labels from {labels.min()} to "
                f"{labels.max()}; expected {least} to {last_label}. Run `{AGAIN}`."
            )
    not_shared = {"format_version", "splits", "storage", "duplicates", "unreadable"}
    shared = description.model_dump(exclude=not_shared)
    return Dataset(**shared, splits=splits)


def verify_dataset(directory: Path = PREPARED) -> None:
    """Check every byte of the dataset, once per run, in the parent process, after `open_dataset`.

    Raises:
        UserError: images, labels, sample ids or class names have changed since `prepare`.
    """
    description = read_model(directory / "dataset.json", DatasetDescription, produced_by=AGAIN)
    if fingerprint_of(directory, description) != description.fingerprint:
        raise UserError(
            f"`{directory}` is damaged: its images, labels or sample ids are not those that "
            f"`dataset.json` in it describes. Remove `{directory}` and run `{AGAIN}`; if DVC's "
            f"cache has the damage, `{AGAIN} --force`."
        )


def fingerprint_of(directory: Path, description: DatasetDescription) -> str:
    """SHA-256 of every split's sample ids, labels and pixels (or encoded bytes, their offsets and
    sizes), and of the keys of dataset.json that say what these are."""
    header = description.model_dump(exclude=_NOT_HASHED, exclude_none=True)
    digest = hashlib.sha256(canonical_json(header).encode())
    for split in SPLITS:
        digest.update((directory / f"{split}_ids.json").read_bytes())
        digest.update(np.load(directory / f"{split}_labels.npy").tobytes())
        if description.storage == "encoded":
            for name in ("offsets", "sizes"):
                digest.update(np.load(directory / f"{split}_{name}.npy").tobytes())
            digest.update(bytes.fromhex(sha256_of_file(encoded_path(directory, split))))
            continue
        images = np.load(directory / f"{split}_images.npy", mmap_mode="r")
        for start in range(0, len(images), _CHUNK):
            digest.update(images[start : start + _CHUNK].tobytes())
    return digest.hexdigest()


def _open_encoded(
    directory: Path, name: str, count: int, channels: int, image_size: int
) -> EncodedSplit:
    offsets = _map(directory / f"{name}_offsets.npy", (count + 1,), np.int64)
    sizes = _map(directory / f"{name}_sizes.npy", (count, 2), np.int32)
    labels = _map(directory / f"{name}_labels.npy", (count,), np.int64)
    path = encoded_path(directory, name)
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise UserError(f"`{path}` cannot be read ({error}). Run `{AGAIN}`.") from None
    if offsets[0] != 0 or offsets[-1] != size_bytes or (np.diff(offsets) <= 0).any():
        raise UserError(
            f"`{path}` holds {size_bytes:,} bytes; expected {offsets[-1]:,}, {count:,} images as "
            f"`{name}_offsets.npy` beside it says. Run `{AGAIN}`."
        )
    return EncodedSplit(labels, directory, name, offsets, sizes, channels, image_size)


def _map(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    try:
        # Copy-on-write: torch accepts the array without a warning, and the file cannot change.
        array = np.lib.format.open_memmap(path, "c")
    except Exception as error:  # NumPy evaluates the header: any class
        reason = error if isinstance(error, (OSError, ValueError)) else "its header is damaged"
        raise UserError(f"`{path}` cannot be read ({reason}). Run `{AGAIN}`.") from None
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"`{path}` holds {array.dtype} {list(array.shape)}; expected {np.dtype(dtype)} "
            f"{list(shape)}. Run `{AGAIN}`."
        )
    return array
