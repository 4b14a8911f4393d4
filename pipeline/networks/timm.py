"""Every network of timm, by timm's name, with or without the tag of its weights. Needs the extra
`timm`."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from pipeline.runtime.errors import UserError, did_you_mean, first_line

#: The option that sets the side of the images that a transformer takes, in pixels.
SIZE_OPTION = "img_size"


def build(network: str, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    """Build a network. `options` go to `timm.create_model`: `{img_size: 64}`."""
    _check_known(network)
    return timm.create_model(
        network, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options
    )


def pretrained_input(
    network: str, img_size: int | Sequence[int] | None = None, **_: Any
) -> tuple[int, Sequence[float], Sequence[float], float, str] | None:
    """Side in pixels, mean, std, resize ratio and interpolation of `pretrained_cfg`, as
    `timm.data.create_transform` takes them; the side is `img_size` if the options have it."""
    _check_known(network)
    config = timm.get_pretrained_cfg(network)
    if not config:
        return None
    side = config.input_size[-1]
    # Other modes than `center` show the whole image.
    resized = math.floor(side / config.crop_pct) if config.crop_mode == "center" else side
    interpolation = "bicubic" if config.interpolation == "bicubic" else "bilinear"
    ratio = resized / side
    if img_size is not None:
        side = img_size if isinstance(img_size, int) else img_size[-1]
    return side, config.mean, config.std, ratio, interpolation


def pretrained_state(network: str, **options: Any) -> tuple[Mapping[str, Tensor], Sequence[str]]:
    """Load the weights that timm publishes, and the names of their classes, which are empty unless
    the classes are ImageNet's 1,000. Weights without a classifier have no classes.

    With `options`, timm resamples position embeddings to another `img_size`; other weights that do
    not fit them are returned unchanged.

    Raises:
        UserError: timm publishes none, or they cannot be downloaded.
    """
    _check_known(network)
    config = timm.get_pretrained_cfg(network)
    if config is None or not config.has_weights:
        raise UserError(
            f"timm publishes no weights of `{network}`. Set other `weights`, or choose another."
        )
    file_name = f"timm_{config.architecture}.{config.tag}.safetensors"
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    overlay = {"file": str(path)} if path.is_file() else None
    load = partial(timm.create_model, network, pretrained=True, pretrained_cfg_overlay=overlay)
    try:
        module = load()
    except Exception as error:  # their errors share no class
        source = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
        raise UserError(
            f"the pretrained weights of `{network}` cannot be downloaded ({first_line(error)}). "
            f"Download `model.safetensors` from {source} yourself, and put it at `{path}`."
        ) from None
    if options:
        with suppress(Exception):  # as above
            module = load(**options)
    classes = ImageNetInfo().label_descriptions() if config.num_classes == 1000 else None
    names = [text.partition(",")[0] for text in classes or [""] * config.num_classes]
    return module.state_dict(), names


def current_state(
    network: str, state: Mapping[str, Tensor], num_classes: int, in_channels: int, **options: Any
) -> dict[str, Tensor]:
    """Convert the tensors of an older version or another repository, as timm does when it loads its
    published weights.

    Raises:
        Exception: of many classes: they are no weights of the network.
    """
    config = timm.get_pretrained_cfg(network)
    classifiers = (config and config.classifier) or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    heads = [state[key] for key in (f"{name}.weight" for name in classifiers) if key in state]
    outputs = len(heads[0]) if heads else num_classes
    size = config.input_size[1:] if config else (224, 224)
    overlay = {"num_classes": outputs, "input_size": (in_channels, *size), "custom_load": False}
    states = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = timm.create_model(
                network,
                pretrained=True,
                num_classes=outputs,
                in_chans=in_channels,
                pretrained_cfg_overlay={**overlay, "state_dict": dict(state)},
                **options,
            )
            states.append(module.state_dict())
    if any(not torch.equal(value, states[1][key]) for key, value in states[0].items()):
        raise ValueError("some tensors are not in the state")  # what is random was not loaded
    return states[0]


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
