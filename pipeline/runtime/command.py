"""Run a command's `main`; on a signal or a user's mistake, exit with one message, no traceback.

Every command imports this module first: importing it installs the signal handlers, and the modules
after it take seconds to load. (Ruff's `isort` settings in pyproject.toml put it first.) Its own
first import is `interpreter`: the modules after that need the project's Python.
"""

import os
import sys
import time
from collections.abc import Callable

from pipeline.runtime import interpreter, signals  # noqa: F401  (importing it checks Python)
from pipeline.runtime.errors import UserError

_START = time.perf_counter()

signals.handle_in_commands()


def run_command(main: Callable[[], None]) -> None:
    """Call `main`. On a `UserError`, a failing disk or an interruption, print one message and exit
    with a code other than 0. For a stage that DVC runs, first print what is ahead of the run."""
    try:
        if "DVC_STAGE" in os.environ and "RANK" not in os.environ:
            _run_stage(main)
        else:
            main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        problem = f"`{error.filename}`: {error.strerror}" if error.filename else str(error)
        sys.exit(f"error: {problem}. Nothing half-written is kept; fix this and run again.")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _run_stage(main: Callable[[], None]) -> None:
    """Run a stage for DVC; in the first of the processes that share it."""
    from pipeline.runtime.run_plan import StageOfRun  # noqa: PLC0415  (the handlers come first)

    stage = StageOfRun(os.environ["DVC_STAGE"], _START)
    main()
    stage.finish()
