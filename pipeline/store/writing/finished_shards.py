"""Finished shards outside DVC's outputs, so that a killed run goes on where it was.

A folder of scratch is named after everything that defines its bytes: nothing of other inputs or
other code is ever reused. Contract code: an edit here runs the teacher again.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import PIL
import torch

from pipeline.compute.provenance import device_name, loaded_code
from pipeline.runtime import locks
from pipeline.runtime.files import canonical_json
from pipeline.store.format.schema import FORMAT_VERSION, StoreIdentity

SCRATCH = Path(".scratch/soft_targets")


def folder(contents: StoreIdentity, batch_size: int, device: torch.device) -> Path:
    """Where the shards of these contents are kept while the store is made, and after."""
    defining = {
        "format_version": FORMAT_VERSION,
        **contents.identity(),
        "batch_size": batch_size,
        "device": device_name(device),
        "versions": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "hdf5": h5py.version.hdf5_version,
            "scipy": version("scipy"),  # which is loaded for policies that mix alone
            "pillow": PIL.__version__,  # resizes, and decodes encoded images
        },
        "code": loaded_code(),
    }
    return SCRATCH / hashlib.sha256(canonical_json(defining).encode()).hexdigest()


def exclusive() -> AbstractContextManager[None]:
    """Keep other runs out of the scratch: `locks.exclusive`."""
    return locks.exclusive(SCRATCH)


def link_shards(directory: Path, shards: Iterator[Path]) -> None:
    """Put shards into a directory: as hard links, or as copies where there are none."""
    for shard in shards:
        target = directory / shard.name
        try:
            os.link(shard, target)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            shutil.copyfile(shard, target)


def prune(kept: Path) -> None:
    """Remove the scratch of other inputs, and what killed runs left half-written in this."""
    for path in SCRATCH.iterdir():
        if path.is_dir() and path != kept:
            shutil.rmtree(path, ignore_errors=True)
    for path in kept.glob(".*.partial"):
        path.unlink(missing_ok=True)
