"""The soft-target store: what a shard says of itself, and how it is written.

The normative description is docs/soft_targets_format.md. Contract code: an edit here runs the
teacher again; readers live in replay.py.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np

from pipeline.errors import UserError
from pipeline.files import atomic_file, write_json

FORMAT_VERSION = 1
STORE = Path("data/soft_targets")
INDEX = "store.json"
SHARD_SAMPLES = 16_384
CANARIES = 4  # images per shard
LOGITS_DTYPE = np.dtype("<f2")


@dataclass(frozen=True)
class Contents:
    """What the rows of a store are: equal for all its shards, and for any number of views."""

    dataset_fingerprint: str
    teacher_fingerprint: str
    policy: str  # of the training split's views; validation and test are stored as they are
    seed: int
    image_size: int  # pixels, the side of a view
    encoding: str
    precision: str  # of the teacher's forward pass
    num_classes: int


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
    """A shard's attributes, but for the checksums of its rows and canaries, in their order."""
    return {
        "format_version": FORMAT_VERSION,
        **asdict(contents),
        "policy": policy_of(contents, place.split),
        **asdict(place),
    }


def canary_samples(place: ShardPlace) -> np.ndarray:
    """Sample numbers of the shard's canaries, evenly spread, [<= CANARIES] int64."""
    count = min(CANARIES, place.num_samples)
    return place.first_sample + np.arange(count) * (place.num_samples - 1) // max(1, count - 1)


def write_shard(
    path: Path,
    contents: Contents,
    place: ShardPlace,
    logits: np.ndarray,
    canary_pixels: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Write one shard: complete and flushed to disk under its name, or absent.

    Args:
        logits: [num_samples, num_classes] float32, raw.
        canary_pixels: [<= CANARIES, C, H, W] uint8, the views of `canary_samples(place)`.

    Raises:
        UserError: a logit that float16 cannot hold, or that is not a number; or no room on disk.
    """
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(logits, LOGITS_DTYPE)
    finite = np.isfinite(rows).all(1)
    if not finite.all():
        bad = int(np.argmin(finite))
        value = logits[bad][~np.isfinite(rows[bad])][0]
        raise UserError(
            f"the teacher answers {value} for sample {place.first_sample + bad} of {place.split}, "
            f"view {place.view} ({int((~finite).sum())} such samples in this shard); expected "
            f"finite logits within float16's ±65504. Look at the teacher's weights, its `mean` and "
            "`std`, and `soft_targets.precision`."
        )
    image = _file_image(contents, place, rows, canary_pixels, class_names)
    try:
        with atomic_file(path) as partial:
            partial.write_bytes(image)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"`{path}` cannot be written ({error.strerror}). It needs {len(image):,} bytes; "
            f"{free:,} are free. Make room and run the stage again."
        ) from None


def _file_image(
    contents: Contents,
    place: ShardPlace,
    rows: np.ndarray,
    canary_pixels: np.ndarray,
    class_names: Sequence[str],
) -> bytes:
    """The HDF5 file, made in memory: on a full disk h5py's own writing fails without an error."""
    names = [name.encode() for name in class_names]
    with h5py.File("shard", "w", driver="core", backing_store=False) as file:
        for key, value in attributes(contents, place).items():
            text = isinstance(value, str)
            file.attrs[key] = np.bytes_(value.encode()) if text else np.int64(value)
        file.attrs["logits_sha256"] = np.bytes_(sha256(rows))
        file.attrs["canaries_sha256"] = np.bytes_(sha256(canary_pixels))
        file.create_dataset("logits", data=rows, track_times=False)
        file.create_dataset("canary_samples", data=canary_samples(place), track_times=False)
        file.create_dataset("canary_pixels", data=canary_pixels, track_times=False)
        file.create_dataset("class_names", data=np.array(names), track_times=False)
        file.flush()
        return file.id.get_file_image()


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def write_index(
    directory: Path, contents: Contents, split_sizes: Mapping[str, int], num_views: int
) -> None:
    """Write what tells a complete store from one that lacks shards."""
    write_json(
        directory / INDEX,
        {
            "format_version": FORMAT_VERSION,
            **asdict(contents),
            "splits": dict(split_sizes),
            "num_views": num_views,
        },
    )
