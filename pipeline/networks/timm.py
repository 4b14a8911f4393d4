"""Every network of timm, by timm's own name, with or without the tag of its weights.

Needs the extra `timm`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from pipeline.runtime.errors import UserError, did_you_mean


def build(network: str, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    """`options` go to `timm.create_model`, as in `{img_size: 64}`."""
    _check_known(network)
    return timm.create_model(
        network, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options
    )


def pretrained_input(network: str) -> tuple[int, Sequence[float], Sequence[float]] | None:
    """Side in pixels, mean and std of `pretrained_cfg`."""
    _check_known(network)
    config = timm.get_pretrained_cfg(network)
    return (config.input_size[-1], config.mean, config.std) if config else None


def pretrained_state(network: str) -> tuple[dict[str, Tensor], Sequence[str]]:
    """The tensors of the weights that timm publishes, and their classes' names, where those are
    ImageNet's 1,000 (others have none that match a folder).

    Raises:
        UserError: there are none, or they cannot be had.
    """
    _check_known(network)
    config = timm.get_pretrained_cfg(network)
    if config is None or not config.has_weights:
        raise UserError(
            f"timm publishes no weights of `{network}`. Set `weights: train`, or choose another."
        )
    file_name = f"timm_{config.architecture}.{config.tag}.safetensors"
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    overlay = {"file": str(path)} if path.is_file() else None
    try:
        module = timm.create_model(network, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # of the hub's client, the network or the reader: any kind
        source = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the pretrained weights of `{network}` cannot be had ({line}). Get "
            f"`model.safetensors` from {source} by any other way, and put it at `{path}`."
        ) from None
    classes = ImageNetInfo().label_descriptions() if config.num_classes == 1000 else None
    names = [text.partition(",")[0] for text in classes or [""] * config.num_classes]
    return module.state_dict(), names


def _check_known(network: str) -> None:
    name, _, tag = network.partition(".")
    if not timm.is_model(name):
        known = timm.list_models()
        raise UserError(
            f"family `timm` has no network `{name}`{did_you_mean(name, known) or '.'} "
            "`timm.list_models()` lists all of them."
        )
    tagged = timm.list_models(f"{name}.*", pretrained=True)
    if tag and network not in tagged:
        raise UserError(
            f"family `timm` has no weights `{tag}` of `{name}`. Known: {', '.join(tagged)}."
        )
