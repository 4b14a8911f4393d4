"""Everything that it takes to make a shard of the store, and making one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.compute.device import default_device
from pipeline.data.prepared.dataset import Dataset, open_dataset
from pipeline.models import checkpoint
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.params import load_section
from pipeline.store.format.schema import ShardKey, StoreIdentity, shard_keys
from pipeline.store.format.views_by_split import ViewsBySplit, canaries_of, open_views_by_split
from pipeline.store.writing.imported_logits import ImportedLogits
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
    if params.k is not None and params.k > dataset.num_classes:
        raise UserError(
            f"`params.yaml: soft_targets.k` is {params.k}, but data/prepared has "
            f"{dataset.num_classes} classes; expected at most as many. Lower k, or set "
            "encoding: dense."
        )
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


def make_shard(job: StoreJob, folder: Path, key: ShardKey) -> None:
    """Write one shard into the folder."""
    labels = job.dataset.splits[key.split].labels
    write_shard(
        folder / key.file_name,
        job.identity,
        key,
        shard_logits(job, key),
        labels[key.first_sample : key.first_sample + key.num_samples],
        canaries_of(job.views, key),
    )


def shard_logits(job: StoreJob, key: ShardKey) -> np.ndarray:
    """The teacher's logits of a shard: [num_samples, num_classes] float32."""
    samples = key.first_sample + np.arange(key.num_samples)
    return job.teacher.logits(key.split, key.view, samples)
