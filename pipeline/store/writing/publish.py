"""Measure a finished store, put it in place, and report it."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.runtime.errors import counted
from pipeline.runtime.files import atomic_directory
from pipeline.runtime.outputs import STORE
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.store.writing import finished_shards
from pipeline.store.writing.fidelity import TEMPERATURES, check_fidelity
from pipeline.store.writing.finished_shards import PendingShards, num_rows
from pipeline.store.writing.job import StoreJob, count_extra_passes, fidelity_advice
from pipeline.store.writing.measurements import mean_of, read_measurement
from pipeline.store.writing.shard_writer import write_index


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
        UserError: the rows say other things than the teacher, or an input changed since: nothing is
            put in place.
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
    """Collect what was measured of the training shards, and refuse a store that says other things
    than the teacher."""
    keys = [key for key in job.shards if key.split == "train"]
    fidelity = mean_of(read_measurement(folder, key) for key in keys)
    check_fidelity(fidelity, f"the rows for `{STORE}`", fidelity_advice(job.identity))
    size = sum((folder / key.file_name).stat().st_size for key in keys)
    return {
        **fidelity,
        "extra_passes": count_extra_passes(job, keys),
        "bytes_per_row": round(size / num_rows(keys), 2),
    }


def _print_speed(job: StoreJob, rows: int, seconds: Sequence[tuple[float | None, float]]) -> None:
    forward, total = zip(*seconds, strict=True)
    slowest = max(total)
    line = f"  {rows:,} {job.teacher.unit} in {slowest:.1f} s"
    if None not in forward:
        outside = 1 - sum(forward) / sum(total)
        line += f", {rows / slowest:,.0f} images/s, {outside:.1%} of the time outside the "
        line += "teacher's forward pass"
    print(line)
