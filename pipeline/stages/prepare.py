"""prepare: pack the dataset into few files that training reads at full speed.

Reads `dataset` of params.yaml and the source that it names; writes data/prepared/: pixels, or, for
`storage: encoded`, the bytes of image files, one after another. Images pass through memory few at
a time.
"""

from pipeline.runtime.command import run_command

import argparse
import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.prepared.dataset import FORMAT_VERSION, SPLITS, encoded_path, fingerprint_of
from pipeline.data.sources import data_quality as findings
from pipeline.data.sources.image_encoding import EncodedFile
from pipeline.data.sources.image_folder import image_folder
from pipeline.data.sources.image_reading import DIGEST_BYTES, DecodedImage, picture_of
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.splits import TRAIN, UNLABELLED, ImageSource, SampleTable, split_off
from pipeline.data.sources.torchvision_datasets import torchvision_set
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import atomic_directory, reserve, write_bytes, write_json
from pipeline.runtime.locks import exclusive
from pipeline.runtime.outputs import PREPARED
from pipeline.runtime.params import load_section
from pipeline.runtime.progress import bar
from pipeline.runtime.stage_inputs import StageInputs

SCRATCH = Path(".scratch/prepare")  # nothing but its lock


def digits(params: DatasetParams) -> ImageSource:
    """scikit-learn's handwritten digits: 1,797 greyscale images of 8 x 8 pixels, 17 levels."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (takes seconds; image folders need none)

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    count = len(pixels)
    samples = SampleTable(
        [f"{index:04d}" for index in range(count)],
        bunch.target.astype(np.int64),
        np.full(count, TRAIN, np.int8),
    )
    pictures = (
        picture_of(n, Image.fromarray(image), None, params) for n, image in enumerate(pixels)
    )
    class_names = [str(digit) for digit in range(10)]
    return ImageSource(class_names, split_off(samples, params), pictures, "the same pixels")


SOURCES = {"digits": digits, "image_folder": image_folder, "torchvision": torchvision_set}


def pack(
    source: ImageSource, params: DatasetParams, directory: Path
) -> tuple[dict[str, int], "Statistics", np.ndarray]:
    """Write each split's images, labels and sample ids.

    Returns:
        The splits' sizes, the statistics of the labelled training pixels, and each sample's digest,
        [N, 16] uint8.

    Raises:
        UserError: a sample has no picture.
    """
    samples = source.samples
    rows, sizes = np.empty(len(samples.ids), np.int64), {}  # rows: a sample's place in its split
    for split, name in enumerate(SPLITS):
        members = samples.members(split)
        rows[members], sizes[name] = np.arange(len(members)), len(members)
        write_array(directory / f"{name}_labels.npy", samples.labels[members])
        write_json(
            directory / f"{name}_ids.json", {"sample_ids": [samples.ids[n] for n in members]}
        )
    digests = np.zeros((len(rows), DIGEST_BYTES), np.uint8)

    def placed() -> Placed:
        for picture in bar(source.pictures, "prepare", total=len(rows)):
            number = picture.number
            digests[number] = np.frombuffer(picture.digest, np.uint8)
            known = samples.labels[number] != UNLABELLED
            yield SPLITS[samples.splits[number]], int(rows[number]), picture, bool(known)
        absent = np.flatnonzero(~digests.any(1))  # of a picture it has bits
        if len(absent):
            raise UserError(
                f"`{params.root}` (`dataset.root`) changed while it was read: {len(absent)} images "
                f"that were there are gone, the first `{samples.ids[absent[0]]}`. Run it again."
            )

    write = {"pixels": pack_pixels, "encoded": pack_encoded}[params.storage]
    return sizes, write(placed(), sizes, params, directory), digests


#: (split, place in it, picture, whether it has a label)
Placed = Iterator[tuple[str, int, DecodedImage, bool]]


def pack_pixels(
    pictures: Placed, sizes: Mapping[str, int], params: DatasetParams, directory: Path
) -> "Statistics":
    """Write each split's images as one array [N, channels, image_size, image_size] uint8."""
    shape = (params.channels, params.image_size, params.image_size)
    arrays = {}
    for split, count in sizes.items():
        path = directory / f"{split}_images.npy"
        arrays[split] = np.lib.format.open_memmap(path, "w+", np.uint8, (count, *shape))
        reserve(path)
    statistics = Statistics(params.channels)
    for split, index, picture, labelled in pictures:
        arrays[split][index] = picture.pixels
        if split == "train" and labelled:
            statistics.add(picture.pixels[None])
    for array in arrays.values():
        array.flush()
    return statistics


def pack_encoded(
    pictures: Placed, sizes: Mapping[str, int], params: DatasetParams, directory: Path
) -> "Statistics":
    """Write each split's encoded images into one file, and where each begins, and its size.

    The statistics are those of `storage: pixels`: of each labelled training image as it came,
    resized by the shorter side to `image_size` and cut to the middle square, before it was encoded.
    """
    statistics = Statistics(params.channels)
    with ExitStack() as stack:
        files = {
            split: stack.enter_context(EncodedFile(encoded_path(directory, split), count))
            for split, count in sizes.items()
        }
        for split, index, picture, labelled in pictures:
            files[split].write(index, picture.encoded)
            if split == "train" and labelled:
                statistics.add(picture.pixels[None])
    for split, file in files.items():
        file.sort()
        write_array(directory / f"{split}_offsets.npy", file.offsets)
        write_array(directory / f"{split}_sizes.npy", file.sizes)
    return statistics


def write_array(path: Path, array: np.ndarray) -> None:
    """A small array, as `np.save` writes it, which tells less of a full disk."""
    content = io.BytesIO()
    np.save(content, array)
    write_bytes(path, content.getbuffer())


class Statistics:
    """Mean and standard deviation per channel of pixels in [0, 1], from exact sums."""

    def __init__(self, channels: int):
        self._count = 0
        self._total, self._squares = np.zeros((2, channels), np.uint64)

    def add(self, images: np.ndarray) -> None:
        """Args: images: [N, C, H, W] uint8."""
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


def write_dataset(params: DatasetParams, directory: Path) -> tuple[dict[str, object], str]:
    """Write everything of a prepared dataset into an empty directory.

    Returns:
        What the fingerprint covers beside the samples (class names, the splits' sizes), and it.
    """
    source = SOURCES[params.source](params)
    sizes, statistics, digests = pack(source, params, directory)
    mean, std = statistics.mean_and_std()
    header = {
        "format_version": FORMAT_VERSION,
        "class_names": source.class_names,
        "channels": params.channels,
        "image_size": params.image_size,
        "splits": sizes,
    }
    if params.storage == "encoded":
        header["storage"] = params.storage
    identity = fingerprint_of(directory, header)
    description = {**header, "mean": mean, "std": std, "fingerprint": identity}
    if found := findings.duplicates(source.samples, digests):
        description["duplicates"] = found
    write_json(directory / "dataset.json", description)
    tell(source, found)
    return header, identity


def tell(source: ImageSource, found: Mapping[str, object]) -> None:
    """Print what is odd about the dataset."""
    unlabelled = np.count_nonzero(source.samples.labels == UNLABELLED)
    if unlabelled:
        print(f"prepare: {unlabelled:,} training images have no label: only students see them")
    if line := findings.imbalance(source.samples, source.class_names):
        print(f"prepare: {line}")
    for line in findings.told(found, source.samples, source.contents):
        print(f"prepare: {line}", flush=True)


def main() -> None:
    argparse.ArgumentParser("python -m pipeline.stages.prepare", description=__doc__).parse_args()
    params = load_section(DatasetParams, "dataset")
    downloads = Path(params.root) if params.source == "torchvision" else None
    inputs = StageInputs("prepare", exclude=downloads)
    with exclusive(SCRATCH), atomic_directory(PREPARED) as directory:
        header, identity = write_dataset(params, directory)
        inputs.check()
    counts = ", ".join(f"{count:,} {split}" for split, count in header["splits"].items())
    print(f"{PREPARED}: {counts} images of {len(header['class_names'])} classes, {identity[:12]}")


if __name__ == "__main__":
    run_command(main)
