"""The prepared dataset: images of one size, packed to few files, memory-mapped.

Contract code: an edit here runs the teacher again. Reads with NumPy alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import UserError
from pipeline.files import read_json

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
PREPARED = Path("data/prepared")


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
        return read_json(self.directory / f"{self.name}_ids.json", made_by="dvc repro prepare")[
            "sample_ids"
        ]


@dataclass(frozen=True)
class Dataset:
    """What `prepare` wrote. `fingerprint` covers pixels, labels, sample ids and class names."""

    fingerprint: str
    class_names: Sequence[str]
    channels: int
    image_size: int
    mean: Sequence[float]  # per channel, of the training pixels in [0, 1]
    std: Sequence[float]
    splits: Mapping[str, Split]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def at(self, image_size: int) -> "Dataset":
        """The dataset with images of another size: resized in memory, bicubic with antialiasing.
        At the size of the prepared images, itself, memory-mapped."""
        if image_size == self.image_size:
            return self
        splits = {
            name: replace(split, images=_resized(split.images, image_size))
            for name, split in self.splits.items()
        }
        return replace(self, image_size=image_size, splits=splits)


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    resized = np.empty((*images.shape[:2], size, size), np.uint8)
    for source, target in zip(images, resized, strict=True):
        for channel, plane in enumerate(source):
            image = Image.fromarray(np.ascontiguousarray(plane))
            target[channel] = image.resize((size, size), Image.Resampling.BICUBIC)
    return resized


def open_dataset(directory: Path = PREPARED) -> Dataset:
    """The prepared dataset, read-only.

    Raises:
        UserError: it is absent, incomplete, or of another format version.
    """
    again = "dvc repro prepare"
    description = read_json(directory / "dataset.json", made_by=again)
    if description.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"`{directory}` has format version {description.get('format_version')}; expected "
            f"{FORMAT_VERSION}. Run `{again}`."
        )
    side, channels = description["image_size"], description["channels"]
    splits = {}
    for name in SPLITS:
        count = description["splits"][name]
        images = _map(directory / f"{name}_images.npy", (count, channels, side, side), np.uint8)
        labels = _map(directory / f"{name}_labels.npy", (count,), np.int64)
        splits[name] = Split(images, labels, directory, name)
    return Dataset(
        fingerprint=description["fingerprint"],
        class_names=description["class_names"],
        channels=channels,
        image_size=side,
        mean=description["mean"],
        std=description["std"],
        splits=splits,
    )


def _map(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    try:
        # Copy-on-write: torch takes the pages without a warning, and nothing reaches the file.
        array = np.load(path, mmap_mode="c")
    except (OSError, ValueError) as error:
        raise UserError(f"`{path}` cannot be read ({error}). Run `dvc repro prepare`.") from None
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"`{path}` holds {array.dtype} {list(array.shape)}; expected {np.dtype(dtype)} "
            f"{list(shape)}. Run `dvc repro prepare`."
        )
    return array
