"""Encode images for `storage: encoded`, and write them one after another into a file."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.sources.params import DatasetParams

_LONGEST_SIDE = 65_500  # pixels, of a JPEG


@dataclass(frozen=True)
class EncodedImage:
    content: bytes
    height: int  # pixels, upright
    width: int


def encode(image: Image.Image, source: bytes, params: DatasetParams) -> EncodedImage | None:
    """Encode an image for `storage: encoded`; None for `pixels`.

    With a quality, a shorter side above `image_size` is reduced to it (bicubic, antialiased, aspect
    ratio kept), and the image becomes a JPEG (baseline, chroma at half the resolution each way, no
    metadata).

    Args:
        image: upright, 8 bits a channel.
        source: the bytes of its file, which `quality: original` keeps.

    Raises:
        ValueError: a side is longer than JPEG allows.
    """
    if params.storage == "pixels":
        return None
    if params.quality == "original":
        return EncodedImage(source, image.height, image.width)
    image = image.convert("RGB" if params.channels == 3 else "L")
    ratio = params.image_size / min(image.size)
    if ratio < 1:
        size = [max(params.image_size, round(side * ratio)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    if max(image.size) > _LONGEST_SIDE:
        raise ValueError(f"it is {max(image.size):,} pixels long; JPEG takes {_LONGEST_SIDE:,}")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=params.quality, subsampling="4:2:0", comment=b"")
    return EncodedImage(file.getvalue(), image.height, image.width)


class EncodedFile:
    """A file of encoded images, one after another, written in any order and sorted at the end."""

    def __init__(self, path: Path, count: int):
        self._path = path
        self._starts = np.zeros(count, np.int64)  # in the file before it is sorted
        self._lengths = np.zeros(count, np.int64)
        self.sizes = np.zeros((count, 2), np.int32)  # [N, 2] height, width

    def __enter__(self) -> "EncodedFile":
        self._file = open(self._path, "wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def offsets(self) -> np.ndarray:
        """[N + 1] int64: each image's first byte in the sorted file, then the end of the file."""
        return np.concatenate([[0], np.cumsum(self._lengths)])

    def write(self, row: int, image: EncodedImage) -> None:
        """Append an image, which the sorted file has at place `row`."""
        self._starts[row], self._lengths[row] = self._file.tell(), len(image.content)
        self.sizes[row] = image.height, image.width
        self._file.write(image.content)

    def sort(self) -> None:
        """Sort the closed file by rows, through a copy beside it."""
        size_bytes = self._path.stat().st_size
        if np.array_equal(np.append(self._starts, size_bytes), self.offsets):
            return
        copy = self._path.with_suffix(".sorted")
        with open(self._path, "rb") as source, open(copy, "wb") as target:
            for start, length in zip(self._starts, self._lengths, strict=True):
                source.seek(start)
                target.write(source.read(length))
        copy.replace(self._path)
