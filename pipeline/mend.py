"""Remove what a killed DVC left cut off, which would stop every later one.

python -m pipeline.mend

DVC notes in `.dvc/tmp/rwlock` what each of its processes reads and writes. Notes of processes that
have ended it removes by itself; but it writes the file in place, and a kill within that millisecond
leaves what it refuses to read.
"""

from pipeline import interruption  # noqa: F401  (before what takes seconds to load)

# isort: split

import argparse
import fcntl
import json
from pathlib import Path

from pipeline.errors import reported

NOTES, GUARD = Path(".dvc/tmp/rwlock"), Path(".dvc/tmp/rwlock.lock")


def remove_broken_notes() -> bool:
    """Remove the notes if they are cut off; whether they were.

    A DVC that is writing them holds the guard, and so they are let alone."""
    if not NOTES.exists():
        return False
    with open(GUARD, "a", encoding="utf-8") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            json.loads(NOTES.read_bytes())
        except ValueError:
            NOTES.unlink()
            return True
    return False


def main() -> None:
    argparse.ArgumentParser("python -m pipeline.mend", description=__doc__).parse_args()
    if remove_broken_notes():
        print(f"`{NOTES}`, which a killed DVC had left cut off, is removed")


if __name__ == "__main__":
    with reported():
        main()
