"""One run at a time in a folder of scratch. Contract code: an edit here runs the teacher again."""

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.runtime.errors import UserError


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder; the system lifts this when the process ends, however.

    Raises:
        UserError: another run is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as file:
        for attempt in range(20):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # perhaps a killed run's last process, about to end
                if attempt == 19:
                    raise UserError(
                        f"another run of this stage is writing to `{folder}`; expected none. "
                        "Wait for it, or end it, and run the stage again."
                    ) from None
                time.sleep(0.25)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                    raise
                break  # a file system without locks
        yield
