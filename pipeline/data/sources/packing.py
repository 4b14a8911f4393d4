"""Pack the images of a source into the few files of data/prepared."""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.prepared.dataset import (
    FORMAT_VERSION,
    SPLITS,
    DatasetDescription,
    encoded_path,
    fingerprint_of,
)
from pipeline.data.sources.image_reading import DIGEST_BYTES, LISTED, DecodedImage, UnreadableImage
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.splits import TRAIN, UNLABELLED, ImageSource, SampleTable
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.files import reserve, write_bytes, write_json
from pipeline.runtime.progress import bar

Write = Callable[[int, DecodedImage], None]  # with the image's row in its split
_ROWS_AT_A_TIME = 256
UNREADABLE_LIST = "unreadable.json"  # the files that were left out, and why


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


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote."""

    description: DatasetDescription
    samples: SampleTable  # of N samples
    digests: np.ndarray  # [N, 16] uint8, of each sample's content
    unreadable: dict[str, str]  # the files that were left out, and why


def pack(source: ImageSource, params: DatasetParams, directory: Path) -> Packed:
    """Write each split's images, labels and sample ids; leave out the unreadable ones.

    Raises:
        UserError: the source did not yield every image, or a class or split has no readable one.
    """
    samples, statistics = source.samples, Statistics(params.channels)
    unreadable: dict[int, str] = {}
    rows = np.empty(len(samples.ids), np.int64)  # a sample's index in its split
    digests = np.zeros((len(rows), DIGEST_BYTES), np.uint8)
    packed_file = {"pixels": _pixel_file, "encoded": _encoded_file}[params.storage]
    with ExitStack() as files:
        writers = []
        for split, name in enumerate(SPLITS):
            members = np.flatnonzero(samples.splits == split)
            rows[members] = np.arange(len(members))
            writers.append(files.enter_context(packed_file(directory, name, len(members), params)))
        for image in bar(source.images, "prepare", total=len(rows)):
            number = image.number
            if isinstance(image, UnreadableImage):
                unreadable[number] = image.problem
                continue
            digests[number] = np.frombuffer(image.digest, np.uint8)
            writers[samples.splits[number]](rows[number], image)
            if samples.splits[number] == TRAIN and samples.labels[number] != UNLABELLED:
                statistics.add(image.pixels)
        is_read = digests.any(1)  # a digest is never all zeros
        missing = [number for number in np.flatnonzero(~is_read) if number not in unreadable]
        if missing:
            raise UserError(
                f"`{params.root}` (`dataset.root`) changed while it was read: "
                f"{counted(len(missing), 'listed image is', 'listed images are')} gone, the first "
                f"`{samples.ids[missing[0]]}`. Run it again."
            )
        if unreadable:
            _check_rest(source, is_read, unreadable)
    problems = {samples.ids[number]: unreadable[number] for number in sorted(unreadable)}
    read, sizes = samples, {}
    if problems:
        write_json(directory / UNREADABLE_LIST, {"files": problems})
        read = samples.take(np.flatnonzero(is_read))
    for split, name in enumerate(SPLITS):
        members = np.flatnonzero(read.splits == split)
        sizes[name] = len(members)
        write_array(directory / f"{name}_labels.npy", read.labels[members])
        ids = [read.ids[member] for member in members]
        write_json(directory / f"{name}_ids.json", {"sample_ids": ids})
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
        unreadable=len(unreadable) or None,
    )
    fingerprint = fingerprint_of(directory, description)
    description = description.model_copy(update={"fingerprint": fingerprint})
    return Packed(description, read, digests[is_read], problems)


def _check_rest(source: ImageSource, is_read: np.ndarray, unreadable: Mapping[int, str]) -> None:
    """Refuse a class without a training image that can be read, or a split without any."""
    samples = source.samples
    is_training = (samples.splits == TRAIN) & (samples.labels != UNLABELLED)
    lost = np.setdiff1d(samples.labels[is_training], samples.labels[is_training & is_read])
    parts = [
        (
            f"training images of class `{source.class_names[label]}`",
            is_training & (samples.labels == label),
        )
        for label in lost[:LISTED]
    ]
    parts += [
        (f"images of {name}", samples.splits == split)
        for split, name in enumerate(SPLITS)
        if not (is_read & (samples.splits == split)).any()
    ]
    if parts:
        first = next(number for number in sorted(unreadable) if parts[0][1][number])
        raise UserError(
            f"none of the {' and none of the '.join(part for part, _ in parts)} can be read, the "
            f"first, `{samples.ids[first]}`, because: {unreadable[first]}. `dataset.unreadable` is "
            "`skip`, which leaves such files out, but a class or split needs images. Fix them."
        )


@contextmanager
def _pixel_file(directory: Path, split: str, count: int, params: DatasetParams) -> Iterator[Write]:
    """Yield what writes an image into a split's array, [N, channels, image_size, image_size]."""
    path = directory / f"{split}_images.npy"
    shape = (count, params.channels, params.image_size, params.image_size)
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    reserve(path)
    is_written = np.zeros(count, bool)

    def write(row: int, image: DecodedImage) -> None:
        array[row] = image.pixels
        is_written[row] = True

    yield write
    if not is_written.all():
        array = _keep_rows(path, array, np.flatnonzero(is_written))
    array.flush()


def _keep_rows(path: Path, array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Replace the file of a memory-mapped array by one of these rows alone."""
    part = path.with_suffix(".part")
    kept = np.lib.format.open_memmap(part, "w+", array.dtype, (len(rows), *array.shape[1:]))
    reserve(part)
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        kept[start : start + _ROWS_AT_A_TIME] = array[rows[start : start + _ROWS_AT_A_TIME]]
    part.rename(path)
    return kept


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
    is_written = lengths > 0
    starts, lengths, sizes = starts[is_written], lengths[is_written], sizes[is_written]
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
