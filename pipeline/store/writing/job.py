"""Everything that it takes to make the shards of the store, and making them."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.compute.device import default_device
from pipeline.data.prepared.dataset import Dataset, open_dataset
from pipeline.models import checkpoint
from pipeline.models.raw_logits import beyond_float16
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.params import load_section
from pipeline.store.format.encodings import encode, less_offset
from pipeline.store.format.schema import ShardKey, StoreIdentity, shard_keys
from pipeline.store.format.views_by_split import ViewsBySplit, canaries_of, open_views_by_split
from pipeline.store.writing.fidelity import check_fidelity, compare_rows
from pipeline.store.writing.imported_logits import ImportedLogits
from pipeline.store.writing.measurements import measured_rows, write_measurement
from pipeline.store.writing.params import SoftTargetsParams
from pipeline.store.writing.shard_writer import write_shard
from pipeline.store.writing.teacher_logits import AGAIN, TeacherForward, open_teacher_logits
from pipeline.views.params import ViewsParams


@dataclass(frozen=True)
class StoreJob:
    """The store to write, and what its rows come from."""

    teacher: TeacherForward | ImportedLogits
    dataset: Dataset  # at the size of the views
    identity: StoreIdentity
    views: ViewsBySplit  # on the device
    num_views: int
    batch_size: int
    device: torch.device

    @property
    def split_sizes(self) -> dict[str, int]:
        return {name: len(split) for name, split in self.dataset.splits.items()}

    @property
    def shards(self) -> list[ShardKey]:
        return list(shard_keys(self.split_sizes, self.num_views))


def open_job() -> StoreJob:
    """Read the parameters, the prepared data and the teacher.

    Raises:
        UserError: one of them is absent or does not fit the others.
    """
    views = load_section(ViewsParams, "views")
    params = load_section(SoftTargetsParams, "soft_targets")
    dataset = open_dataset().resized(views.image_size)
    params.check_classes(dataset.num_classes)
    device = default_device()
    identity = StoreIdentity(
        dataset_fingerprint=dataset.fingerprint,
        teacher_fingerprint=checkpoint.fingerprint(TEACHER.model, produced_by=AGAIN),
        policy=str(views.view_policy),
        seed=views.seed,
        image_size=views.image_size,
        encoding=params.encoding,
        k=params.k,
        precision=params.precision,
        num_classes=dataset.num_classes,
    )
    open_views = open_views_by_split(dataset, identity, device)
    teacher = open_teacher_logits(
        dataset,
        identity,
        views.num_views,
        open_views,
        batch_size=params.batch_size,
        device=device,
    )
    return StoreJob(
        teacher, dataset, identity, open_views, views.num_views, params.batch_size, device
    )


@dataclass(frozen=True)
class ShardRows:
    """What a shard is written from: all that the device computes for it."""

    key: ShardKey
    logits: np.ndarray  # [num_samples, num_classes] float32
    measured: np.ndarray  # numbers of the rows whose fidelity is measured
    reference: np.ndarray | None  # [len(measured), num_classes], in float32; None: `logits` are
    canaries: np.ndarray


def make_shards(job: StoreJob, folder: Path, keys: Iterable[ShardKey]) -> None:
    """Measure shards, and write them into the folder. A thread does both for one shard while the
    teacher runs for the next one; no more than two shards are in memory.

    Raises:
        UserError: the rows of one are no raw logits, or cannot be stored with enough fidelity, or
            the disk is full. All shards before it are finished.
    """
    with ThreadPoolExecutor(1) as thread:
        writing: Future[None] | None = None
        for key in keys:
            rows = run_teacher(job, key)
            if writing is not None:
                writing.result()
            writing = thread.submit(write_rows, job, folder, rows)
        if writing is not None:
            writing.result()


def run_teacher(job: StoreJob, key: ShardKey) -> ShardRows:
    """Compute everything of a shard that needs the device."""
    logits, measured = shard_logits(job, key), measured_rows(key)
    reference = None
    if len(measured):
        reference = job.teacher.in_float32(key.split, key.view, key.first_sample + measured)
    return ShardRows(key, logits, measured, reference, canaries_of(job.views, key))


def write_rows(job: StoreJob, folder: Path, rows: ShardRows) -> None:
    """Measure a shard's rows, and write them. Uses neither the device nor torch."""
    key = rows.key
    labels = job.dataset.splits[key.split].labels
    labels = labels[key.first_sample : key.first_sample + key.num_samples]
    if len(rows.measured):
        _measure(job, folder, rows, labels[rows.measured])
    write_shard(folder / key.file_name, job.identity, key, rows.logits, labels, rows.canaries)


def _measure(job: StoreJob, folder: Path, rows: ShardRows, labels: np.ndarray) -> None:
    """Compare some of a shard's rows, as they are stored, with the teacher in float32."""
    logits, key = rows.logits[rows.measured], rows.key
    if beyond_float16(logits).any():
        return  # `write_shard` refuses all of them
    reference = logits if rows.reference is None else rows.reference
    stored = encode(less_offset(logits), labels, job.identity.encoding, job.identity.k)
    of_rows = compare_rows(reference, labels, stored)
    # Few rows of one shard may disagree by chance: their number is checked in the whole store.
    divergence = {"kl_tail_as_one": of_rows["kl_tail_as_one"].mean()}
    check_fidelity(divergence, f"the rows of {key.file_name}", fidelity_advice(job.identity))
    write_measurement(folder, key, of_rows)


def fidelity_advice(identity: StoreIdentity) -> str:
    """Say what to do about rows of too little fidelity."""
    if identity.precision != "float32":
        return (
            f"In {identity.precision} the forward pass loses what tells the classes apart: set "
            "`soft_targets.precision: float32`."
        )
    return "Remove them and run `dvc repro soft_targets`."


def count_extra_passes(job: StoreJob, keys: Iterable[ShardKey]) -> int:
    """Count the forward passes that measure the fidelity of shards: those in float32 of a teacher
    that runs in less."""
    if isinstance(job.teacher, ImportedLogits) or job.identity.precision == "float32":
        return 0
    return sum(len(measured_rows(key)) for key in keys)


def shard_logits(job: StoreJob, key: ShardKey) -> np.ndarray:
    """The teacher's logits of a shard: [num_samples, num_classes] float32."""
    samples = key.first_sample + np.arange(key.num_samples)
    return job.teacher.logits(key.split, key.view, samples)
