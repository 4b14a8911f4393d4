"""Train every student and baseline, several at once; the outputs are those of `dvc repro`.

    python -m pipeline.commands.train_students --jobs 2

DVC runs one stage at a time, and parallel `dvc repro` lock one another out; parallel `dvc repro
--single-item` do not. So this runs the stages before the trainings, then one DVC per training, and
then the rest. Imports no torch.
"""

from pipeline.runtime.command import run_command

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from pipeline.data.prepared.image_decoding import available_cores
from pipeline.runtime import signals, stage_times
from pipeline.runtime.errors import UserError, positive_int
from pipeline.runtime.outputs import ModelOutputs
from pipeline.runtime.params import student_names

UPSTREAM = "soft_targets"  # DVC runs `prepare` and `teacher` for it
DVC = [sys.executable, "-m", "dvc"]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m pipeline.commands.train_students", description=__doc__
    )
    parser.add_argument("--jobs", default="2", help="trainings at once")
    jobs = positive_int(parser.parse_args().jobs, "JOBS", "the number of trainings to run at once")
    stages = [
        ModelOutputs(role, name).stage
        for role in ("baseline", "distilled")  # as DVC orders them
        for name in student_names()
    ]
    os.environ[signals.STUDENTS] = str(os.getpid())
    run_dvc("repro", UPSTREAM)
    train_in_parallel(stages, jobs)
    run_dvc("repro")


def train_in_parallel(stages: list[str], jobs: int) -> None:
    """Run each stage that is not up to date, `jobs` at once, with a share of the cores each. A
    failure stops no other stage, and is named at the end."""
    threads = str(max(1, available_cores() // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ} if jobs > 1 else dict(os.environ)
    environment[stage_times.JOBS] = str(jobs)
    pool = ThreadPoolExecutor(jobs)
    try:
        succeeded = list(pool.map(lambda stage: run_stage(stage, environment), stages))
    finally:  # if interrupted, start no further stage
        pool.shutdown(cancel_futures=True)
    failed = [stage for stage, success in zip(stages, succeeded, strict=True) if not success]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(stages)} failed: {', '.join(failed)}. The lines above that "
            "begin with these names say why. The others are finished and recorded: fix these and "
            "run again, and only they are trained."
        )


def run_stage(stage: str, environment: Mapping[str, str]) -> bool:
    """Run one stage by DVC, print each of its lines after its name, and return its success."""
    process = subprocess.Popen(
        [*DVC, "--wait-for-lock", "repro", "--single-item", stage],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    for line in process.stdout:
        sys.stdout.write(f"{stage}: {line}" if line.strip() else "")
        sys.stdout.flush()
    return process.wait() == 0


def run_dvc(*arguments: str) -> None:
    """Run DVC. If it fails, exit with its code; it has printed why."""
    sys.stdout.flush()
    code = subprocess.run([*DVC, *arguments], check=False).returncode
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    run_command(main)
