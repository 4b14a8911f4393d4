"""Mend what a killed DVC has left, and would stop every later one.

python -m pipeline.commands.repair_dvc

DVC notes in `.dvc/tmp/rwlock` what each of its processes reads and writes. Notes of processes that
are gone it removes by itself. But it writes the file in place, and a kill within that millisecond
leaves what it refuses to read; and a process that was killed together with its parent is not gone
until process 1 has collected it, which in a container may be never.
"""

from pipeline.runtime.command import run_command

import argparse
import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline.runtime.files import write_json

NOTES, GUARD = Path(".dvc/tmp/rwlock"), Path(".dvc/tmp/rwlock.lock")


def mend_notes() -> str | None:
    """Remove the notes if they are cut off, or what they hold of processes that have ended; what
    was done.

    A DVC that is writing them holds the guard, and so they are let alone."""
    if not NOTES.exists():
        return None
    with open(GUARD, "a", encoding="utf-8") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        try:
            notes = json.loads(NOTES.read_bytes())
            living = _without_ended(notes)
        except (ValueError, AttributeError, KeyError, TypeError):
            NOTES.unlink()
            return f"`{NOTES}`, which a killed DVC had left cut off, is removed"
        if living == notes:
            return None
        write_json(NOTES, living)
        return f"`{NOTES}` no longer names processes that were killed and are not collected yet"


def _without_ended(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Many processes may read a path, one may write it."""
    readers = {
        path: [process for process in processes if not _ended(process["pid"])]
        for path, processes in notes.get("read", {}).items()
    }
    writers = notes.get("write", {}).items()
    living = {
        "read": {path: processes for path, processes in readers.items() if processes},
        "write": {path: process for path, process in writers if not _ended(process["pid"])},
    }
    return {mode: living[mode] for mode in notes}


def _ended(process: int) -> bool:
    """Whether it is a zombie; those that are gone are DVC's to find."""
    try:
        return psutil.Process(int(process)).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def main() -> None:
    argparse.ArgumentParser(
        "python -m pipeline.commands.repair_dvc", description=__doc__
    ).parse_args()
    if done := mend_notes():
        print(done)


if __name__ == "__main__":
    run_command(main)
