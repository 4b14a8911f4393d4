"""Train every student and baseline, several at once, and end with what `dvc repro` ends with.

    python -m pipeline.commands.train_students --jobs 2

DVC runs one stage at a time, and several `dvc repro` lock one another out; `dvc repro
--single-item`, one for each training, does not. So what the students stand on is run first, then
each training by a DVC of its own, and then the rest. Imports no torch.
"""

from pipeline.runtime.command import run_command

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from pipeline.runtime import signals
from pipeline.runtime.errors import UserError
from pipeline.runtime.params import student_names

UPSTREAM = "soft_targets"  # with all that it needs: `prepare` and `teacher`


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m pipeline.commands.train_students", description=__doc__
    )
    parser.add_argument("--jobs", default="2", help="trainings at once")
    jobs = count_of_jobs(parser.parse_args().jobs)
    stages = [f"{kind}@{name}" for name in student_names() for kind in ("student", "baseline")]
    os.environ[signals.STUDENTS] = str(os.getpid())
    dvc("repro", UPSTREAM)
    train_side_by_side(stages, jobs)
    dvc("repro")


def count_of_jobs(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UserError(
            f"JOBS is `{text}`; expected the number of trainings to run at once, 1 or more."
        )
    return int(text)


def train_side_by_side(stages: list[str], jobs: int) -> None:
    """Run each stage unless it is up to date, `jobs` at once; one that fails stops no other.

    Raises:
        UserError: names those that failed.
    """
    environment = {**os.environ, **shares(jobs)}
    pool = ThreadPoolExecutor(jobs)
    try:
        succeeded = list(pool.map(lambda stage: run_stage(stage, environment), stages))
    finally:  # interrupted: what has not begun shall not begin
        pool.shutdown(cancel_futures=True)
    failed = [stage for stage, well in zip(stages, succeeded, strict=True) if not well]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(stages)} failed: {', '.join(failed)}. The lines above that "
            "begin with these names say why. The others are finished and recorded: mend these and "
            "run again, and nothing else is trained again."
        )


def shares(jobs: int) -> Mapping[str, str]:
    """Each training's part of the cores, where there are several and the user has not said it."""
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return {"OMP_NUM_THREADS": str(max(1, len(usable) // jobs))}


def run_stage(stage: str, environment: Mapping[str, str]) -> bool:
    """Run one stage by DVC, printing each line of it behind its name; whether it ended well."""
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


DVC = [sys.executable, "-m", "dvc"]


def dvc(*arguments: str) -> None:
    """Run DVC; where it fails, it has said why, and this process ends as it did."""
    sys.stdout.flush()
    code = subprocess.run([*DVC, *arguments], check=False).returncode
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    run_command(main)
