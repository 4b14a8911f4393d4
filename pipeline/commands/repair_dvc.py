"""Repair DVC's lock file after a kill; until then it can block every later DVC.

python -m pipeline.commands.repair_dvc

DVC notes in `.dvc/tmp/rwlock` what each of its processes reads and writes, and removes the entries
of processes that are gone. Two cases remain. DVC writes the file in place, so a kill within that
millisecond leaves a truncated file, which DVC refuses to read. And a process that was killed with
its parent is not gone until process 1 has collected it, which in a container may never happen.
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

RWLOCK, RWLOCK_GUARD = Path(".dvc/tmp/rwlock"), Path(".dvc/tmp/rwlock.lock")


def repair_rwlock() -> str | None:
    """Remove the lock file if it is damaged, or its entries of processes that have ended.

    A DVC that is writing the file holds the guard; then nothing is changed.

    Returns:
        what was done, or None.
    """
    if not RWLOCK.exists():
        return None
    with open(RWLOCK_GUARD, "a", encoding="utf-8") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        try:
            entries = json.loads(RWLOCK.read_bytes())
            living = _without_ended(entries)
        except (ValueError, AttributeError, KeyError, TypeError):
            RWLOCK.unlink()
            return f"removed `{RWLOCK}`, which a killed DVC had left truncated"
        if living == entries:
            return None
        write_json(RWLOCK, living)
        return f"removed killed processes that nobody has collected from `{RWLOCK}`"


def _without_ended(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Drop processes that have ended. A path has any number of readers and one writer."""
    readers = {
        path: [process for process in processes if not _is_zombie(process["pid"])]
        for path, processes in entries.get("read", {}).items()
    }
    writers = entries.get("write", {}).items()
    living = {
        "read": {path: processes for path, processes in readers.items() if processes},
        "write": {path: process for path, process in writers if not _is_zombie(process["pid"])},
    }
    return {mode: living[mode] for mode in entries}


def _is_zombie(process: int) -> bool:
    try:
        return psutil.Process(int(process)).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:  # it is gone: DVC removes its entry
        return False


def main() -> None:
    argparse.ArgumentParser(
        "python -m pipeline.commands.repair_dvc", description=__doc__
    ).parse_args()
    if done := repair_rwlock():
        print(done)


if __name__ == "__main__":
    run_command(main)
