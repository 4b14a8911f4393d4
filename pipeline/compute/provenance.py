"""What a run's bytes depend on besides its inputs; part of the names of scratch folders."""

import sys
from pathlib import Path

import numpy as np
import PIL
import torch

from pipeline.runtime.files import sha256_of_file

_PACKAGE = Path(__file__).parents[1]
_NO_BYTES = {"runtime/run_plan.py"}  # it says how long stages take, and is loaded under DVC alone


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def library_versions() -> dict[str, str | None]:
    """Of what computes pixels and logits; None for a library that this process has not loaded."""
    loaded = {name: sys.modules.get(name) for name in ("torchvision", "timm", "onnxruntime")}
    return {
        "torch": str(torch.__version__),  # which is of a class of its own
        **{name: getattr(module, "__version__", None) for name, module in loaded.items()},
        "numpy": np.__version__,
        "pillow": PIL.__version__,  # resizes, and decodes encoded images
    }


def loaded_code() -> dict[str, str]:
    """The SHA-256 of every file of the pipeline that this process has loaded, but for what no
    result depends on."""
    files = {getattr(module, "__file__", None) or "" for module in sys.modules.values()}
    ours = [Path(file) for file in files if file.startswith(f"{_PACKAGE}/")]
    names = {str(path.relative_to(_PACKAGE)): path for path in ours if path.suffix == ".py"}
    return {name: sha256_of_file(path) for name, path in names.items() if name not in _NO_BYTES}
