"""The prepared dataset: pixels of one size, or encoded images of any, in few memory-mapped files.

Contract code: an edit here runs the teacher again. Reads with NumPy alone.
"""

import hashlib
import math
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json, read_json, sha256_of_file
from pipeline.runtime.outputs import PREPARED

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
AGAIN = "dvc repro prepare"
#: What dataset.json says and the fingerprint covers; `storage` stands there if it is `encoded`.
HEADER = ("format_version", "class_names", "channels", "image_size", "splits", "storage")
_CHUNK = 4096  # images at a time, for hashes


@dataclass(frozen=True)
class Split:
    """One split's samples, numbered from 0."""

    images: np.ndarray  # [N, C, H, W] uint8, memory-mapped
    labels: np.ndarray  # [N] int64
    directory: Path
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sample_ids(self) -> Sequence[str]:
        """[N] stable ids: the path below the split's folder, or the index in a packed source."""
        return _read_ids(self.directory, self.name, len(self))


@dataclass(frozen=True)
class EncodedSplit:
    """One split's samples as encoded images, numbered from 0: files' bytes, one after another.

    Pickled by its place, not by its contents, so a worker process opens it again.
    """

    offsets: np.ndarray  # [N + 1] int64, where each image's bytes begin; the last: where they end
    sizes: np.ndarray  # [N, 2] int32, height and width as displayed, after EXIF rotation
    labels: np.ndarray  # [N] int64
    channels: int
    image_size: int  # pixels, the side of its views
    directory: Path
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Callable, tuple]:
        place = (self.directory, self.name, len(self), self.channels, self.image_size)
        return _open_encoded, place

    @cached_property
    def sample_ids(self) -> Sequence[str]:
        """[N] stable ids, as those of `Split`."""
        return _read_ids(self.directory, self.name, len(self))

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(encoded_path(self.directory, self.name), np.uint8, "r")

    def content(self, sample: int) -> bytes:
        """The bytes of one sample's image file."""
        return self._bytes[self.offsets[sample] : self.offsets[sample + 1]].tobytes()


AnySplit = Split | EncodedSplit


def encoded_path(directory: Path, name: str) -> Path:
    return directory / f"{name}_images.bin"


def _read_ids(directory: Path, name: str, count: int) -> Sequence[str]:
    path = directory / f"{name}_ids.json"
    ids = read_json(path, produced_by=AGAIN).get("sample_ids")
    if not (isinstance(ids, list) and len(ids) == count and all(isinstance(i, str) for i in ids)):
        raise UserError(f"`{path}` does not name {count:,} samples. Run `{AGAIN}`.")
    return ids


@dataclass(frozen=True)
class Dataset:
    """What `prepare` wrote. `fingerprint` covers pixels or encoded bytes, labels, sample ids and
    class names."""

    fingerprint: str
    class_names: Sequence[str]
    channels: int
    image_size: int  # pixels, the side of the images as networks get them
    mean: Sequence[float]  # per channel, of the training pixels in [0, 1]
    std: Sequence[float]
    splits: Mapping[str, AnySplit]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def encoded(self) -> bool:
        return all(isinstance(split, EncodedSplit) for split in self.splits.values())

    def resized(self, image_size: int) -> "Dataset":
        """The dataset with images of another size: resized in memory, bicubic with antialiasing;
        encoded images when they are decoded. At the size of the prepared images, itself,
        memory-mapped."""
        if image_size == self.image_size:
            return self
        splits = {name: _at(split, image_size) for name, split in self.splits.items()}
        return replace(self, image_size=image_size, splits=splits)


def _at(split: AnySplit, image_size: int) -> AnySplit:
    if isinstance(split, EncodedSplit):
        return replace(split, image_size=image_size)
    return replace(split, images=_resized(split.images, image_size))


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    resized = np.empty((*images.shape[:2], size, size), np.uint8)
    for source, target in zip(images, resized, strict=True):
        for channel, plane in enumerate(source):
            image = Image.fromarray(np.ascontiguousarray(plane))
            target[channel] = image.resize((size, size), Image.Resampling.BICUBIC)
    return resized


def _check_description(path: Path, said: Mapping[str, Any]) -> None:
    """Raises: UserError: names what `prepare` did not write so."""
    channels = said.get("channels")

    def of_channels(values: Any) -> bool:
        numbers = isinstance(values, list) and all(type(v) in (int, float) for v in values)
        return numbers and len(values) == channels and all(map(math.isfinite, values))

    expected: dict[str, Callable[[Any], bool]] = {
        "fingerprint": lambda text: isinstance(text, str),
        "class_names": lambda names: (
            isinstance(names, list)
            and len(names) > 1
            and all(isinstance(name, str) for name in names)
        ),
        "channels": lambda number: number in (1, 3),
        "image_size": lambda pixels: type(pixels) is int and pixels > 0,
        "mean": of_channels,
        "std": lambda values: of_channels(values) and min(values) > 0,
        "splits": lambda sizes: (
            isinstance(sizes, dict)
            and sizes.keys() == set(SPLITS)
            and all(type(size) is int and size > 0 for size in sizes.values())
        ),
        "storage": lambda form: form in ("encoded", None),
    }
    wrong = [key for key, fits in expected.items() if not fits(said.get(key))]
    if wrong:
        found = f"{wrong[0]} {said.get(wrong[0])!r}"
        raise UserError(
            f"`{path}` says {found:.80}, which `prepare` does not write. Run `{AGAIN}`."
        )


def open_dataset(directory: Path = PREPARED) -> Dataset:
    """The prepared dataset, read-only.

    Raises:
        UserError: it is absent, incomplete, or of another format version.
    """
    description = read_json(directory / "dataset.json", produced_by=AGAIN)
    if description.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"`{directory}` has format version {description.get('format_version')}; expected "
            f"{FORMAT_VERSION}. Run `{AGAIN}`."
        )
    _check_description(directory / "dataset.json", description)
    class_names = description["class_names"]
    side, channels = description["image_size"], description["channels"]
    splits = {}
    for name in SPLITS:
        count = description["splits"][name]
        if description.get("storage") == "encoded":
            splits[name] = _open_encoded(directory, name, count, channels, side)
        else:
            images = _map(directory / f"{name}_images.npy", (count, channels, side, side), np.uint8)
            labels = _map(directory / f"{name}_labels.npy", (count,), np.int64)
            splits[name] = Split(images, labels, directory, name)
        labels, least = splits[name].labels, -1 if name == "train" else 0  # -1: it has none
        if not least <= labels.min() <= labels.max() < len(class_names):
            raise UserError(
                f"`{directory / f'{name}_labels.npy'}` holds labels from {labels.min()} to "
                f"{labels.max()}; expected {least} to {len(class_names) - 1}. Run `{AGAIN}`."
            )
    return Dataset(
        fingerprint=description["fingerprint"],
        class_names=class_names,
        channels=channels,
        image_size=side,
        mean=description["mean"],
        std=description["std"],
        splits=splits,
    )


def verify_dataset(directory: Path = PREPARED) -> None:
    """Read every byte of what `open_dataset` has opened, once per run, in the parent process.

    Raises:
        UserError: samples, labels or class names are not those that were prepared.
    """
    description = read_json(directory / "dataset.json", produced_by=AGAIN)
    header = {key: description[key] for key in HEADER if key in description}
    if fingerprint_of(directory, header) != description["fingerprint"]:
        raise UserError(
            f"`{directory}` is damaged: its images, labels or sample ids are not those that "
            f"`dataset.json` in it describes. Remove `{directory}` and run `{AGAIN}`; if DVC's "
            f"cache has the damage, `{AGAIN} --force`."
        )


def fingerprint_of(directory: Path, header: Mapping[str, object]) -> str:
    """SHA-256 over the header and every split's sample ids, labels and pixels, or encoded bytes and
    what is said of them.

    Args:
        header: HEADER's of dataset.json.
    """
    digest = hashlib.sha256(canonical_json(header).encode())
    for split in SPLITS:
        digest.update((directory / f"{split}_ids.json").read_bytes())
        digest.update(np.load(directory / f"{split}_labels.npy").tobytes())
        if header.get("storage") == "encoded":
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
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"`{path}` cannot be read ({error}). Run `{AGAIN}`.") from None
    if offsets[0] != 0 or offsets[-1] != found or (np.diff(offsets) <= 0).any():
        raise UserError(
            f"`{path}` holds {found:,} bytes; expected {offsets[-1]:,}, {count:,} images as "
            f"`{name}_offsets.npy` beside it says. Run `{AGAIN}`."
        )
    return EncodedSplit(offsets, sizes, labels, channels, image_size, directory, name)


#: What NumPy raises for a header that it cannot take for Python's notation.
_UNREADABLE = (
    *(OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError),
    *(MemoryError, RecursionError, TypeError, LookupError),
)


def _map(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    try:
        # Copy-on-write: torch takes the pages without a warning, and nothing reaches the file.
        array = np.lib.format.open_memmap(path, "c")
    except _UNREADABLE as error:
        found = error if isinstance(error, (OSError, ValueError)) else "its header is damaged"
        raise UserError(f"`{path}` cannot be read ({found}). Run `{AGAIN}`.") from None
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"`{path}` holds {array.dtype} {list(array.shape)}; expected {np.dtype(dtype)} "
            f"{list(shape)}. Run `{AGAIN}`."
        )
    return array
