"""Finished shards outside DVC's outputs, so that a killed run goes on where it was.

A folder of scratch is named after everything that defines its bytes: nothing of other inputs or
other code is ever reused. Contract code: an edit here runs the teacher again.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import PIL
import torch

from pipeline.errors import UserError
from pipeline.files import canonical_json, sha256_of_file
from pipeline.soft_targets import FORMAT_VERSION, Contents

SCRATCH = Path(".scratch/soft_targets")
_PACKAGE = Path(__file__).parent


def folder(contents: Contents, batch_size: int, device: torch.device) -> Path:
    """Where the shards of these contents are kept while the store is made, and after."""
    defining = {
        "format_version": FORMAT_VERSION,
        **contents.identity(),
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "hdf5": h5py.version.hdf5_version,
            "scipy": version("scipy"),  # which is loaded for policies that mix alone
            "pillow": PIL.__version__,  # resizes, and decodes encoded images
        },
        "code": _loaded_code(),
    }
    return SCRATCH / hashlib.sha256(canonical_json(defining).encode()).hexdigest()


def _loaded_code() -> dict[str, str]:
    """SHA-256 of every file of ours that this process has loaded, the teacher's network too."""
    files = {Path(m.__file__) for m in sys.modules.values() if getattr(m, "__file__", None)}
    return {
        str(path.relative_to(_PACKAGE)): sha256_of_file(path)
        for path in files
        if path.is_relative_to(_PACKAGE) and path.suffix == ".py"
    }


@contextmanager
def reserved() -> Iterator[None]:
    """Keep other runs out of the scratch; the system lifts this when the process ends, however.

    Raises:
        UserError: another run is writing there.
    """
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with open(SCRATCH / "lock", "w", encoding="utf-8") as file:
        for attempt in range(20):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # perhaps a killed run's last process, about to end
                if attempt == 19:
                    raise UserError(
                        f"another run of this stage is writing to `{SCRATCH}`; expected none. "
                        "Wait for it, or end it, and run the stage again."
                    ) from None
                time.sleep(0.25)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                    raise
                break  # a file system without locks
        yield


def place_in(directory: Path, shards: Iterator[Path]) -> None:
    """Put shards into a directory: as hard links, or as copies where there are none."""
    for shard in shards:
        target = directory / shard.name
        try:
            os.link(shard, target)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            shutil.copyfile(shard, target)


def remove_others(kept: Path) -> None:
    """Remove the scratch of other inputs, and what killed runs left half-written in this."""
    for path in SCRATCH.iterdir():
        if path.is_dir() and path != kept:
            shutil.rmtree(path, ignore_errors=True)
    for path in kept.glob(".*.partial"):
        path.unlink(missing_ok=True)
