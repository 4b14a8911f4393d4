"""The soft-target store: what a shard says of itself, and how it is written.

The normative description is docs/soft_targets_format.md. Contract code: an edit here runs the
teacher again. One shard's file is read by shards.py; readers of the store live in replay.py.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np

from pipeline.encodings import FLOAT16, columns, encode
from pipeline.errors import UserError
from pipeline.files import write_bytes, write_json

FORMAT_VERSION = 2
STORE = Path("data/soft_targets")
INDEX = "store.json"
SHARD_SAMPLES = 16_384
CANARIES = 4  # images per shard


@dataclass(frozen=True)
class Contents:
    """What the rows of a store are: equal for all its shards, and for any number of views."""

    dataset_fingerprint: str
    teacher_fingerprint: str
    policy: str  # of the training split's views, a Policy's text; the other splits are as they are
    seed: int
    image_size: int  # pixels, the side of a view
    encoding: str  # dense | top_k
    k: int | None  # of top_k
    precision: str  # of the teacher's forward pass
    num_classes: int

    def identity(self) -> dict[str, int | str]:
        """As it is written: `k` stands with top_k alone."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ShardPlace:
    """Which rows a shard holds."""

    split: str
    view: int
    first_sample: int
    num_samples: int

    @property
    def file_name(self) -> str:
        return f"{self.split}_view{self.view:05d}_sample{self.first_sample:09d}.h5"


def shard_places(split_sizes: Mapping[str, int], num_views: int) -> Iterator[ShardPlace]:
    """Every shard of a store: each view of `train`, and the other splits once."""
    for split, size in split_sizes.items():
        for view in range(num_views if split == "train" else 1):
            for first in range(0, size, SHARD_SAMPLES):
                yield ShardPlace(split, view, first, min(SHARD_SAMPLES, size - first))


def policy_of(contents: Contents, split: str) -> str:
    return contents.policy if split == "train" else "none"


def attributes(contents: Contents, place: ShardPlace) -> dict[str, int | str]:
    """A shard's attributes, but for the checksums of its datasets, in their order."""
    return {
        "format_version": FORMAT_VERSION,
        **contents.identity(),
        "policy": policy_of(contents, place.split),
        **asdict(place),
    }


def canary_samples(place: ShardPlace) -> np.ndarray:
    """Sample numbers of the shard's canaries, evenly spread, [<= CANARIES] int64."""
    count = min(CANARIES, place.num_samples)
    return place.first_sample + np.arange(count) * (place.num_samples - 1) // max(1, count - 1)


def canary_digests(pixels: np.ndarray) -> np.ndarray:
    """[K, C, H, W] uint8 -> [K, 32] uint8, the SHA-256 of each image's pixels."""
    digests = b"".join(hashlib.sha256(image).digest() for image in np.ascontiguousarray(pixels))
    return np.frombuffer(digests, np.uint8).reshape(len(pixels), 32)


def write_shard(
    path: Path,
    contents: Contents,
    place: ShardPlace,
    logits: np.ndarray,
    labels: np.ndarray,
    canaries: np.ndarray,
) -> None:
    """Write one shard: complete and flushed to disk under its name, or absent.

    Args:
        logits: [num_samples, num_classes] float32, raw.
        labels: [num_samples] int64, -1 for none: top_k keeps the label's logit.
        canaries: [<= CANARIES, 32] uint8, the digests of `canary_samples(place)`.

    Raises:
        UserError: a logit that float16 cannot hold, or that is not a number; or the disk cannot
            be written.
    """
    _check_finite(place, logits)
    arrays = encode(logits, labels, contents.encoding, contents.k)
    write_bytes(path, _file_image(contents, place, arrays, canaries))


def _check_finite(place: ShardPlace, logits: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        finite = np.isfinite(logits.astype(FLOAT16))
    if not finite.all():
        bad_rows = ~finite.all(1)
        bad = int(np.argmax(bad_rows))
        value = logits[bad][~finite[bad]][0]
        raise UserError(
            f"the teacher answers {value} for sample {place.first_sample + bad} of {place.split}, "
            f"view {place.view} ({int(bad_rows.sum())} such samples in this shard); expected "
            f"finite logits within float16's ±65504. Look at the teacher's weights, its `mean` and "
            "`std`, and `soft_targets.precision`."
        )


def shard_bytes(contents: Contents, place: ShardPlace) -> int:
    """The exact size of a shard's file, before there are rows for it."""
    return _size_of(contents, replace(place, view=0, first_sample=0))


@lru_cache  # a store has few kinds of shards, and HDF5's overhead follows no simple rule
def _size_of(contents: Contents, place: ShardPlace) -> int:
    widths = columns(contents.encoding, contents.num_classes, contents.k)
    arrays = {
        name: np.zeros((place.num_samples, width), dtype) for name, (width, dtype) in widths.items()
    }
    canaries = np.zeros((len(canary_samples(place)), 32), np.uint8)
    return len(_file_image(contents, place, arrays, canaries))


def _file_image(
    contents: Contents, place: ShardPlace, arrays: Mapping[str, np.ndarray], canaries: np.ndarray
) -> bytes:
    """The HDF5 file, made in memory: on a full disk h5py's own writing fails without an error."""
    with h5py.File("shard", "w", driver="core", backing_store=False) as file:
        for key, value in attributes(contents, place).items():
            text = isinstance(value, str)
            file.attrs[key] = np.bytes_(value.encode()) if text else np.int64(value)
        checked = {**arrays, "canaries": canaries}
        for name, array in checked.items():
            file.attrs[f"{name}_sha256"] = np.bytes_(sha256(array))
        for name, array in {**checked, "canary_samples": canary_samples(place)}.items():
            file.create_dataset(name, data=array, track_times=False)
        file.flush()
        return file.id.get_file_image()


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def write_index(
    directory: Path,
    contents: Contents,
    class_names: Sequence[str],
    split_sizes: Mapping[str, int],
    num_views: int,
    fidelity: Mapping[str, float],
) -> None:
    """Write what tells a complete store from one that lacks shards, and how faithful its rows are
    to the teacher's answers."""
    write_json(
        directory / INDEX,
        {
            "format_version": FORMAT_VERSION,
            **contents.identity(),
            "splits": dict(split_sizes),
            "num_views": num_views,
            "fidelity": dict(fidelity),
            "class_names": list(class_names),
        },
    )
