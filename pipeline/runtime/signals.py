"""How a command ends before its time: on Ctrl-C or SIGTERM with one line, and with what started it.

Every command imports this first, for the modules after it take seconds to load. Contract code: an
edit here runs everything again.
"""

import atexit
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

#: Where a command goes on that is run again.
GOES_ON = {
    "pipeline.stages.teacher": "after its last finished epoch",
    "pipeline.stages.student": "after its last finished epoch",
    "pipeline.stages.baseline": "after its last finished epoch",
    "pipeline.stages.soft_targets": "after its last finished shard",
    "pipeline.commands.train_students": "with the trainings that are not finished",
}
#: In the environment of what `pipeline.commands.train_students` starts: its process.
STUDENTS = "TEACH_ONCE_STUDENTS"
#: In the environment of the processes that share a stage: the process that started them.
LAUNCHER = "TEACH_ONCE_LAUNCHER"

#: Files and folders that are being written, under their temporary names.
unfinished: set[Path] = set()


def _command() -> str | None:
    """The command of ours that this process runs, if it is one."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None and spec.name.startswith("pipeline.") else None


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    """At once, whatever is being done: an exception could be lost where none is expected."""
    for each in (signal.SIGINT, signal.SIGTERM):  # once is enough
        signal.signal(each, signal.SIG_IGN)
    launcher = os.environ.get(LAUNCHER, str(os.getpid()))
    if launcher == str(os.getpid()) and os.environ.get("RANK", "0") == "0":
        goes_on = GOES_ON.get(_command() or "")
        rest = f"run the same again: it goes on {goes_on}" if goes_on else "run the same again"
        line = f"interrupted; nothing half-written is kept, {rest}\n"
        # Not by `print`, which refuses where it was itself interrupted; below a progress bar.
        with suppress(OSError):
            os.write(2, ("\n" * os.isatty(2) + line).encode())
    _leave(128 + signum)


def _leave(code: int) -> NoReturn:
    """End this process, without what would stay behind."""
    try:
        for path in list(unfinished):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if multiprocessing := sys.modules.get("multiprocessing"):
            for worker in multiprocessing.active_children():
                worker.terminate()
    finally:
        os._exit(code)


def _let_end() -> None:
    """When all is done and Python clears up, which takes it tenths of a second after torch: from
    then on no handler is called, and a signal would end it as if it had failed."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is _end:
            signal.signal(signum, signal.SIG_IGN)


def _as_usual() -> None:
    """In a process that this one forks: Python's own handling."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with(lives: Callable[[], bool]) -> None:
    """End this process when what started it no longer lives, however that ended."""

    def watch() -> None:
        while lives():
            time.sleep(0.2)
        _leave(1)

    threading.Thread(target=watch, daemon=True).start()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def handle_in_commands() -> None:
    """Install the handlers if this process runs a command of the pipeline."""
    if _command() is None:
        return
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as `nohup` and `&` want it
            signal.signal(signum, _end)
    atexit.register(_let_end)  # the first that is registered is the last that is called
    os.register_at_fork(after_in_child=_as_usual)
    if "DVC_STAGE" in os.environ or "RANK" in os.environ:
        # DVC, or torchrun. A launcher of ours may have ended before this: then the parent is
        # another one by now.
        parent = int(os.environ.get(LAUNCHER, os.getppid()))
        _end_with(lambda: os.getppid() == parent)
    if students := os.environ.get(STUDENTS):
        _end_with(lambda: _runs(int(students)))
