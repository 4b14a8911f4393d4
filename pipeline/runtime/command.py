"""Run a command's `main`; on a signal or a user's mistake, exit with one message, no traceback.

Every command imports this module first: importing it installs the signal handlers, and the modules
after it take seconds to load. (Ruff's `isort` settings in pyproject.toml put it first.) Its own
first import is `interpreter`: the modules after that need the project's Python.
"""

import atexit
import gc
import os
import signal
import sys
import time
from collections.abc import Callable

from pipeline.runtime import interpreter, signals  # noqa: F401  (importing it checks Python)
from pipeline.runtime.errors import (
    UserError,
    ended_worker,
    first_line,
    is_of_ended_worker,
    is_out_of_memory,
)

_OF_STUDENT = "`training.batch_size`, or this student's own"
#: The parameter that makes a command need less memory.
_BATCH_SIZES = {
    "pipeline.stages.teacher": "`teacher.training.batch_size`",
    "pipeline.stages.soft_targets": "`soft_targets.batch_size`",
    "pipeline.stages.student": _OF_STUDENT,
    "pipeline.stages.baseline": _OF_STUDENT,
    "pipeline.stages.int8_training": _OF_STUDENT,
}
_START = time.perf_counter()

signals.handle_in_commands()
if signals.running_command() is not None:
    gc.disable()  # while modules load: their objects stay, and to search them again takes long


def run_command(main: Callable[[], None]) -> None:
    """Call `main`. On a `UserError`, a failing disk, too little memory, the end of a process that
    decodes images or an interruption, print one message and exit with a code other than 0. For a
    stage that DVC runs, first print what is ahead of the run."""
    if not gc.isenabled():
        gc.freeze()
        atexit.register(gc.unfreeze)  # or what modules hold would not be destroyed at the end
        gc.enable()
    try:
        if "DVC_STAGE" in os.environ and "RANK" not in os.environ:
            _run_stage(main)
        else:
            main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # of `| head`, for example
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at the end
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        problem = f"`{error.filename}`: {error.strerror}" if error.filename else str(error)
        sys.exit(f"error: {problem}. Nothing half-written is kept; fix this and run again.")
    except (RuntimeError, MemoryError) as error:
        if is_of_ended_worker(error):
            sys.exit(f"error: {ended_worker(error)}")
        if not is_out_of_memory(error):
            raise
        sys.exit(f"error: {_out_of_memory(error)}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _out_of_memory(error: Exception) -> str:
    # Of torch's sentences the third says how large the memory is; then it lists what is in it.
    problem = ". ".join(first_line(error).split(". ")[:3]).rstrip(".")
    batch_size = _BATCH_SIZES.get(signals.running_command() or "")
    advice = f"Set a lower {batch_size}" if batch_size else "Use a machine with more"
    return (
        f"too little memory ({problem}); expected enough for this command. {advice}, or end other "
        "processes that use it."
    )


def _run_stage(main: Callable[[], None]) -> None:
    """Run a stage for DVC; in the first of the processes that share it."""
    from pipeline.runtime.run_plan import StageOfRun  # noqa: PLC0415  (the handlers come first)

    stage = StageOfRun(os.environ["DVC_STAGE"], _START)
    main()
    stage.finish()
