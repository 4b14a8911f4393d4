"""Signal handling: exit cleanly on SIGINT and SIGTERM, and when the parent process dies."""

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

from pipeline.runtime.environment import LAUNCHER, REPRO

#: Where each command resumes.
RESUMES = {
    "pipeline.stages.teacher": "after its last finished epoch",
    "pipeline.stages.student": "after its last finished epoch",
    "pipeline.stages.baseline": "after its last finished epoch",
    "pipeline.stages.int8_training": "after its last finished epoch",
    "pipeline.stages.soft_targets": "after its last finished shard",
    "pipeline.commands.repro": "with the unfinished stages",
}

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: Files and folders that are being written, under their temporary names.
unfinished: set[Path] = set()

_process = os.getpid()


def handle_in_commands() -> None:
    """Install the handlers if this process runs a command of the pipeline."""
    if running_command() is None:
        return
    for signum in _SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # `nohup` and `&` ignore it on purpose
            signal.signal(signum, _exit_on_signal)
    atexit.register(_ignore_signals)  # registered first, called last
    os.register_at_fork(after_in_child=_begin_forked)
    if {"DVC_STAGE", "RANK", LAUNCHER} & set(os.environ):
        # DVC, torchrun or a stage of ours started this process. A launcher of ours may have died
        # before this line, and the parent would then be another process.
        parent = int(os.environ.get(LAUNCHER, os.getppid()))
        _exit_unless(lambda: os.getppid() == parent)
    if repro := os.environ.get(REPRO):
        import psutil  # noqa: PLC0415  (takes long; the handlers come first)

        _exit_unless(lambda: psutil.pid_exists(int(repro)))


def running_command() -> str | None:
    """The pipeline's command that this process runs, if any."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None and spec.name.startswith("pipeline.") else None


def _exit_on_signal(signum: int, frame: FrameType | None) -> NoReturn:
    """Exit at once: the interrupted code could swallow an exception."""
    for each in _SIGNALS:  # once is enough
        signal.signal(each, signal.SIG_IGN)
    launcher = os.environ.get(LAUNCHER, str(os.getpid()))
    if launcher == str(os.getpid()) and os.environ.get("RANK", "0") == "0":
        point = RESUMES.get(running_command() or "")
        resumes = f": it resumes {point}" if point else ""
        line = f"interrupted; nothing half-written is kept. Run the same command again{resumes}.\n"
        # `print` would fail if the signal interrupted a `print`. "\n" moves below a progress bar.
        with suppress(OSError):
            os.write(2, ("\n" * os.isatty(2) + line).encode())
    _exit(128 + signum)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there and its own folder is not read-only."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _exit(code: int) -> NoReturn:
    """Remove unfinished files, stop worker processes and exit."""
    try:
        for path in list(unfinished):
            remove(path)
        if multiprocessing := sys.modules.get("multiprocessing"):
            for worker in multiprocessing.active_children():
                worker.terminate()
    finally:
        os._exit(code)


def _ignore_signals() -> None:
    """Ignore signals during interpreter shutdown, so that a finished run does not exit with an
    error. Shutdown takes tenths of a second after torch, and Python calls no handler in it."""
    for signum in _SIGNALS:
        if signal.getsignal(signum) is _exit_on_signal:
            signal.signal(signum, signal.SIG_IGN)


def _begin_forked() -> None:
    """Give a forked process Python's default handlers, and end it when the process that forked it
    has died: a signal can come before `multiprocessing` knows the new process."""
    global _process
    parent, _process = _process, os.getpid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    unfinished.clear()  # the parent writes these
    _exit_unless(lambda: os.getppid() == parent)


def _exit_unless(parent_lives: Callable[[], bool]) -> None:
    """Watch what started this process, and exit when it has died."""

    def watch() -> None:
        while parent_lives():
            time.sleep(0.2)
        _exit(1)

    threading.Thread(target=watch, daemon=True).start()
