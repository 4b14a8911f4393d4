"""One run at a time in a scratch folder."""

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.runtime.errors import UserError


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock the folder. The system releases the lock when the process ends, even if it is killed.

    Raises:
        UserError: another run has held the lock for 5 seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as file:
        for _ in range(20):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # the last process of a killed run may be about to end
                time.sleep(0.25)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                    raise
                break  # a file system without locks
        else:
            raise UserError(
                f"another run of this stage is writing to `{folder}`; expected none. Wait until it "
                "ends, or stop it, and run the stage again."
            )
        yield
