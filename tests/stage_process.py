"""Start, kill and finish a stage in another process; `soft_targets` by default."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from import_closure import ROOT

SCRATCH = Path(".scratch/soft_targets")


def start_module(module: str, *arguments: str, **settings: str) -> subprocess.Popen:
    """Start `python -m module arguments` in the current folder and a new process group."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start(
    processes: int | str = 1, code: Path = ROOT, stage: str = "soft_targets", *arguments: str
) -> subprocess.Popen:
    """Start a stage in the current folder and a new process group."""
    settings = {"PROCESSES": str(processes), "PYTHONPATH": str(code)}
    return start_module(f"pipeline.stages.{stage}", *arguments, **settings)


def finish(process: subprocess.Popen) -> str:
    """Wait for a run to succeed; return what it printed."""
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stdout + stderr
    return stdout


def kill(process: subprocess.Popen, *, group: bool = True) -> None:
    """Kill every process of the run at once, as a power cut does, or the first alone."""
    with suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
    process.communicate()


def shards_in_scratch() -> set[str]:
    return {path.name for path in SCRATCH.glob("*/*.h5")}


def wait_for_shards(process: subprocess.Popen, count: int) -> None:
    """Wait until so many shards are finished, or the run has ended."""
    while len(shards_in_scratch()) < count and process.poll() is None:
        time.sleep(0.001)


def resumed(output: str) -> int:
    """The number of finished shards from which a run resumed."""
    match = re.search(r"resumes (\d+) finished shards", output)
    return int(match[1]) if match else 0


def passes(output: str) -> int:
    return int(re.search(r"ahead: ([\d,]+) teacher passes", output)[1].replace(",", ""))
