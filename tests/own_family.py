"""Networks of a user's own, in the current folder's pipeline/networks/."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pipeline.networks
from pipeline.models import params

#: A family that is right; tests replace a part of it.
FAMILY = """
from torch import nn

def build(network, num_classes, in_channels):
    return Own(num_classes, in_channels)

class Own(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.features = nn.Conv2d(in_channels, 4, 3)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))
"""


@contextmanager
def families_here(**code: str) -> Iterator[None]:
    """Take the files of the current folder's pipeline/networks/, too, with this code by name."""
    shipped = params.FAMILIES
    folder = Path("pipeline/networks").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for path in shipped.glob("*.py"):
        (folder / path.name).symlink_to(path)
    for name, text in code.items():
        (folder / f"{name}.py").write_text(text, "utf-8")
    importlib.invalidate_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.syspath_prepend(Path.cwd())  # as `python -m` does
        patch.setattr(params, "FAMILIES", folder)
        patch.setattr(pipeline.networks, "__path__", [str(shipped), str(folder)])
        try:
            yield
        finally:
            for name in code:
                sys.modules.pop(f"pipeline.networks.{name}", None)
