"""Networks of a user's own, in the current folder's pipeline/networks/."""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

import pipeline.networks
from pipeline.commands import check_networks
from pipeline.models import params
from pipeline.models.spec import InputSpec, ModelSpec

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
RETURNED = "return self.head(self.features(x).mean((2, 3)))"


def changed(old: str, new: str) -> str:
    assert old in FAMILY
    return FAMILY.replace(old, new)


def problem_of_family(code: str, options: Mapping[str, object] = {}, **others: str) -> str | None:
    """What `check` says about a student whose family has this code."""
    images = InputSpec(3, 16, [0.5] * 3, [0.2] * 3)
    with families_here(mine=code, **others):
        spec = ModelSpec("mine", "small", options, ["ant", "bee"], images)
        return check_networks.problem_of(spec, is_trained=True)


@contextmanager
def families_here(**code: str) -> Iterator[None]:
    """Take the files of the current folder's pipeline/networks/, too, with this code by name."""
    shipped, here = params.FAMILIES, Path.cwd()
    folder = Path("pipeline/networks").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for path in shipped.glob("*.py"):  # so that params.yaml may name them
        (folder / path.name).symlink_to(path)
    for name, text in code.items():
        (folder / f"{name}.py").write_text(text, "utf-8")
    importlib.invalidate_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.syspath_prepend(Path.cwd())  # as `python -m` does
        patch.setattr(params, "FAMILIES", folder)
        patch.setattr(pipeline.networks, "__path__", [str(shipped), str(folder)])
        before = set(sys.modules)
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(here):
                    del sys.modules[name]
