"""Run a command's `main`; on a signal or a user's mistake, exit with one message, no traceback.

Every command imports this module first: importing it installs the signal handlers, and the modules
after it take seconds to load. (Ruff's `isort` settings in pyproject.toml put it first.)
"""

import sys
from collections.abc import Callable

from pipeline.runtime import signals
from pipeline.runtime.errors import UserError

signals.handle_in_commands()


def run_command(main: Callable[[], None]) -> None:
    """Call `main`. On a `UserError`, a failing disk or an interruption, print one message and exit
    with a code other than 0."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        problem = f"`{error.filename}`: {error.strerror}" if error.filename else str(error)
        sys.exit(f"error: {problem}. Nothing half-written is kept; fix this and run again.")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
