"""Measure a finished store, put it in place, and report it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.runtime.errors import counted
from pipeline.runtime.files import atomic_directory
from pipeline.runtime.outputs import STORE
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.store.format.encodings import columns
from pipeline.store.format.shards import read_header
from pipeline.store.writing import finished_shards
from pipeline.store.writing.fidelity import TEMPERATURES, store_fidelity
from pipeline.store.writing.finished_shards import PendingShards, num_rows
from pipeline.store.writing.job import StoreJob
from pipeline.store.writing.shard_writer import write_index

FIDELITY_ROWS = 512


def publish(
    job: StoreJob,
    pending: PendingShards,
    seconds: Sequence[tuple[float | None, float]],
    inputs: StageInputs,
) -> None:
    """Measure the store, put it in place, and print what it is.

    Args:
        seconds: of each process: in the forward pass (None without one), and in all.
        inputs: of the stage, as they were when it began.

    Raises:
        UserError: an input changed since: nothing is put in place.
    """
    fidelity = measure_fidelity(job, pending.folder)
    inputs.check()
    with atomic_directory(STORE) as directory:
        shards = (pending.folder / key.file_name for key in job.shards)
        finished_shards.link_shards(directory, shards)
        write_index(
            directory,
            job.identity,
            job.dataset.class_names,
            job.split_sizes,
            job.num_views,
            fidelity,
        )
        size = sum(file.stat().st_size for file in directory.iterdir())
    finished_shards.prune(pending.folder)
    print(f"{STORE}: {size:,} bytes, {fidelity['bytes_per_row']} per view of an image")
    if pending.keys:
        _print_speed(job, num_rows(pending.keys), seconds)
    divergences = ", ".join(f"{fidelity[f'kl_at_temperature_{t}']:.2e}" for t in TEMPERATURES)
    print(
        f"  of {counted(fidelity['rows'], 'row')}, KL(teacher || stored) {divergences} nats at T = "
        f"{', '.join(map(str, TEMPERATURES))}; the same first class in {fidelity['agreement']:.2%}"
    )


def measure_fidelity(job: StoreJob, folder: Path) -> dict[str, float]:
    """Run the teacher again for rows spread evenly over the training views, and compare."""
    split = job.dataset.splits["train"]
    total = len(split) * job.num_views
    count = min(FIDELITY_ROWS, total)
    views, samples = np.divmod(np.arange(count) * (total - 1) // max(1, count - 1), len(split))
    logits, size = [], 0
    identity = job.identity
    stored = {name: [] for name in columns(identity.encoding, identity.num_classes, identity.k)}
    for key in job.shards:
        if key.split != "train":
            continue
        path, end = folder / key.file_name, key.first_sample + key.num_samples
        size += path.stat().st_size
        in_shard = (views == key.view) & (samples >= key.first_sample) & (samples < end)
        if in_shard.any():
            logits.append(job.teacher.logits("train", key.view, samples[in_shard]))
            arrays = read_header(path).arrays
            for name, parts in stored.items():
                parts.append(arrays[name].map()[samples[in_shard] - key.first_sample])
    fidelity = store_fidelity(
        np.concatenate(logits),
        split.labels[samples],
        {name: np.concatenate(parts) for name, parts in stored.items()},
    )
    return {"rows": count, **fidelity, "bytes_per_row": round(size / total, 2)}


def _print_speed(job: StoreJob, rows: int, seconds: Sequence[tuple[float | None, float]]) -> None:
    forward, total = zip(*seconds, strict=True)
    slowest = max(total)
    line = f"  {rows:,} {job.teacher.unit} in {slowest:.1f} s"
    if None not in forward:
        outside = 1 - sum(forward) / sum(total)
        line += f", {rows / slowest:,.0f} images/s, {outside:.1%} of the time outside the "
        line += "teacher's forward pass"
    print(line)
