"""Every network of a library is built, saved, loaded and evaluated.

At 32 pixels, or the smallest size above that it takes.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from pipeline.models import checkpoint
from pipeline.models.spec import InputSpec, ModelSpec, build, native_input
from pipeline.runtime.errors import UserError

SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 288, 384)


def build_small(family: str, network: str) -> tuple[nn.Module, ModelSpec]:
    for size in SIZES:
        spec = InputSpec(3, size, [0.5] * 3, [0.2] * 3)
        description = ModelSpec(family, network, {}, ["ant", "bee", "cat"], spec)
        try:
            return build(description), description
        except UserError as error:
            refusal = error
    raise refusal


def check_saved_and_loaded(family: str, network: str, folder: Path) -> None:
    torch.manual_seed(0)
    built, spec = build_small(family, network)
    checkpoint.save(folder, built, spec)
    torch.manual_seed(1)
    again, _ = checkpoint.load(folder, produced_by="-")
    size = spec.input.size
    views = spec.input.apply(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    with torch.inference_mode():
        logits = built.eval()(views)
        assert torch.equal(again.eval()(views), logits)
    assert logits.isfinite().all()
    if (native := native_input(family, network)) is not None:
        assert native.channels == 3


@pytest.mark.slow
@pytest.mark.parametrize("network", torchvision.models.list_models(module=torchvision.models))
def test_every_network_of_torchvision_is_saved_and_loaded(tmp_path, network):
    check_saved_and_loaded("torchvision", network, tmp_path)


def modules_of_timm() -> Iterator[str]:
    """timm's files, each a family of networks."""
    timm = pytest.importorskip("timm", reason="the extra `timm` is not installed")
    yield from timm.list_modules()


@pytest.mark.slow
def test_the_smallest_network_of_each_family_of_timm_is_saved_and_loaded(tmp_path):
    timm = pytest.importorskip("timm", reason="the extra `timm` is not installed")
    for module in sorted(timm.list_modules()):
        networks = timm.list_models(module=module)
        if networks:
            check_saved_and_loaded("timm", min(networks, key=parameters_of_timm), tmp_path)


def parameters_of_timm(network: str) -> int:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        try:
            return sum(p.numel() for p in timm.create_model(network).parameters())
        except NotImplementedError:  # it computes something when it is built
            return 2**62
