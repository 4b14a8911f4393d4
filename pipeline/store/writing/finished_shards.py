"""Finished shards, kept outside DVC's outputs: a killed run resumes from them.

The name of their folder is a fingerprint of everything that defines their bytes, so a shard of
other inputs or of other code is never reused.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import h5py
import torch

from pipeline.compute.provenance import device_name, library_versions, loaded_code
from pipeline.runtime import locks
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.files import canonical_json
from pipeline.runtime.outputs import STORE
from pipeline.runtime.progress import bar
from pipeline.runtime.stage_times import resumed
from pipeline.store.format.schema import FORMAT_VERSION, ShardKey, StoreIdentity
from pipeline.store.format.shards import ShardError, check_shard
from pipeline.store.format.views_by_split import canaries_of
from pipeline.store.writing.job import StoreJob, count_extra_passes
from pipeline.store.writing.measurements import has_measurement
from pipeline.store.writing.shard_writer import shard_bytes

SCRATCH = Path(".scratch/soft_targets")


@dataclass(frozen=True)
class PendingShards:
    """The shards that are still to be made, and the folder of the finished ones."""

    folder: Path
    keys: Sequence[ShardKey]


def exclusive() -> AbstractContextManager[None]:
    """Keep other runs out of the scratch."""
    return locks.exclusive(SCRATCH)


def folder(identity: StoreIdentity, batch_size: int, device: torch.device) -> Path:
    """The folder of the shards of one store, while it is made and after."""
    defining = {
        "format_version": FORMAT_VERSION,
        **identity.fields(),
        "batch_size": batch_size,
        "device": device_name(device),
        "versions": {
            **library_versions(),
            "hdf5": h5py.version.hdf5_version,
            "scipy": version("scipy"),  # loaded for policies that mix alone
        },
        "code": loaded_code(),
    }
    return SCRATCH / hashlib.sha256(canonical_json(defining).encode()).hexdigest()


def find_pending(job: StoreJob) -> PendingShards:
    """Check the finished shards, and print what is still to be done before any of it is done.

    Raises:
        UserError: the store does not fit on the disk.
    """
    finished = folder(job.identity, job.batch_size, job.device)
    pending = [
        key for key in bar(job.shards, "finished shards") if not _is_finished(job, finished, key)
    ]
    total, rows = num_rows(job.shards), num_rows(pending)
    needed = sum(shard_bytes(job.identity, key) for key in pending)
    found = f"resumes {counted(len(job.shards) - len(pending), 'finished shard')} "
    found += f"({counted(total - rows, 'row')})"
    if rows == total:
        found = f"`{SCRATCH}` has no shard of this store: all are made"
    else:
        resumed()
    extra = count_extra_passes(job, pending)
    ahead = f"{rows:,} {job.teacher.unit}" + (f" and {extra:,} in float32" if extra else "")
    print(
        f"soft targets: {counted(job.num_views, 'view')} of "
        f"{counted(job.split_sizes['train'], 'training image')}, and validation and test: "
        f"{counted(total, 'row')} in {counted(len(job.shards), 'shard')}\n"
        f"  {found}\n"
        f"  ahead: {ahead}; {needed:,} bytes to write, "
        f"{shutil.disk_usage(SCRATCH).free:,} free",
        flush=True,
    )
    for line in job.teacher.remarks:
        print(f"  {line}", flush=True)
    STORE.parent.mkdir(parents=True, exist_ok=True)
    _require_free_space(SCRATCH, needed)
    if os.stat(SCRATCH).st_dev != os.stat(STORE.parent).st_dev:  # no hard links: a second copy
        everything = sum(shard_bytes(job.identity, key) for key in job.shards)
        _require_free_space(STORE.parent, everything)
    return PendingShards(finished, pending)


def num_rows(keys: Iterable[ShardKey]) -> int:
    return sum(key.num_samples for key in keys)


def _is_finished(job: StoreJob, finished: Path, key: ShardKey) -> bool:
    path = finished / key.file_name
    if not path.exists():
        return False
    try:
        check_shard(path, job.identity, key, canaries_of(job.views, key))
    except ShardError as error:
        print(f"soft targets: `{path}` {error}; it is made again")
        return False
    return has_measurement(finished, key)


def _require_free_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"the soft targets need {needed:,} bytes in `{directory}`, but its file system has "
            f"{free:,} free. Make room, lower `views.count`, or set `soft_targets.encoding: top_k`."
        )


def link_shards(directory: Path, shards: Iterable[Path]) -> None:
    """Put shards into a directory as hard links, or as copies on a file system without links."""
    for shard in shards:
        target = directory / shard.name
        try:
            os.link(shard, target)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            shutil.copyfile(shard, target)


def prune(current: Path) -> None:
    """Remove the shards of other stores, and the half-written files of killed runs."""
    for path in SCRATCH.iterdir():
        if path.is_dir() and path != current:
            shutil.rmtree(path, ignore_errors=True)
    for path in current.glob(".*.partial"):
        path.unlink(missing_ok=True)
