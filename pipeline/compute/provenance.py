"""What a run's bytes depend on besides its inputs; part of the names of scratch folders."""

import sys
from pathlib import Path

import torch

from pipeline.runtime.files import sha256_of_file

_PACKAGE = Path(__file__).parents[1]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def loaded_code() -> dict[str, str]:
    """The SHA-256 of every file of the pipeline that this process has loaded."""
    files = {Path(m.__file__) for m in sys.modules.values() if getattr(m, "__file__", None)}
    return {
        str(path.relative_to(_PACKAGE)): sha256_of_file(path)
        for path in files
        if path.is_relative_to(_PACKAGE) and path.suffix == ".py"
    }
