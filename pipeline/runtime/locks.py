"""One run at a time in a scratch folder."""

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.runtime.errors import UserError

FOLDER = Path(".scratch/running")
_PATIENCE = 5  # seconds: the last process of a killed run may be about to end


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock the folder, or refuse to run while another run holds it. The system releases the lock
    when the process ends, even if it is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", timeout=_PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another run of this stage has locked `{folder}`; expected none. Wait until it ends, "
            "or stop it, and run the stage again."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
            raise
    try:
        yield
    finally:
        lock.release()


def only_run_of(stage: str) -> AbstractContextManager[None]:
    """Refuse to run while another run of a stage, by DVC's name, has not ended: for stages that
    keep no scratch folder."""
    return exclusive(FOLDER / stage)
