"""The students' side of the store: open it, verify it, gather soft targets by view and sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from pipeline.augment import apply_views, permutation
from pipeline.dataset import Dataset
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.params.views import ViewsParams
from pipeline.soft_targets import (
    FORMAT_VERSION,
    INDEX,
    LOGITS_DTYPE,
    SHARD_SAMPLES,
    STORE,
    Contents,
    ShardPlace,
    attributes,
    canary_samples,
    policy_of,
    sha256,
    shard_places,
)

AGAIN = "dvc repro soft_targets"


@dataclass(frozen=True)
class Store:
    """A verified store. Rows are mapped into memory, so that forked workers share them."""

    contents: Contents
    num_views: int
    rows: Mapping[tuple[str, int], Sequence[np.ndarray]]  # (split, view) -> shards [n, C] float16

    def gather(self, view: int, samples: np.ndarray) -> np.ndarray:
        """Soft targets of training samples in one view: [B] -> [B, num_classes] float16."""
        shards = self.rows["train", view]
        number, row = np.divmod(samples, SHARD_SAMPLES)
        gathered = np.empty((len(samples), self.contents.num_classes), LOGITS_DTYPE)
        for shard in np.unique(number):
            wanted = number == shard
            gathered[wanted] = shards[shard][row[wanted]]
        return gathered


def view_of_epoch(epoch: int, num_views: int, seed: int) -> int:
    """Which cached view an epoch uses: a seeded permutation of all, drawn anew for each cycle."""
    cycle, position = divmod(epoch, num_views)
    return int(permutation(num_views, seed, cycle)[position])


def open_store(
    dataset: Dataset, views: ViewsParams, teacher_fingerprint: str, directory: Path = STORE
) -> Store:
    """Open the store and verify all of it, once per run: what it is for, that every shard is
    there and undamaged, and that its canaries' pixels are those that this code augments now.

    Args:
        dataset: at the size of the views.

    Raises:
        UserError: anything is not as expected; says which, and what to do.
    """
    index = read_json(directory / INDEX, made_by=AGAIN)
    _check_version(directory / INDEX, index.get("format_version"))
    try:
        contents = Contents(**{key: index[key] for key in Contents.__dataclass_fields__})
        num_views, split_sizes = index["num_views"], index["splits"]
    except KeyError as error:
        raise UserError(f"`{directory / INDEX}` lacks {error}. Run `{AGAIN}`.") from None
    _check_purpose(directory, contents, num_views, dataset, views, teacher_fingerprint)
    rows: dict[tuple[str, int], list[np.ndarray]] = {}
    for place in shard_places(split_sizes, num_views):
        images = dataset.splits[place.split].images
        shard = _open_shard(directory / place.file_name, contents, place, images)
        rows.setdefault((place.split, place.view), []).append(shard)
    return Store(contents, num_views, rows)


def _check_version(path: Path, version: Any) -> None:
    if version != FORMAT_VERSION:
        newer = isinstance(version, int | np.integer) and version > FORMAT_VERSION
        remedy = "Update Teach Once" if newer else f"Run `{AGAIN}`"
        raise UserError(
            f"`{path}` has format version {version}; expected {FORMAT_VERSION}. {remedy}."
        )


def _check_purpose(
    directory: Path,
    contents: Contents,
    num_views: int,
    dataset: Dataset,
    views: ViewsParams,
    teacher_fingerprint: str,
) -> None:
    mismatches = [
        f"`{directory}` was written for {what} {_short(found)}, but {where} {_short(expected)}."
        for what, found, where, expected in (
            ("dataset", contents.dataset_fingerprint, "data/prepared is", dataset.fingerprint),
            ("teacher", contents.teacher_fingerprint, "models/teacher is", teacher_fingerprint),
            ("views.policy", contents.policy, "params.yaml says", views.policy),
            ("views.seed", contents.seed, "params.yaml says", views.seed),
            ("views.image_size", contents.image_size, "params.yaml says", views.image_size),
            ("views.count", num_views, "params.yaml says", views.num_views),
        )
        if found != expected
    ]
    if mismatches:
        raise UserError("\n".join([*mismatches, f"Run `{AGAIN}`."]))


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def _open_shard(
    path: Path, contents: Contents, place: ShardPlace, images: np.ndarray
) -> np.ndarray:
    """[num_samples, num_classes] float16, mapped read-only, verified."""
    if not path.is_file():
        raise UserError(f"`{path}` is absent: the store is incomplete. Run `{AGAIN}`.")
    try:
        with h5py.File(path, "r") as file:
            found = {key: _plain(value) for key, value in file.attrs.items()}
            dataset = file["logits"]
            offset, shape, dtype = dataset.id.get_offset(), dataset.shape, dataset.dtype
            samples, pixels = file["canary_samples"][:], file["canary_pixels"][:]
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"`{path}` is damaged and cannot be read ({error}). Remove it and run `{AGAIN}`."
        ) from None
    _check_version(path, found.get("format_version"))
    for key, expected in attributes(contents, place).items():
        if found.get(key) != expected:
            raise UserError(
                f"`{path}` says {key} {_short(found.get(key))}, but `{INDEX}` beside it says "
                f"{_short(expected)}: the shard is of another store. Run `{AGAIN}`."
            )
    expected_shape = (place.num_samples, contents.num_classes)
    if offset is None or shape != expected_shape or dtype != LOGITS_DTYPE:
        raise UserError(
            f"`{path}` is damaged: logits are {dtype} {list(shape)} at offset {offset}; expected "
            f"{LOGITS_DTYPE} {list(expected_shape)}. Remove it and run `{AGAIN}`."
        )
    rows = np.memmap(path, LOGITS_DTYPE, "r", offset, shape)
    for name, array in (("logits", rows), ("canaries", pixels)):
        if sha256(array) != found.get(f"{name}_sha256"):
            raise UserError(
                f"`{path}` is damaged: its {name} do not match their checksum. Remove it and run "
                f"`{AGAIN}`."
            )
    _check_canaries(path, contents, place, images, samples, pixels)
    return rows


def _plain(value: Any) -> int | str:
    return value.decode() if isinstance(value, bytes) else int(value)


def _check_canaries(
    path: Path,
    contents: Contents,
    place: ShardPlace,
    images: np.ndarray,
    samples: np.ndarray,
    pixels: np.ndarray,
) -> None:
    expected = canary_samples(place)
    policy = policy_of(contents, place.split)
    now = apply_views(
        torch.from_numpy(images[expected]), policy, contents.seed, place.view, expected
    ).numpy()
    if not np.array_equal(samples, expected) or not np.array_equal(pixels, now):
        raise UserError(
            f"the images that the teacher saw are not those that a student would see now: the "
            f"canaries of `{path}` differ. The images or the augmentation have changed since the "
            f"store was written. Run `{AGAIN}`."
        )
