"""Pack the images of a source into the few files of data/prepared."""

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from pipeline.data.prepared.dataset import (
    FORMAT_VERSION,
    SPLITS,
    DatasetDescription,
    encoded_path,
    fingerprint_of,
)
from pipeline.data.sources.image_reading import DIGEST_BYTES, DecodedImage
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.splits import TRAIN, UNLABELLED, ImageSource
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.files import reserve, write_bytes, write_json
from pipeline.runtime.progress import bar

Write = Callable[[int, DecodedImage], None]  # with the image's row in its split


class Statistics:
    """Mean and standard deviation per channel of pixels in [0, 1], from exact sums."""

    def __init__(self, channels: int):
        self._count = 0
        self._total, self._squares = np.zeros((2, channels), np.uint64)

    def add(self, image: np.ndarray) -> None:
        """Add an image, [C, H, W] uint8."""
        pixels = image.astype(np.uint32)
        self._count += pixels[0].size
        self._total += pixels.sum((1, 2), dtype=np.uint64)
        self._squares += (pixels**2).sum((1, 2), dtype=np.uint64)

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
    samples, statistics, sizes = source.samples, Statistics(params.channels), {}
    rows = np.empty(len(samples.ids), np.int64)  # a sample's index in its split
    digests = np.zeros((len(rows), DIGEST_BYTES), np.uint8)
    packed_file = {"pixels": _pixel_file, "encoded": _encoded_file}[params.storage]
    with ExitStack() as files:
        writers = []
        for split, name in enumerate(SPLITS):
            members = np.flatnonzero(samples.splits == split)
            rows[members], sizes[name] = np.arange(len(members)), len(members)
            write_array(directory / f"{name}_labels.npy", samples.labels[members])
            ids = [samples.ids[member] for member in members]
            write_json(directory / f"{name}_ids.json", {"sample_ids": ids})
            writers.append(files.enter_context(packed_file(directory, name, len(ids), params)))
        for image in bar(source.images, "prepare", total=len(rows)):
            number = image.number
            digests[number] = np.frombuffer(image.digest, np.uint8)
            writers[samples.splits[number]](rows[number], image)
            if samples.splits[number] == TRAIN and samples.labels[number] != UNLABELLED:
                statistics.add(image.pixels)
        missing = np.flatnonzero(~digests.any(1))  # a digest is never all zeros
        if len(missing):
            raise UserError(
                f"`{params.root}` (`dataset.root`) changed while it was read: "
                f"{counted(len(missing), 'listed image is', 'listed images are')} gone, the first "
                f"`{samples.ids[missing[0]]}`. Run it again."
            )
    mean, std = statistics.mean_and_std()
    description = DatasetDescription(
        format_version=FORMAT_VERSION,
        class_names=source.class_names,
        channels=params.channels,
        image_size=params.image_size,
        splits=sizes,
        storage="encoded" if params.storage == "encoded" else None,
        mean=mean,
        std=std,
        fingerprint="",
    )
    fingerprint = fingerprint_of(directory, description)
    return description.model_copy(update={"fingerprint": fingerprint}), digests


@contextmanager
def _pixel_file(directory: Path, split: str, count: int, params: DatasetParams) -> Iterator[Write]:
    """Yield what writes an image into a split's array, [N, channels, image_size, image_size]."""
    path = directory / f"{split}_images.npy"
    shape = (count, params.channels, params.image_size, params.image_size)
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    reserve(path)

    def write(row: int, image: DecodedImage) -> None:
        array[row] = image.pixels

    yield write
    array.flush()


@contextmanager
def _encoded_file(directory: Path, split: str, count: int, _: DatasetParams) -> Iterator[Write]:
    """Yield what appends an image to a split's file; then sort the file by rows, and write the
    images' offsets and sizes."""
    path = encoded_path(directory, split)
    starts, lengths = np.zeros((2, count), np.int64)  # of each row, in the order of arrival
    sizes = np.zeros((count, 2), np.int32)  # height, width
    with open(path, "wb") as file:

        def write(row: int, image: DecodedImage) -> None:
            encoded = image.encoded
            starts[row], lengths[row] = file.tell(), len(encoded.content)
            sizes[row] = encoded.height, encoded.width
            file.write(encoded.content)

        yield write
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if not np.array_equal(starts, offsets[:-1]):
        unsorted = path.rename(path.with_suffix(".unsorted"))
        with open(unsorted, "rb") as source, open(path, "wb") as target:
            for start, length in zip(starts, lengths, strict=True):
                source.seek(start)
                target.write(source.read(length))
        unsorted.unlink()
    write_array(directory / f"{split}_offsets.npy", offsets)
    write_array(directory / f"{split}_sizes.npy", sizes)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a small array as `np.save` does, but with a clear error on a full disk."""
    content = io.BytesIO()
    np.save(content, array)
    write_bytes(path, content.getbuffer())
