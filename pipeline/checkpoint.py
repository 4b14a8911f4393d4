"""Networks on disk: weights in safetensors, and a JSON that rebuilds the network and its input.

Contract code: an edit here runs the teacher again. Nothing here executes pickled code.
"""

import hashlib
import importlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.dataset import Dataset
from pipeline.errors import UserError, did_you_mean
from pipeline.files import canonical_json, read_json, sha256_of_file, write_json
from pipeline.params.network import NetworkParams

FORMAT_VERSION = 1
TEACHER = Path("models/teacher")
WEIGHTS, DESCRIPTION = "weights.safetensors", "network.json"

_SHOWN = 10  # keys of each kind in a message
_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class InputSpec:
    """What a network does to a view before its first layer."""

    channels: int
    size: int  # pixels
    mean: Sequence[float]  # per channel, of pixels in [0, 1]
    std: Sequence[float]

    def apply(self, views: Tensor) -> Tensor:
        """[B, C, H, W] uint8 -> [B, C, size, size] float32, normalised, channels last in memory."""
        mean = _per_channel(self.mean, views.device)
        scale = 1 / (255 * _per_channel(self.std, views.device))
        pixels = views.to(torch.float32, memory_format=torch.channels_last)
        if views.shape[-1] != self.size:
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        return (pixels - 255 * mean) * scale


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """[1, C, 1, 1] float32, filled on the device: a copy to it would wait for its queue."""
    return torch.stack([torch.full((1, 1), v, device=device) for v in values])[None]


@dataclass(frozen=True)
class Description:
    """Everything but the weights that it takes to rebuild a network."""

    family: str
    network: str
    options: Mapping[str, Any]
    class_names: Sequence[str]
    input: InputSpec

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def describe(family: str, params: NetworkParams, dataset: Dataset) -> Description:
    """A network for the dataset's classes; its input defaults to the images as they are.

    Raises:
        UserError: `mean` or `std` has not one value per channel.
    """
    for name, values in (("mean", params.mean), ("std", params.std)):
        if values is not None and len(values) != dataset.channels:
            raise UserError(
                f"network `{params.name}`: `{name}` has {len(values)} values; expected "
                f"{dataset.channels}, one per channel of the dataset."
            )
    return Description(
        family=family,
        network=params.name,
        options=params.options,
        class_names=dataset.class_names,
        input=InputSpec(
            channels=dataset.channels,
            size=params.input_size or dataset.image_size,
            mean=params.mean or dataset.mean,
            std=params.std or dataset.std,
        ),
    )


def build(description: Description) -> nn.Module:
    """The network with fresh weights (from torch's global generator), tried on one blank image.

    Raises:
        UserError: the family cannot be imported, it knows no such network or option, or the
            network cannot take its input.
    """
    family, name, spec = description.family, description.network, description.input
    try:
        module = importlib.import_module(f"pipeline.networks.{family}")
    except ImportError as error:
        raise UserError(
            f"family `{family}` cannot be imported from pipeline/networks ({error})."
        ) from None
    try:
        network = module.build(
            name, description.num_classes, spec.channels, **dict(description.options)
        )
    except TypeError as error:
        raise UserError(
            f"network `{name}` of family `{family}` does not take the options "
            f"{dict(description.options)}: {error}."
        ) from None
    network = network.to(memory_format=torch.channels_last)
    _try_on_blank_image(network, description)
    return network


def _try_on_blank_image(network: nn.Module, description: Description) -> None:
    spec, expected = description.input, [1, description.num_classes]
    network.eval()
    try:
        with torch.inference_mode():
            logits = network(torch.zeros(1, spec.channels, spec.size, spec.size))
    except RuntimeError as error:
        raise UserError(
            f"network `{description.network}` cannot take {spec.channels} x {spec.size} x "
            f"{spec.size} pixels ({_first_line(error)}). Set a larger `input_size` for it."
        ) from None
    if not isinstance(logits, Tensor) or list(logits.shape) != expected:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"network `{description.network}` answers one image with {found}; expected logits "
            f"{expected}."
        )


def save(directory: Path, network: nn.Module, description: Description) -> None:
    """Write weights and description. Equal networks give equal bytes."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    save_file(state, directory / WEIGHTS)
    write_json(
        directory / DESCRIPTION,
        {
            "format_version": FORMAT_VERSION,
            **asdict(description),
            "weights_sha256": sha256_of_file(directory / WEIGHTS),
        },
    )


def load(directory: Path, *, made_by: str) -> tuple[nn.Module, Description]:
    """What `save` wrote.

    Raises:
        UserError: absent, of another format version, or weights that are not the described ones.
    """
    content = _read_description(directory, made_by)
    if sha256_of_file(directory / WEIGHTS) != content["weights_sha256"]:
        raise UserError(
            f"`{directory / WEIGHTS}` is not the file that `{DESCRIPTION}` beside it describes. "
            f"Run `{made_by}`."
        )
    description = Description(
        family=content["family"],
        network=content["network"],
        options=content["options"],
        class_names=content["class_names"],
        input=InputSpec(**content["input"]),
    )
    network = build(description)
    _load_state(network, load_file(directory / WEIGHTS), directory / WEIGHTS)
    return network, description


def fingerprint(directory: Path, *, made_by: str) -> str:
    """Of the network, its input and its weights, from the description alone."""
    content = _read_description(directory, made_by)
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _read_description(directory: Path, made_by: str) -> dict[str, Any]:
    content = read_json(directory / DESCRIPTION, made_by=made_by)
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"`{directory / DESCRIPTION}` has format version {content.get('format_version')}; "
            f"expected {FORMAT_VERSION}. Run `{made_by}`."
        )
    return content


def load_foreign_weights(network: nn.Module, path: Path) -> None:
    """Load a checkpoint made elsewhere: a state dict, bare or under `state_dict` or `model`,
    with or without the prefixes of DataParallel and torch.compile.

    Raises:
        UserError: absent, unreadable, pickled code (refused unexecuted), or other keys or shapes.
    """
    if not path.is_file():
        raise UserError(
            f"`{path}` is not a file; `weights: checkpoint` needs one. Put the checkpoint there, "
            "or name it in `teacher.checkpoint`."
        )
    _load_state(network, _unwrapped(_read_foreign(path), path), path)


def _read_foreign(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"`{path}` holds pickled objects, which could run code, and was not loaded "
            f"({_first_line(error)}). Save `model.state_dict()` alone, or safetensors."
        ) from None
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(
            f"`{path}` is not a checkpoint that can be read ({_first_line(error)}). "
            "Expected a PyTorch state dict (.pt, .pth, .th) or safetensors."
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise UserError(
            f"`{path}` is not a state dict; expected a mapping from names to tensors, bare or "
            f"under {' or '.join(f'`{w}`' for w in _WRAPPERS)}."
        )
    state = dict(content)
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _load_state(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load every tensor, or say which do not fit."""
    own = network.state_dict()
    # Batch norm's step counters came late to PyTorch: old checkpoints lack them.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    reshaped = [k for k in state if k in own and state[k].shape != own[k].shape]
    lines = [
        *_listed(
            missing, lambda k: f"missing `{k}` {list(own[k].shape)}{did_you_mean(k, unexpected)}"
        ),
        *_listed(unexpected, lambda k: f"unexpected `{k}` {list(state[k].shape)}"),
        *_listed(
            reshaped,
            lambda k: f"`{k}` is {list(state[k].shape)}; expected {list(own[k].shape)}",
        ),
    ]
    if lines:
        raise UserError(
            f"`{path}` does not fit the network:\n  "
            + "\n  ".join(lines)
            + "\nName the network that the checkpoint was made for, with its options."
        )
    network.load_state_dict(state, strict=False)


def _listed(keys: list[str], line: Any) -> list[str]:
    more = [f"... and {len(keys) - _SHOWN} more like it"] if len(keys) > _SHOWN else []
    return [line(key) for key in keys[:_SHOWN]] + more
