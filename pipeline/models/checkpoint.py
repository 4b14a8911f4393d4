"""Networks on disk: weights in safetensors, and a JSON that rebuilds the network and its input.

Contract code: an edit here runs the teacher again. Nothing here executes pickled code.
"""

import hashlib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.prepared.dataset import Dataset
from pipeline.models.params import LARGEST_INPUT, NetworkParams
from pipeline.runtime.errors import UserError, did_you_mean
from pipeline.runtime.files import (
    canonical_json,
    read_json,
    recovery_hint,
    sha256_of_file,
    write_bytes,
    write_json,
)

FORMAT_VERSION = 1
TEACHER = Path("models/teacher")
WEIGHTS, DESCRIPTION = "weights.safetensors", "network.json"

_SHOWN = 10  # keys of each kind in a message
_LARGEST_TRIED = 512  # pixels, where a network cannot take its input


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
class ModelSpec:
    """Everything but the weights that it takes to rebuild a network."""

    family: str
    network: str
    options: Mapping[str, Any]
    class_names: Sequence[str]
    input: InputSpec
    #: For each class its number among those of the pretraining, where the network has its rows.
    pretrained_classes: Sequence[int] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class LogitSource:
    """A teacher without a network: logits that another system made."""

    family: str
    network: str
    class_names: Sequence[str]
    path: str
    contents_sha256: str  # of the logits, as the family says


def model_spec(
    family: str, params: NetworkParams, dataset: Dataset, *, pretrained: bool = False
) -> ModelSpec:
    """A network for the dataset's classes; its input defaults to the images as they are, or to
    that of its pretraining.

    Raises:
        UserError: `mean` or `std` has not one value per channel, or the pretraining had other
            channels.
    """
    native = native_input(family, params.name) if pretrained else None
    if native and native.channels != dataset.channels:
        raise UserError(
            f"network `{params.name}` was pretrained on images of {native.channels} channels, but "
            f"`dataset.channels` is {dataset.channels}: set it to {native.channels}."
        )
    for name, values in (("mean", params.mean), ("std", params.std)):
        if values is not None and len(values) != dataset.channels:
            raise UserError(
                f"network `{params.name}`: `{name}` has {len(values)} values; expected "
                f"{dataset.channels}, one per channel of the dataset."
            )
    return ModelSpec(
        family=family,
        network=params.name,
        options=params.options,
        class_names=dataset.class_names,
        input=InputSpec(
            channels=dataset.channels,
            size=params.input_size or (native.size if native else dataset.image_size),
            mean=params.mean or (native or dataset).mean,
            std=params.std or (native or dataset).std,
        ),
    )


def build(description: ModelSpec) -> nn.Module:
    """The network with fresh weights (from torch's global generator), tried on one blank image.

    Raises:
        UserError: the family cannot be imported, it knows no such network or option, or the
            network cannot take its input.
    """
    return _built(description, family_module(description.family).build, description.network)


def build_from_file(description: ModelSpec, state: Mapping[str, Tensor]) -> nn.Module:
    """A network of a family whose files are whole networks: `read_file(path)` reads the state
    that `build_from_file(state, num_classes, in_channels, **options)` is made of."""
    return _built(description, family_module(description.family).build_from_file, state)


def _built(description: ModelSpec, make: Callable[..., nn.Module], first: Any) -> nn.Module:
    name, options = description.network, dict(description.options)
    try:
        network = make(first, description.num_classes, description.input.channels, **options)
    except TypeError as error:
        raise UserError(
            f"network `{name}` of family `{description.family}` does not take the options "
            f"{options}: {error}."
        ) from None
    network = network.to(memory_format=torch.channels_last)
    _try_on_blank_image(network, description)
    return network


def family_module(name: str) -> ModuleType:
    """A family of networks, pipeline/networks/NAME.py.

    Raises:
        UserError: it cannot be imported; names the package that it lacks.
    """
    try:
        return importlib.import_module(f"pipeline.networks.{name}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"family `{name}` needs the Python package `{error.name}`, which is not installed. Run "
            f"`python -m pip install {error.name}` in the project's environment."
        ) from None
    except ImportError as error:
        raise UserError(
            f"family `{name}` cannot be imported from pipeline/networks ({error})."
        ) from None


def native_input(family: str, network: str) -> InputSpec | None:
    """The input that the network's published weights were made with, where its family knows one:
    a function `pretrained_input(network)` that gives size, mean and std, or None."""
    find = getattr(family_module(family), "pretrained_input", None)
    found = find(network) if find else None
    if found is None:
        return None
    size, mean, std = found
    return InputSpec(len(mean), size, list(mean), list(std))


def _try_on_blank_image(network: nn.Module, description: ModelSpec) -> None:
    spec, expected = description.input, [1, description.num_classes]
    network.eval()
    try:
        logits = _answer_to_blank(network, spec.channels, spec.size)
    except _CANNOT_TAKE as error:
        raise UserError(
            f"network `{description.network}` cannot take {spec.channels} x {spec.size} x "
            f"{spec.size} pixels ({_first_line(error)}). {_size_advice(network, spec)}"
        ) from None
    if not isinstance(logits, Tensor) or list(logits.shape) != expected:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"network `{description.network}` answers one image with {found}; expected logits "
            f"{expected}."
        )


#: What networks raise for an input of the wrong size.
_CANNOT_TAKE = (RuntimeError, AssertionError, ValueError)


def _answer_to_blank(network: nn.Module, channels: int, size: int) -> Any:
    with torch.inference_mode():
        return network(torch.zeros(1, channels, size, size))


def _size_advice(network: nn.Module, spec: InputSpec) -> str:
    """The smallest multiple of 8 pixels that the network takes, by trial."""
    for size in range(8, _LARGEST_TRIED + 1, 8):
        try:
            _answer_to_blank(network, spec.channels, size)
        except _CANNOT_TAKE:
            continue
        return f"Set `input_size: {size}` for it, the smallest multiple of 8 that it takes."
    return f"No multiple of 8 up to {_LARGEST_TRIED} does for it: look at its options."


def save(directory: Path, network: nn.Module, description: ModelSpec) -> None:
    """Write weights and description. Equal networks give equal bytes."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    write_bytes(directory / WEIGHTS, serialised(state))
    write_json(
        directory / DESCRIPTION,
        {
            "format_version": FORMAT_VERSION,
            **{key: value for key, value in asdict(description).items() if value is not None},
            "weights_sha256": sha256_of_file(directory / WEIGHTS),
        },
    )


def save_source(directory: Path, source: LogitSource) -> None:
    """Write the description of a teacher without weights, and a file of none: DVC expects one."""
    write_bytes(directory / WEIGHTS, serialised({}))
    write_json(directory / DESCRIPTION, {"format_version": FORMAT_VERSION, **asdict(source)})


def logit_source(directory: Path, *, produced_by: str) -> LogitSource | None:
    """What `save_source` wrote; None where a network is described.

    Raises:
        UserError: absent, or of another format version.
    """
    content = _read_description(directory, produced_by)
    if "contents_sha256" not in content:
        return None
    return _SOURCE.validate_python(content)


def load(directory: Path, *, produced_by: str) -> tuple[nn.Module, ModelSpec]:
    """What `save` wrote.

    Raises:
        UserError: absent, of another format version, weights that are not the described ones, or
            no network at all.
    """
    content = _read_description(directory, produced_by)
    if "weights_sha256" not in content:
        raise UserError(
            f"`{directory}` is no network, but the logits of `{content.get('path')}`; expected a "
            "teacher with weights. Set another `teacher.weights` than logits and run "
            f"`{produced_by}`."
        )
    weights = directory / WEIGHTS
    if not weights.is_file() or sha256_of_file(weights) != content.get("weights_sha256"):
        found = "not the file" if weights.is_file() else "absent; expected the file"
        raise UserError(
            f"`{weights}` is {found} that `{DESCRIPTION}` beside it describes. "
            f"{recovery_hint(weights, produced_by)}"
        )
    description = _DESCRIPTION.validate_python(content)
    state = load_file(directory / WEIGHTS)
    if hasattr(family_module(description.family), "build_from_file"):
        return build_from_file(description, state), description
    network = build(description)
    load_state(network, state, f"`{directory / WEIGHTS}`")
    return network, description


def fingerprint(directory: Path, *, produced_by: str) -> str:
    """Of the network, its input and its weights, or of the logits in their place; from the
    description alone."""
    content = _read_description(directory, produced_by)
    return hashlib.sha256(canonical_json(content).encode(errors="replace")).hexdigest()


_DESCRIPTION, _SOURCE = TypeAdapter(ModelSpec), TypeAdapter(LogitSource)


def _read_description(directory: Path, produced_by: str) -> dict[str, Any]:
    content = read_json(directory / DESCRIPTION, produced_by=produced_by)
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"`{directory / DESCRIPTION}` has format version {content.get('format_version')}; "
            f"expected {FORMAT_VERSION}. Run `{produced_by}`."
        )
    try:
        if "contents_sha256" in content:
            _SOURCE.validate_python(content)
        else:
            _check_input(_DESCRIPTION.validate_python(content).input)
    except ValueError as error:  # pydantic's is one
        raise UserError(
            f"`{directory / DESCRIPTION}` is not as it was written ({_first_line(error)}). Run "
            f"`{produced_by}`."
        ) from None
    return content


def _check_input(spec: InputSpec) -> None:
    """Raises: ValueError: no network has such an input."""
    statistics = [*spec.mean, *spec.std]
    if not (
        1 <= spec.size <= LARGEST_INPUT
        and len(spec.mean) == len(spec.std) == spec.channels
        and all(math.isfinite(value) for value in statistics)
        and min(spec.std) > 0
    ):
        raise ValueError(f"its input is {spec}")


def _first_line(error: Exception) -> str:
    said = str(error).rpartition("WeightsUnpickler error: ")[2]  # after torch's own advice
    return said.strip().partition("\n")[0] or type(error).__name__


def load_state(network: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load every tensor.

    Args:
        what: the state is, for messages.

    Raises:
        UserError: names the tensors that do not fit.
    """
    own = network.state_dict()
    # Batch norm's step counters came late to PyTorch: old checkpoints lack them.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    reshaped = [k for k in state if k in own and state[k].shape != own[k].shape]
    unlike = [k for k in state if k in own and k not in reshaped and not _is_like(state[k], own[k])]
    lines = [
        *_listed(
            missing, lambda k: f"missing `{k}` {list(own[k].shape)}{did_you_mean(k, unexpected)}"
        ),
        *_listed(unexpected, lambda k: f"unexpected `{k}` {list(state[k].shape)}"),
        *_listed(
            reshaped,
            lambda k: f"`{k}` is {list(state[k].shape)}; expected {list(own[k].shape)}",
        ),
        *_listed(
            unlike,
            lambda k: f"`{k}` is {_kind(state[k])}; expected {_kind(own[k])}, or another precision",
        ),
    ]
    if lines:
        raise UserError(
            f"{what} does not fit the network:\n  "
            + "\n  ".join(lines)
            + "\nName the network that the checkpoint was made for, with its options."
        )
    network.load_state_dict(state, strict=False)


def _is_like(value: Tensor, own: Tensor) -> bool:
    """Whether a tensor can be copied as it is, into another precision at most."""
    plain = value.layout == torch.strided and not value.is_meta
    return plain and (value.is_floating_point() or not own.is_floating_point())


def _kind(value: Tensor) -> str:
    form = "" if value.layout == torch.strided else f", {value.layout}"
    return f"{value.dtype}{form}{', without contents' if value.is_meta else ''}".replace(
        "torch.", ""
    )


def _listed(keys: list[str], line: Any) -> list[str]:
    more = [f"... and {len(keys) - _SHOWN} more like it"] if len(keys) > _SHOWN else []
    return [line(key) for key in keys[:_SHOWN]] + more
