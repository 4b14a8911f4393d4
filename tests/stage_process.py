"""Start, kill and finish a stage in another process; `soft_targets` by default."""

import logging
import os
import re
import runpy
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen  # by this name, which no test replaces
from typing import NoReturn

import torch._dynamo  # noqa: F401  (an optimizer loads it: in each fork, if not here)
from import_closure import ROOT

SCRATCH = Path(".scratch/soft_targets")
#: Where torchrun starts the processes of a stage; a test sets it to `fork_command`.
TORCHRUNS_POPEN = (
    "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler.Popen"
)


def start_module(module: str, *arguments: str, **settings: str) -> Popen:
    """Start `python -m module arguments` in the current folder and a new process group."""
    return Popen(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | settings,
        stdout=PIPE,
        stderr=PIPE,
        text=True,
        start_new_session=True,
    )


def fork(runs: str | Path, *arguments: str, **settings: str) -> Popen:
    """Run a module or a script as `start_module` does, in a fork of this process, which has loaded
    torch. For tests that do not ask how a command loads."""
    return _forked(
        [sys.executable, str(runs), *arguments],
        [str(runs), *arguments],
        partial(runpy.run_path if isinstance(runs, Path) else _run_module, str(runs)),
        {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | settings,
        stdout=PIPE,
        stderr=PIPE,
        text=True,
        start_new_session=True,
    )


def fork_command(
    args: str | Sequence[str],
    env: Mapping[str, str] | None = None,
    shell: bool = False,
    executable: str | None = None,
    **options: object,
) -> Popen:
    """As `subprocess.Popen`, whose place it takes, but run `python -m module arguments` in a fork
    of this process, which has loaded torch and DVC."""
    words = [args] if isinstance(args, str) else [*args]
    if shell or "-c" in words:  # of a shell
        words = shlex.split(words[-1])
    if not re.match(r"(exec )?\S*python[\d.]* (-u )?-m ", " ".join(words)):
        return Popen(args, env=env, shell=shell, executable=executable, **options)
    words = words[words.index("-m") + 1 :]
    return _forked(args, words, partial(_run_module, words[0]), env or os.environ, **options)


def _run_module(module: str, run_name: str) -> None:
    runpy.run_module(module, run_name=run_name, alter_sys=True)


def _forked(
    args: str | Sequence[str],
    words: list[str],
    run: Callable[..., object],
    env: Mapping[str, str],
    **options: object,
) -> Popen:
    def forked() -> NoReturn:  # where Popen would execute another program
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # Popen waits for the end of one of them
        environment = dict(env)
        os.environ.clear()
        os.environ |= environment
        sys.argv = words
        sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
        for handler in logging.getLogger("dvc").handlers:
            handler.stream = sys.stderr if handler.level >= logging.WARNING else sys.stdout
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [os.getcwd(), *filter(None, paths)]
        for name in [name for name in sys.modules if name.partition(".")[0] == "pipeline"]:
            del sys.modules[name]  # the code may be another, and no test has changed it
        code = 1
        try:
            run(run_name="__main__")
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

    # PLW1509: our threads hold no lock here.
    return Popen(args, preexec_fn=forked, **options)  # noqa: PLW1509


def start(
    processes: int | str = 1, code: Path = ROOT, stage: str = "soft_targets", *arguments: str
) -> Popen:
    """Fork a stage in the current folder and a new process group."""
    settings = {"PROCESSES": str(processes), "PYTHONPATH": str(code)}
    return fork(f"pipeline.stages.{stage}", *arguments, **settings)


def finish(process: Popen) -> str:
    """Wait for a run to succeed; return what it printed."""
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stdout + stderr
    return stdout


def kill(process: Popen, *, group: bool = True) -> None:
    """Kill every process of the run at once, as a power cut does, or the first alone."""
    with suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
    process.communicate()


def shards_in_scratch() -> set[str]:
    return {path.name for path in SCRATCH.glob("*/*.h5")}


def wait_for_shards(process: Popen, count: int) -> None:
    """Wait until so many shards are finished, or the run has ended."""
    while len(shards_in_scratch()) < count and process.poll() is None:
        time.sleep(0.001)


def resumed(output: str) -> int:
    """The number of finished shards from which a run resumed."""
    match = re.search(r"resumes (\d+) finished shards", output)
    return int(match[1]) if match else 0


def passes(output: str) -> int:
    return int(re.search(r"ahead: ([\d,]+) teacher passes", output)[1].replace(",", ""))
