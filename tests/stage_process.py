"""Start, kill and finish a stage in another process; `soft_targets` by default."""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

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


def fork(runs: str | Path, *arguments: str, **settings: str) -> subprocess.Popen:
    """Run a module or a script as `start_module` does, in a fork of this process, which has loaded
    torch. For tests that do not ask how a command loads."""

    def run() -> NoReturn:  # where Popen would execute another program
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # Popen waits for the end of one of them
        os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | settings
        sys.argv = [str(runs), *arguments]
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        sys.path[:0] = [os.getcwd(), *os.environ["PYTHONPATH"].split(os.pathsep)]
        for name in [name for name in sys.modules if name.partition(".")[0] == "pipeline"]:
            del sys.modules[name]  # the code may be another, and no test has changed it
        code = 1
        try:
            if isinstance(runs, Path):
                runpy.run_path(str(runs), run_name="__main__")
            else:
                runpy.run_module(runs, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as error:
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            else:
                code = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    return subprocess.Popen(
        [sys.executable],
        preexec_fn=run,  # noqa: PLW1509  (our threads hold no lock here)
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start(
    processes: int | str = 1, code: Path = ROOT, stage: str = "soft_targets", *arguments: str
) -> subprocess.Popen:
    """Fork a stage in the current folder and a new process group."""
    settings = {"PROCESSES": str(processes), "PYTHONPATH": str(code)}
    return fork(f"pipeline.stages.{stage}", *arguments, **settings)


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
