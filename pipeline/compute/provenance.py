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
    files = {getattr(module, "__file__", None) or "" for module in sys.modules.values()}
    ours = [Path(file) for file in files if file.startswith(f"{_PACKAGE}/")]
    return {
        str(path.relative_to(_PACKAGE)): sha256_of_file(path)
        for path in ours
        if path.suffix == ".py"
    }
