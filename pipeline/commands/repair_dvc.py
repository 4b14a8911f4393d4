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
import re
from pathlib import Path

import psutil

RWLOCK, RWLOCK_GUARD = Path(".dvc/tmp/rwlock"), Path(".dvc/tmp/rwlock.lock")


def repair_rwlock() -> str | None:
    """Remove the lock file if it is truncated, or if every process in it has ended, and say so.
    A DVC that is writing the file holds the guard; then nothing is changed."""
    if not RWLOCK.exists():
        return None
    with open(RWLOCK_GUARD, "a", encoding="utf-8") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        content = RWLOCK.read_bytes()
        processes = [int(number) for number in re.findall(rb'"pid": *(\d+)', content)]
        try:
            json.loads(content)
        except ValueError:
            problem = "which a killed DVC had left truncated"
        else:
            if not processes or any(map(_is_living, processes)):
                return None
            problem = "whose processes have ended"
        RWLOCK.unlink()
        return f"removed `{RWLOCK}`, {problem}"


def _is_living(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def main() -> None:
    argparse.ArgumentParser(
        "python -m pipeline.commands.repair_dvc", description=__doc__
    ).parse_args()
    if done := repair_rwlock():
        print(done)


if __name__ == "__main__":
    run_command(main)
