"""Every classification network of torchvision, by torchvision's own name."""

from collections.abc import Sequence
from typing import Any

import torchvision
from torch import nn

from pipeline.errors import UserError, did_you_mean

#: They classify twice in training unless told not to.
_WITH_AUXILIARY_HEADS = {"googlenet", "inception_v3"}


def pretrained_input(network: str) -> tuple[int, Sequence[float], Sequence[float]]:
    """Side in pixels, mean and std of the default weights' own preprocessing, whose central crop is
    the square image that networks get here.

    Two networks turn ImageNet's normalisation into pixels in -1 to 1 themselves, when torchvision
    builds them with weights; here they get such pixels.
    """
    preset = torchvision.models.get_model_weights(network).DEFAULT.transforms()
    if network in _WITH_AUXILIARY_HEADS:
        return preset.crop_size[0], [0.5] * 3, [0.5] * 3
    return preset.crop_size[0], preset.mean, preset.std


def build(network: str, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    """`options` go to torchvision's constructor, as in `{width_mult: 0.5}`."""
    known = torchvision.models.list_models(module=torchvision.models)
    if network not in known:
        raise UserError(
            f"family `torchvision` has no network `{network}`"
            f"{did_you_mean(network, known) or '.'} Known: {', '.join(known)}."
        )
    if network in _WITH_AUXILIARY_HEADS:
        options = {"aux_logits": False, "init_weights": True, **options}
    module = torchvision.models.get_model(network, weights=None, num_classes=num_classes, **options)
    if in_channels != 3:
        _replace_first_convolution(module, in_channels)
    return module


def _replace_first_convolution(network: nn.Module, in_channels: int) -> None:
    name, first = next(
        (name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)
    )
    replacement = nn.Conv2d(
        in_channels,
        first.out_channels,
        first.kernel_size,
        first.stride,
        first.padding,
        first.dilation,
        first.groups,
        first.bias is not None,
        first.padding_mode,
    )
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, replacement)
