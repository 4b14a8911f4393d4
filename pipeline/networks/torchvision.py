"""Every classification network of torchvision, by torchvision's name."""

import copy
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from pipeline.runtime.errors import UserError, did_you_mean

#: Networks with auxiliary heads in training: the heads' names, and their weight in the loss
#: (Szegedy et al. 2015, arXiv:1409.4842, section 5; 2016, arXiv:1512.00567, in its authors' code).
_WITH_AUXILIARY_HEADS = {
    "googlenet": (("aux1", "aux2"), 0.3),
    "inception_v3": (("AuxLogits",), 0.4),
}


def pretrained_input(network: str) -> tuple[int, Sequence[float], Sequence[float]]:
    """Side in pixels, mean and std of the default weights' preprocessing. Its central crop is the
    square image that `prepare` writes.

    Built with weights by torchvision, two networks turn ImageNet's normalisation into pixels in
    -1 to 1 themselves. Here they get such pixels.
    """
    _check_known(network)
    preset = torchvision.models.get_model_weights(network).DEFAULT.transforms()
    if network in _WITH_AUXILIARY_HEADS:
        return preset.crop_size[0], [0.5] * 3, [0.5] * 3
    return preset.crop_size[0], preset.mean, preset.std


def build(network: str, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    """Build a network. `options` go to torchvision's constructor: `{width_mult: 0.5}`."""
    _check_known(network)
    if network in _WITH_AUXILIARY_HEADS:
        if "aux_logits" in options:
            raise UserError(
                f"`options` of network `{network}` set `aux_logits`; training always has the "
                "auxiliary heads, and nothing else does. Remove the option."
            )
        options = {"aux_logits": False, "init_weights": True, **options}
    module = torchvision.models.get_model(network, weights=None, num_classes=num_classes, **options)
    if in_channels != 3:
        _replace_first_convolution(module, in_channels)
    return module


@contextmanager
def auxiliary_heads(module: nn.Module, network: str, num_classes: int, size: int) -> Iterator[None]:
    """Train with the network's auxiliary heads (teacher/auxiliary_heads.py) while open. If the
    images are too small for them, print so and train without."""
    names, weight = _WITH_AUXILIARY_HEADS.get(network, ((), 0.0))
    if not names:
        yield
        return
    with_heads = torchvision.models.get_model(
        network, weights=None, num_classes=num_classes, aux_logits=True, init_weights=True
    )
    device = next(module.parameters()).device
    for name in names:
        setattr(module, name, getattr(with_heads, name).to(device))

    def keep(_module: nn.Module, _inputs: object, outputs: Any) -> Tensor:
        if isinstance(outputs, Tensor):
            return outputs
        module.auxiliary_logits = [(weight, logits) for logits in outputs[1:]]
        return outputs[0]

    hook = module.register_forward_hook(keep)
    module.aux_logits = True
    try:
        if not _trains_at(module, size):
            print(f"  {size} pixels are too few for the auxiliary heads of {network}: none is used")
            _remove(module, names)
        yield
    finally:
        _remove(module, names)
        hook.remove()


def _remove(module: nn.Module, names: Sequence[str]) -> None:
    module.aux_logits = False
    module.auxiliary_logits = []
    for name in names:
        setattr(module, name, None)


def _trains_at(module: nn.Module, size: int) -> bool:
    channels = next(m for m in module.modules() if isinstance(m, nn.Conv2d)).in_channels
    device = next(module.parameters()).device
    trial = copy.deepcopy(module).train()  # a pass in training moves batch norm's statistics
    try:
        with torch.no_grad():
            trial(torch.zeros(2, channels, size, size, device=device))
    except (RuntimeError, ValueError):
        return False
    return True


def pretrained_state(network: str) -> tuple[dict[str, Tensor], Sequence[str]]:
    """Load the default weights' tensors, without auxiliary heads, and the names of their classes,
    from torch's hub cache; downloads them into it if they are not there.

    Raises:
        UserError: the download fails, or the file is damaged.
    """
    weights = torchvision.models.get_model_weights(network).DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        state = torch.hub.load_state_dict_from_url(
            weights.url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError, EOFError, HTTPException, pickle.UnpicklingError) as error:
        problem = "cannot be read" if path.exists() else "cannot be downloaded"
        raise UserError(
            f"the pretrained weights of `{network}` {problem} ({error}). Download "
            f"{weights.url} yourself, and put it at `{path}`."
        ) from None
    names, _ = _WITH_AUXILIARY_HEADS.get(network, ((), 0.0))
    without_heads = {k: v for k, v in state.items() if k.partition(".")[0] not in names}
    return without_heads, weights.meta["categories"]


def _check_known(network: str) -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    if network not in known:
        raise UserError(
            f"family `torchvision` has no network `{network}`"
            f"{did_you_mean(network, known) or '.'} Known: {', '.join(known)}."
        )


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
