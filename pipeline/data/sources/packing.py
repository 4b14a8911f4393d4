"""Pack the images of a source into the few files of data/prepared."""

import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from pipeline.data.prepared.dataset import (
    FORMAT_VERSION,
    SPLITS,
    DatasetDescription,
    encoded_path,
    fingerprint_of,
)
from pipeline.data.sources.image_encoding import EncodedFile
from pipeline.data.sources.image_reading import DIGEST_BYTES, DecodedImage
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.splits import UNLABELLED, ImageSource
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import reserve, write_bytes, write_json
from pipeline.runtime.progress import bar

#: (split, row in it, image, whether it has a label)
PlacedImages = Iterator[tuple[str, int, DecodedImage, bool]]


class Statistics:
    """Mean and standard deviation per channel of pixels in [0, 1], from exact sums."""

    def __init__(self, channels: int):
        self._count = 0
        self._total, self._squares = np.zeros((2, channels), np.uint64)

    def add(self, images: np.ndarray) -> None:
        """Add images, [N, C, H, W] uint8."""
        pixels = images.astype(np.uint32)
        self._count += images.size // images.shape[1]
        self._total += pixels.sum((0, 2, 3), dtype=np.uint64)
        self._squares += (pixels**2).sum((0, 2, 3), dtype=np.uint64)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """[C] each, to 6 decimals."""
        mean = self._total / self._count
        std = np.sqrt(self._squares / self._count - mean**2)
        # A channel without contrast carries nothing; 1/255 keeps its normalisation finite.
        return [round(m / 255, 6) for m in mean], [round(max(s / 255, 1 / 255), 6) for s in std]


def pack(
    source: ImageSource, params: DatasetParams, directory: Path
) -> tuple[DatasetDescription, np.ndarray]:
    """Write each split's images, labels and sample ids.

    Returns:
        The description of the dataset, and each sample's digest, [N, 16] uint8.

    Raises:
        UserError: the source did not yield every image.
    """
    samples = source.samples
    rows, sizes = np.empty(len(samples.ids), np.int64), {}  # rows: a sample's index in its split
    for split, name in enumerate(SPLITS):
        members = samples.members(split)
        rows[members], sizes[name] = np.arange(len(members)), len(members)
        write_array(directory / f"{name}_labels.npy", samples.labels[members])
        write_json(
            directory / f"{name}_ids.json", {"sample_ids": [samples.ids[n] for n in members]}
        )
    digests = np.zeros((len(rows), DIGEST_BYTES), np.uint8)

    def placed() -> PlacedImages:
        for image in bar(source.images, "prepare", total=len(rows)):
            number = image.number
            digests[number] = np.frombuffer(image.digest, np.uint8)
            labelled = samples.labels[number] != UNLABELLED
            yield SPLITS[samples.splits[number]], int(rows[number]), image, bool(labelled)
        missing = np.flatnonzero(~digests.any(1))  # a digest is never all zeros
        if len(missing):
            raise UserError(
                f"`{params.root}` (`dataset.root`) changed while it was read: {len(missing)} "
                f"listed images are gone, the first `{samples.ids[missing[0]]}`. Run it again."
            )

    write = {"pixels": _pack_pixels, "encoded": _pack_encoded}[params.storage]
    statistics = write(placed(), sizes, params, directory)
    return _describe(source, params, sizes, statistics, directory), digests


def _pack_pixels(
    images: PlacedImages, sizes: Mapping[str, int], params: DatasetParams, directory: Path
) -> Statistics:
    """Write each split's images as one array [N, channels, image_size, image_size] uint8."""
    shape = (params.channels, params.image_size, params.image_size)
    arrays = {}
    for split, count in sizes.items():
        path = directory / f"{split}_images.npy"
        arrays[split] = np.lib.format.open_memmap(path, "w+", np.uint8, (count, *shape))
        reserve(path)
    statistics = Statistics(params.channels)
    for split, row, image, labelled in images:
        arrays[split][row] = image.pixels
        if split == "train" and labelled:
            statistics.add(image.pixels[None])
    for array in arrays.values():
        array.flush()
    return statistics


def _pack_encoded(
    images: PlacedImages, sizes: Mapping[str, int], params: DatasetParams, directory: Path
) -> Statistics:
    """Write each split's encoded images into one file, and their offsets and sizes.

    The statistics equal those of `storage: pixels`: they are taken before the image is encoded,
    from the middle square at `image_size`.
    """
    statistics = Statistics(params.channels)
    with ExitStack() as stack:
        files = {
            split: stack.enter_context(EncodedFile(encoded_path(directory, split), count))
            for split, count in sizes.items()
        }
        for split, row, image, labelled in images:
            files[split].write(row, image.encoded)
            if split == "train" and labelled:
                statistics.add(image.pixels[None])
    for split, file in files.items():
        file.sort()
        write_array(directory / f"{split}_offsets.npy", file.offsets)
        write_array(directory / f"{split}_sizes.npy", file.sizes)
    return statistics


def _describe(
    source: ImageSource,
    params: DatasetParams,
    sizes: Mapping[str, int],
    statistics: Statistics,
    directory: Path,
) -> DatasetDescription:
    """Describe the packed files: header, statistics, fingerprint."""
    header = {
        "format_version": FORMAT_VERSION,
        "class_names": source.class_names,
        "channels": params.channels,
        "image_size": params.image_size,
        "splits": sizes,
    }
    if params.storage == "encoded":
        header["storage"] = params.storage
    mean, std = statistics.mean_and_std()
    fingerprint = fingerprint_of(directory, header)
    return DatasetDescription(**header, mean=mean, std=std, fingerprint=fingerprint)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a small array as `np.save` does, but with a clear error on a full disk."""
    content = io.BytesIO()
    np.save(content, array)
    write_bytes(path, content.getbuffer())
