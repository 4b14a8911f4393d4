"""End with one message under a Python that is too old, or that lacks the project's packages.

`pipeline.runtime.command` imports this before anything else of ours. A Python of 3.8 can read this
file and every script of a stage or command, so it gets as far as the message.
"""

import sys
from pathlib import Path

OLDEST = (3, 11)
_ENVIRONMENT = Path(".venv")


def this_python():
    """Name the Python that runs: `/usr/bin/python3 (Python 3.9.18)`."""
    return "{} (Python {}.{}.{})".format(sys.executable, *sys.version_info)


def what_to_do():
    """Say how to run the same command in the project's environment."""
    if Path(sys.prefix) == _ENVIRONMENT.absolute():
        return "Set the environment up again: `make --always-make setup`."
    return (
        "Activate the project's environment, `. .venv/bin/activate`, and run the same command "
        "again; or run `make repro`, which sets it up first."
    )


def _explain_missing_package(kind, error, traceback):
    """Name a missing package and the Python that lacks it; else do what Python does."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not issubclass(kind, ModuleNotFoundError) or package in ("", "pipeline"):
        sys.__excepthook__(kind, error, traceback)
        return
    sys.stderr.write(
        f"error: the package `{package}` is missing in {this_python()}; expected the project's "
        f"environment. {what_to_do()}\n"
    )


if sys.version_info < OLDEST:
    sys.exit(
        f"error: {this_python()} runs this command; expected Python {OLDEST[0]}.{OLDEST[1]} or "
        f"newer. {what_to_do()}"
    )
sys.excepthook = _explain_missing_package
