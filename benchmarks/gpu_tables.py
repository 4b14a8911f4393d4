"""The published pairs of `benchmarks.accuracy.methods`, for a machine lent for minutes at a time.

PROJECT is the folder of all work: images, teachers, caches, the state of each training after its
last epoch, and runs.csv with the finished ones. A command that was killed continues there.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.accuracy import study
from benchmarks.packed_images import unpack
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import PREPARED
from soak import common as soak

PACKED = "packed"  # the folder of the parts, in the project


def train_tables(project: Path, minutes: float, quick: bool) -> None:
    """Train what runs.csv of the project lacks, most wanted first, for so many minutes.

    Several trainings run at once: one is too small to fill a GPU. `quick` makes a project of tiny
    images.

    Raises:
        UserError: there are no images, or a training or a stage fails.
    """
    project = project.resolve()
    if not (project / PREPARED).exists():
        make_images(project, quick)
    file = project / study.RESULTS.name
    arguments = [
        *("benchmarks.accuracy.methods", str(project), "--budget", "quick" if quick else "gpu"),
        *("--workers", str(max(1, (os.cpu_count() or 1) // 2)), "--results", str(file)),
    ]
    path = f"{soak.ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=os.environ | {"PYTHONPATH": path},
        process_group=0,  # one group: its trainings and stages end with it
    )
    try:
        if process.wait(60 * minutes):
            raise UserError(f"`{' '.join(arguments)}` failed; expected it to succeed.")
    except subprocess.TimeoutExpired:
        print(f"{minutes:g} minutes are over: run the same command again", flush=True)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        print(f"`{file}` has {len(study.results(file))} runs", flush=True)


def make_images(project: Path, quick: bool) -> None:
    """Put prepared images there: those that are packed in the project, or tiny ones."""
    if not quick:
        unpack(project / PACKED, project)
        return
    project.mkdir(parents=True, exist_ok=True)
    soak.write_params(project, soak.params())
    soak.write_folder(project / "images", soak.images(60, 16))
    study.run_stage("prepare", project)
