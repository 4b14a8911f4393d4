"""soft_targets: run the teacher once over every view of every training image, and store its logits.
A teacher of imported logits is not run: its logits are stored.

Reads data/prepared/, models/teacher/ and `views`, `soft_targets` of params.yaml; writes
data/soft_targets/, with validation and test images without augmentation. Finished shards are kept
in .scratch/soft_targets/: a killed run resumes from them, and more views only add shards.
PROCESSES=N in the environment divides the shards among N processes.
"""

from pipeline.runtime.command import run_command

import argparse
import time
from contextlib import nullcontext

from pipeline.compute import distributed
from pipeline.compute.distributed import ProcessGroup
from pipeline.data.prepared.dataset import verify_dataset
from pipeline.runtime.progress import bar
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.store.writing import finished_shards
from pipeline.store.writing.job import make_shards, open_job
from pipeline.store.writing.publish import publish


def write_store(group: ProcessGroup) -> None:
    with finished_shards.exclusive() if group.is_main else nullcontext():
        inputs = StageInputs("soft_targets")
        job = open_job() if group.is_main else None
        if group.is_main:  # once is enough
            verify_dataset()
        pending = group.broadcast(finished_shards.find_pending(job) if group.is_main else None)
        job = job or open_job()
        start = time.perf_counter()
        local = pending.keys[group.rank :: group.size]
        make_shards(job, pending.folder, bar(local, "shard") if group.is_main else local)
        seconds = group.gather((job.teacher.seconds(), time.perf_counter() - start))
        if group.is_main:
            publish(job, pending, seconds, inputs)


def main() -> None:
    argparse.ArgumentParser(
        "python -m pipeline.stages.soft_targets", description=__doc__
    ).parse_args()
    if distributed.launch("pipeline.stages.soft_targets"):
        return
    with distributed.process_group() as group:
        write_store(group)


if __name__ == "__main__":
    run_command(main)
