"""soft_targets: run the teacher once over every view of every training image, and store its logits;
or take the logits that it is made of.

Reads data/prepared/, models/teacher/ and `views`, `soft_targets` of params.yaml; writes
data/soft_targets/, where validation and test are stored as they are, without augmentation.
Finished shards are kept in .scratch/soft_targets/: a killed run goes on from them, and more views
only add to them. PROCESSES=N in the environment shares the shards among N processes.
"""

from pipeline.runtime.command import run_command

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.compute import distributed
from pipeline.compute.device import default_device
from pipeline.compute.distributed import ProcessGroup
from pipeline.data.prepared.dataset import Dataset, open_dataset, verify_dataset
from pipeline.models import checkpoint
from pipeline.models.checkpoint import TEACHER
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import atomic_directory
from pipeline.runtime.outputs import STORE
from pipeline.runtime.params import load_section
from pipeline.runtime.progress import bar, bar_or_tenths
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.store.format.encodings import columns
from pipeline.store.format.schema import ShardKey, StoreIdentity, shard_keys
from pipeline.store.format.shards import ShardError, check_shard, read_header
from pipeline.store.writing import fidelity
from pipeline.store.writing import finished_shards as scratch
from pipeline.store.writing.finished_shards import SCRATCH
from pipeline.store.writing.params import SoftTargetsParams
from pipeline.store.writing.shard_writer import shard_bytes, write_index, write_shard
from pipeline.store.writing.teacher_logits import (
    AGAIN,
    ImportedLogits,
    TeacherForward,
    ViewsBySplit,
    canaries_of,
    open_teacher_logits,
    open_views_by_split,
)
from pipeline.views.params import ViewsParams

FIDELITY_ROWS = 512


@dataclass(frozen=True)
class StoreJob:
    """What it takes to make any shard of the store."""

    teacher: TeacherForward | ImportedLogits
    dataset: Dataset  # at the size of the views
    contents: StoreIdentity
    views: ViewsBySplit  # those that the store is about, on the device
    num_views: int
    batch_size: int
    device: torch.device

    @property
    def split_sizes(self) -> dict[str, int]:
        return {name: len(split) for name, split in self.dataset.splits.items()}

    @property
    def places(self) -> list[ShardKey]:
        return list(shard_keys(self.split_sizes, self.num_views))


@dataclass(frozen=True)
class PendingShards:
    """Which shards are to be made, and where finished ones are kept."""

    folder: Path
    pending: Sequence[ShardKey]


def open_job() -> StoreJob:
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
    contents = StoreIdentity(
        dataset_fingerprint=dataset.fingerprint,
        teacher_fingerprint=checkpoint.fingerprint(TEACHER, produced_by=AGAIN),
        policy=str(views.plan),
        seed=views.seed,
        image_size=views.image_size,
        encoding=params.encoding,
        k=params.k,
        precision=params.precision,
        num_classes=dataset.num_classes,
    )
    shown = open_views_by_split(dataset, contents, device)
    teacher = open_teacher_logits(
        dataset, contents, views.num_views, shown, batch_size=params.batch_size, device=device
    )
    return StoreJob(teacher, dataset, contents, shown, views.num_views, params.batch_size, device)


def plan_ahead(job: StoreJob) -> PendingShards:
    """Find the finished shards, and say what is ahead before any of it is done.

    Raises:
        UserError: the store cannot fit on the disk.
    """
    folder = scratch.folder(job.contents, job.batch_size, job.device)
    pending = []
    for place in bar(job.places, "finished shards"):
        path = folder / place.file_name
        if path.exists():
            try:
                check_shard(path, job.contents, place, canaries_of(job.views, place))
                continue
            except ShardError as error:
                print(f"soft targets: `{path}` {error}; it is made again")
        pending.append(place)
    total, passes = rows_of(job.places), rows_of(pending)
    needed = sum(shard_bytes(job.contents, place) for place in pending)
    free = shutil.disk_usage(SCRATCH).free
    found = f"resumes {len(job.places) - len(pending)} finished shards ({total - passes:,} rows)"
    print(
        f"soft targets: {job.num_views} views of {job.split_sizes['train']:,} training images, and "
        f"validation and test: {total:,} rows in {len(job.places)} shards\n"
        f"  {found if passes < total else f'`{SCRATCH}` holds no shard of these: all are made'}\n"
        f"  ahead: {passes:,} {job.teacher.unit}; {needed:,} bytes to write, {free:,} free",
        flush=True,
    )
    for line in job.teacher.told:
        print(f"  {line}", flush=True)
    STORE.parent.mkdir(parents=True, exist_ok=True)
    require_free_space(SCRATCH, needed)
    if os.stat(SCRATCH).st_dev != os.stat(STORE.parent).st_dev:  # no hard links: a second copy
        require_free_space(
            STORE.parent, sum(shard_bytes(job.contents, place) for place in job.places)
        )
    return PendingShards(folder, pending)


def rows_of(places: Sequence[ShardKey]) -> int:
    return sum(place.num_samples for place in places)


def require_free_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"the soft targets need {needed:,} bytes in `{directory}`, but its file system has "
            f"{free:,} free. Make room, lower `views.count`, or set `soft_targets.encoding: top_k`."
        )


def make_shard(job: StoreJob, folder: Path, place: ShardKey) -> None:
    split = job.dataset.splits[place.split]
    logits = shard_logits(job, place)
    labels = split.labels[place.first_sample : place.first_sample + place.num_samples]
    canaries = canaries_of(job.views, place)
    write_shard(folder / place.file_name, job.contents, place, logits, labels, canaries)


def shard_logits(job: StoreJob, place: ShardKey) -> np.ndarray:
    """[num_samples, num_classes] float32."""
    samples = place.first_sample + np.arange(place.num_samples)
    return job.teacher.logits(place.split, place.view, samples)


def measure_fidelity(job: StoreJob, folder: Path) -> dict[str, float]:
    """Ask the teacher again for rows spread evenly over the training views, and compare."""
    split = job.dataset.splits["train"]
    total = len(split) * job.num_views
    count = min(FIDELITY_ROWS, total)
    views, samples = np.divmod(np.arange(count) * (total - 1) // max(1, count - 1), len(split))
    answers, size = [], 0
    stored = {
        name: []
        for name in columns(job.contents.encoding, job.contents.num_classes, job.contents.k)
    }
    for place in job.places:
        if place.split != "train":
            continue
        path, end = folder / place.file_name, place.first_sample + place.num_samples
        size += path.stat().st_size
        here = (views == place.view) & (samples >= place.first_sample) & (samples < end)
        if here.any():
            answers.append(job.teacher.logits("train", place.view, samples[here]))
            arrays = read_header(path).arrays
            for name, parts in stored.items():
                parts.append(arrays[name].map()[samples[here] - place.first_sample])
    measured = fidelity.store_fidelity(
        np.concatenate(answers),
        split.labels[samples],
        {name: np.concatenate(parts) for name, parts in stored.items()},
    )
    return {"rows": count, **measured, "bytes_per_row": round(size / total, 2)}


def finish(
    job: StoreJob,
    plan: PendingShards,
    shares: Sequence[tuple[float | None, float]],
    inputs: StageInputs,
) -> None:
    """Measure the store, put it in place and say what it is.

    Args:
        shares: each process's seconds in the forward pass, None where there is none, and in all.
        inputs: as they were when the stage began.
    """
    measured = measure_fidelity(job, plan.folder)
    inputs.check()
    with atomic_directory(STORE) as directory:
        scratch.link_shards(directory, (plan.folder / place.file_name for place in job.places))
        write_index(
            directory,
            job.contents,
            job.dataset.class_names,
            job.split_sizes,
            job.num_views,
            measured,
        )
        size = sum(file.stat().st_size for file in directory.iterdir())
    scratch.prune(plan.folder)
    print(f"{STORE}: {size:,} bytes, {measured['bytes_per_row']} per view of an image")
    if plan.pending:
        forward, seconds = zip(*shares, strict=True)
        slowest, passes = max(seconds), rows_of(plan.pending)
        line = f"  {passes:,} {job.teacher.unit} in {slowest:.1f} s"
        if None not in forward:
            outside = 1 - sum(forward) / sum(seconds)
            line += f", {passes / slowest:,.0f} images/s, {outside:.1%} of the time outside the "
            line += "teacher's forward pass"
        print(line)
    divergences = ", ".join(
        f"{measured[f'kl_at_temperature_{t}']:.2e}" for t in fidelity.TEMPERATURES
    )
    print(
        f"  of {measured['rows']} rows, KL(teacher || stored) {divergences} nats at T = "
        f"{', '.join(map(str, fidelity.TEMPERATURES))}; the same first class in "
        f"{measured['agreement']:.2%}"
    )


def run(group: ProcessGroup) -> None:
    leads = group.rank == 0
    with scratch.exclusive() if leads else nullcontext():
        inputs = StageInputs("soft_targets")
        job = open_job() if leads else None
        if leads:  # once is enough
            verify_dataset()
        plan = group.broadcast(plan_ahead(job) if leads else None)
        job = job or open_job()
        start = time.perf_counter()
        mine = plan.pending[group.rank :: group.size]
        for place in bar_or_tenths(mine, "shard") if leads else mine:
            make_shard(job, plan.folder, place)
        shares = group.gather((job.teacher.seconds(), time.perf_counter() - start))
        if leads:
            finish(job, plan, shares, inputs)


def main() -> None:
    argparse.ArgumentParser(
        "python -m pipeline.stages.soft_targets", description=__doc__
    ).parse_args()
    if distributed.launch("pipeline.stages.soft_targets"):
        return
    with distributed.process_group() as group:
        run(group)


if __name__ == "__main__":
    run_command(main)
