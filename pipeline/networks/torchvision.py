"""Every classification network of torchvision, by torchvision's name."""

import pickle
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import densenet

from pipeline.runtime.errors import UserError, first_line, look_up

#: The auxiliary classifiers of torchvision's networks, which are left out here.
_AUXILIARY_CLASSIFIERS = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}


def pretrained_input(
    network: str, **_: Any
) -> tuple[int, Sequence[float], Sequence[float], float, str]:
    """Side in pixels, mean, std, resize ratio and interpolation of the default weights'
    preprocessing.

    Built with weights by torchvision, two networks turn ImageNet's normalisation into pixels in
    -1 to 1 themselves. Here they get such pixels.
    """
    _check_known(network)
    preset = torchvision.models.get_model_weights(network).DEFAULT.transforms()
    side = preset.crop_size[0]
    resizing = preset.resize_size[0] / side, preset.interpolation.value
    if network in _AUXILIARY_CLASSIFIERS:
        return side, [0.5] * 3, [0.5] * 3, *resizing
    return side, preset.mean, preset.std, *resizing


def build(network: str, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    """Build a network. `options` go to torchvision's constructor: `{width_mult: 0.5}`."""
    _check_known(network)
    if network in _AUXILIARY_CLASSIFIERS:
        if options.get("aux_logits"):
            raise UserError(
                f"`options` of network `{network}` set `aux_logits`; auxiliary classifiers are "
                "not supported. Remove the option."
            )
        options = {"aux_logits": False, "init_weights": True, **options}
    module = torchvision.models.get_model(network, weights=None, num_classes=num_classes, **options)
    if in_channels != 3:
        _replace_first_convolution(module, in_channels)
    return module


def pretrained_state(network: str, **_: Any) -> tuple[dict[str, Tensor], Sequence[str]]:
    """Load the default weights as torchvision does, without auxiliary classifiers, and the names of
    their classes, from torch's hub cache; downloads them into it if they are not there.

    Raises:
        UserError: the download fails, or the file is damaged.
    """
    weights = torchvision.models.get_model_weights(network).DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        # torchvision would execute code in the file: it may have it when it is known to have none.
        torch.hub.load_state_dict_from_url(
            weights.url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError, EOFError, HTTPException, pickle.UnpicklingError) as error:
        problem = "cannot be read" if path.exists() else "cannot be downloaded"
        raise UserError(
            f"the pretrained weights of `{network}` {problem} ({first_line(error)}). Download "
            f"{weights.url} yourself, and put it at `{path}`."
        ) from None
    try:
        with torch.random.fork_rng(devices=[]):
            module = torchvision.models.get_model(network, weights=weights, progress=False)
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            f"the pretrained weights of `{network}` at `{path}` are not those of torchvision "
            f"({first_line(error)}). Remove the file; it is downloaded again."
        ) from None
    state = module.state_dict()
    for key in list(state):
        if key.partition(".")[0] in _AUXILIARY_CLASSIFIERS.get(network, ()):
            del state[key]
    return state, weights.meta["categories"]


def current_state(
    network: str, state: Mapping[str, Tensor], num_classes: int, in_channels: int, **_: Any
) -> dict[str, Tensor]:
    """Rename the tensors of an older version, as torchvision does when it loads its own weights."""
    renamed: dict[str, Tensor] = {}
    if network.startswith("densenet"):
        source = SimpleNamespace(get_state_dict=lambda **_: dict(state))
        densenet._load_state_dict(SimpleNamespace(load_state_dict=renamed.update), source, False)
    return renamed or dict(state)


def _check_known(network: str) -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    look_up("torchvision", network, dict.fromkeys(known))


def _replace_first_convolution(network: nn.Module, in_channels: int) -> None:
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.in_channels = in_channels
    first.weight = nn.Parameter(
        first.weight.new_empty(first.out_channels, in_channels // first.groups, *first.kernel_size)
    )
    first.reset_parameters()
