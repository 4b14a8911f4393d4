"""prepare: pack the dataset into few files that training reads at full speed.

Reads `dataset` of params.yaml and the source that it names; writes data/prepared/: pixels, or, for
`storage: encoded`, the bytes of image files, one after another. Images pass through memory few at
a time.
"""

import argparse
import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from pipeline.augment import hash64
from pipeline.dataset import FORMAT_VERSION, PREPARED, SPLITS, encoded_path
from pipeline.decoding import UNREADABLE, available_cores, eight_bits
from pipeline.encoded_images import Encoded, EncodedFile, encode
from pipeline.errors import UserError, reported
from pipeline.files import atomic_directory, canonical_json, sha256_of_file, write_json
from pipeline.image_files import list_names, read_files
from pipeline.params.dataset import DatasetParams
from pipeline.params.loading import load_section
from pipeline.progress import bar

_SPLIT_FOLDERS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_LISTED = 20  # files in a message
_CHUNK = 4096  # images at a time, for sums and hashes

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class Sample:
    """Where one image goes."""

    split: str
    label: int
    sample_id: str


@dataclass(frozen=True)
class Picture:
    """One image, read."""

    sample_id: str
    pixels: np.ndarray  # [channels, image_size, image_size] uint8: kept, or for statistics
    encoded: Encoded | None  # storage: encoded: what is kept of it


@dataclass(frozen=True)
class Source:
    """A dataset as it comes: what there is, and a way to go through the images once."""

    class_names: list[str]
    samples: list[Sample]
    pictures: Iterator[Picture]  # in any order


def digits(params: DatasetParams) -> Source:
    """scikit-learn's handwritten digits: 1,797 greyscale images of 8 x 8 pixels, 17 levels."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (takes seconds; image folders need none)

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    ids = [f"{index:04d}" for index in range(len(pixels))]
    samples = [Sample("train", int(k), i) for i, k in zip(ids, bunch.target, strict=True)]
    images = zip(ids, map(Image.fromarray, pixels), strict=True)
    pictures = (picture_of(i, image, b"", params) for i, image in images)
    return Source([str(digit) for digit in range(10)], split_off(samples, params), pictures)


def image_folder(params: DatasetParams) -> Source:
    """`train/<class>/*`, and `val/` and `test/` if present, in a folder or an archive."""
    root = Path(params.root)
    names = list_names(root)
    top = {PurePosixPath(name).parts[0] for name in names}
    prefix = f"{next(iter(top))}/" if len(top) == 1 and not top & _SPLIT_FOLDERS.keys() else ""
    found: dict[str, tuple[str, str]] = {}  # sample id -> (split, class)
    for name in names:
        parts = PurePosixPath(name.removeprefix(prefix)).parts
        if len(parts) >= 3 and parts[0] in _SPLIT_FOLDERS and not name.endswith("/"):
            found["/".join(parts)] = (_SPLIT_FOLDERS[parts[0]], parts[1])
    check_no_class_is_empty(root, prefix, names, set(found))
    class_names = sorted({class_name for split, class_name in found.values() if split == "train"})
    if not class_names:
        raise UserError(
            f"`{root}` (`dataset.root`) has no `train/<class>/<image>`; found "
            f"{', '.join(f'`{t}`' for t in sorted(top)[:_LISTED]) or 'nothing'}."
        )
    if len(class_names) < 2:
        raise UserError(
            f"`{root}` (`dataset.root`) has one class, `{class_names[0]}`; expected at least 2."
        )
    foreign = sorted({c for _, c in found.values()} - set(class_names))
    if foreign:
        raise UserError(
            f"`{root}` (`dataset.root`) has classes in `val/` or `test/` that `train/` lacks: "
            f"{', '.join(f'`{c}`' for c in foreign[:_LISTED])}."
        )
    number = {class_name: label for label, class_name in enumerate(class_names)}
    samples = [Sample(split, number[c], sample_id) for sample_id, (split, c) in found.items()]
    samples.sort(key=lambda sample: sample.sample_id)

    def files() -> Iterator[tuple[str, bytes]]:
        for name, content in read_files(root):
            sample_id = "/".join(PurePosixPath(name.removeprefix(prefix)).parts)
            if sample_id in found:
                yield sample_id, content

    def read(file: tuple[str, bytes]) -> Picture | str:
        sample_id, content = file
        try:
            image = eight_bits(Image.open(io.BytesIO(content)))
            return picture_of(sample_id, image, content, params)
        except UNREADABLE as error:
            return f"{sample_id}: {error}"

    def pictures() -> Iterator[Picture]:
        broken = []
        for picture in ahead(read, files()):
            if isinstance(picture, str):
                broken.append(picture)
            else:
                yield picture
        if broken:
            more = f"\n  ... and {len(broken) - _LISTED} more" if len(broken) > _LISTED else ""
            raise UserError(
                f"{len(broken)} files of `{root}` (`dataset.root`) are not images that can be "
                "read; mend or remove them:\n  " + "\n  ".join(broken[:_LISTED]) + more
            )

    return Source(class_names, split_off(samples, params), pictures())


def picture_of(sample_id: str, image: Image.Image, source: bytes, params: DatasetParams) -> Picture:
    """Args: image: upright and with 8 bits a channel; source: the bytes of its file."""
    pixels = to_pixels(image, params.image_size, params.channels)
    return Picture(sample_id, pixels, encode(image, source, params))


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The function of each item, in their order, by as many threads as there are cores: Pillow
    lets go of Python's lock. Few are made before they are asked for, so that memory stays flat."""
    Image.init()  # threads that do so at the same time take a format for unknown
    threads, waiting = available_cores(), deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def check_no_class_is_empty(root: Path, prefix: str, names: list[str], found: set[str]) -> None:
    """Raises: UserError: lists the class folders that hold no file."""
    folders = {
        "/".join(parts[:2])
        for name in names
        if name.endswith("/")
        and len(parts := PurePosixPath(name.removeprefix(prefix)).parts) >= 2
        and parts[0] in _SPLIT_FOLDERS
    }
    empty = sorted(folders - {"/".join(sample_id.split("/")[:2]) for sample_id in found})
    if empty:
        raise UserError(
            f"`{root}` (`dataset.root`) has class folders without images: "
            f"{', '.join(f'`{folder}`' for folder in empty[:_LISTED])}. Fill or remove them."
        )


def split_off(samples: list[Sample], params: DatasetParams) -> list[Sample]:
    """Take the splits that the source lacks from its training samples.

    Class by class: the samples with the smallest hashes of (seed, split, sample id), so that the
    choice depends on nothing but the class's own members, at least one of each class.

    Raises:
        UserError: a class has too few samples.
    """
    fractions = {"test": params.test_fraction, "validation": params.validation_fraction}
    lacking = {split for split in fractions if all(s.split != split for s in samples)}
    if not lacking:
        return samples
    by_class: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.split == "train":
            by_class.setdefault(sample.label, []).append(sample)
    moved: dict[str, str] = {}
    for members in by_class.values():
        if len(members) <= len(lacking):
            raise UserError(
                f"the class of `{members[0].sample_id}` has {len(members)} training samples; "
                f"expected at least {len(lacking) + 1}, for training and to split off "
                f"{' and '.join(sorted(lacking))}."
            )
        ranked = sorted(members, key=lambda s: _rank(params.split_seed, s.sample_id))
        start = 0
        for split in sorted(lacking):
            count = max(1, round(fractions[split] * len(members)))
            moved |= {s.sample_id: split for s in ranked[start : start + count]}
            start += count
    return [Sample(moved.get(s.sample_id, s.split), s.label, s.sample_id) for s in samples]


def _rank(seed: int, sample_id: str) -> tuple[int, str]:
    digest = hashlib.sha256(sample_id.encode()).digest()
    return int(hash64(seed, int.from_bytes(digest[:8], "little"))), sample_id


def to_pixels(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """[channels, size, size] uint8: the shorter side resized to `size`, the middle cut out."""
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def pack(source: Source, params: DatasetParams, directory: Path) -> tuple[dict, "Statistics"]:
    """Write each split's images, labels and sample ids.

    Returns:
        The splits' sizes, and the statistics of the training pixels.
    """
    members = {split: [s for s in source.samples if s.split == split] for split in SPLITS}
    sizes = {split: len(samples) for split, samples in members.items()}
    row = {
        sample.sample_id: (split, index)
        for split, samples in members.items()
        for index, sample in enumerate(samples)
    }
    write = {"pixels": pack_pixels, "encoded": pack_encoded}[params.storage]
    pictures = bar(source.pictures, "prepare", total=len(row))
    statistics = write(((row[p.sample_id], p) for p in pictures), sizes, params, directory)
    for split, samples in members.items():
        np.save(directory / f"{split}_labels.npy", np.array([s.label for s in samples], np.int64))
        write_json(directory / f"{split}_ids.json", {"sample_ids": [s.sample_id for s in samples]})
    return sizes, statistics


Placed = Iterator[tuple[tuple[str, int], Picture]]  # ((split, index in it), picture)


def pack_pixels(
    pictures: Placed, sizes: Mapping[str, int], params: DatasetParams, directory: Path
) -> "Statistics":
    """Write each split's images as one array [N, channels, image_size, image_size] uint8."""
    shape = (params.channels, params.image_size, params.image_size)
    arrays = {
        split: np.lib.format.open_memmap(
            directory / f"{split}_images.npy", "w+", np.uint8, (count, *shape)
        )
        for split, count in sizes.items()
    }
    for (split, index), picture in pictures:
        arrays[split][index] = picture.pixels
    for array in arrays.values():
        array.flush()
    statistics = Statistics(params.channels)
    for start in range(0, sizes["train"], _CHUNK):
        statistics.add(arrays["train"][start : start + _CHUNK])
    return statistics


def pack_encoded(
    pictures: Placed, sizes: Mapping[str, int], params: DatasetParams, directory: Path
) -> "Statistics":
    """Write each split's encoded images into one file, and where each begins, and its size.

    The statistics are those of `storage: pixels`: of each training image as it came, resized by
    the shorter side to `image_size` and cut to the middle square, before it was encoded.
    """
    statistics = Statistics(params.channels)
    with ExitStack() as stack:
        files = {
            split: stack.enter_context(EncodedFile(encoded_path(directory, split), count))
            for split, count in sizes.items()
        }
        for (split, index), picture in pictures:
            files[split].write(index, picture.encoded)
            if split == "train":
                statistics.add(picture.pixels[None])
    for split, file in files.items():
        file.sort()
        np.save(directory / f"{split}_offsets.npy", file.offsets)
        np.save(directory / f"{split}_sizes.npy", file.sizes)
    return statistics


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


def fingerprint(directory: Path, header: Mapping[str, object]) -> str:
    """SHA-256 over the header and every split's sample ids, labels and pixels, or encoded bytes and
    what is said of them."""
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


def write_dataset(params: DatasetParams, directory: Path) -> tuple[dict[str, object], str]:
    """Write everything of a prepared dataset into an empty directory.

    Returns:
        What the fingerprint covers beside the samples (class names, the splits' sizes), and it.
    """
    source = {"digits": digits, "image_folder": image_folder}[params.source](params)
    sizes, statistics = pack(source, params, directory)
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
    identity = fingerprint(directory, header)
    write_json(
        directory / "dataset.json", {**header, "mean": mean, "std": std, "fingerprint": identity}
    )
    return header, identity


def main() -> None:
    argparse.ArgumentParser("python -m pipeline.stages.prepare", description=__doc__).parse_args()
    params = load_section(DatasetParams, "dataset")
    with atomic_directory(PREPARED) as directory:
        header, identity = write_dataset(params, directory)
    counts = ", ".join(f"{count:,} {split}" for split, count in header["splits"].items())
    print(f"{PREPARED}: {counts} images of {len(header['class_names'])} classes, {identity[:12]}")


if __name__ == "__main__":
    with reported():
        main()
