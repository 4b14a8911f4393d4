"""What a network is, apart from its weights; and building it."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any

import pydantic
import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.prepared.dataset import Dataset
from pipeline.models.family import build_network, describe_failure, family_file, family_module
from pipeline.models.params import LARGEST_INPUT, Interpolation, NetworkParams
from pipeline.models.raw_logits import advice_for_network, check_raw, some_numbers
from pipeline.runtime.errors import UserError, counted, is_out_of_memory


@pydantic.dataclasses.dataclass(
    frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
)
class InputSpec:
    """What a network does to a view before its first layer."""

    channels: int
    size: Annotated[int, Field(ge=1, le=LARGEST_INPUT)]  # pixels
    mean: Sequence[float]  # per channel, of pixels in [0, 1]
    std: Sequence[Annotated[float, Field(gt=0)]]
    #: Of a network with its own preprocessing of images without augmentation: their shorter side is
    #: resized to `resized_side`, and the middle square of `size` is cut out.
    resize_ratio: Annotated[float, Field(ge=1, le=4)] | None = None
    interpolation: Interpolation | None = None  # of every resizing; None: bilinear

    @pydantic.model_validator(mode="after")
    def _one_for_each_channel(self) -> "InputSpec":
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError("mean and std have not one value for each channel")
        return self

    @property
    def resized_side(self) -> int:
        """Pixels of a whole square image before its middle is cut out."""
        return round(self.size * (self.resize_ratio or 1))

    def apply(self, views: Tensor) -> Tensor:
        """[B, C, H, W] uint8 -> [B, C, size, size] float32, normalised, channels last in memory."""
        return self._normalised(self._resized(views, self.size))

    def apply_clean(self, images: Tensor) -> Tensor:
        """The preprocessing of images without augmentation: as `apply`. With `resize_ratio` they
        are whole square images, out of which the middle is cut."""
        if self.resize_ratio is None:
            return self.apply(images)
        side = self.resized_side
        start = round((side - self.size) / 2)
        middle = slice(start, start + self.size)
        return self._normalised(self._resized(images, side)[:, :, middle, middle])

    def _resized(self, images: Tensor, side: int) -> Tensor:
        pixels = images.to(torch.float32, memory_format=torch.channels_last)
        if images.shape[-1] == side:
            return pixels
        mode = self.interpolation or "bilinear"
        pixels = F.interpolate(pixels, (side, side), mode=mode, antialias=True)
        return pixels.clamp(0, 255) if mode == "bicubic" else pixels  # bicubic overshoots

    def _normalised(self, pixels: Tensor) -> Tensor:
        # On the CPU the constants are computed each time: exports trace these operations.
        constants = _kept_constants if pixels.device.type == "cuda" else _constants
        offset, scale = constants(tuple(self.mean), tuple(self.std), pixels.device)
        return (pixels - offset) * scale


def _constants(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """255 · mean and 1 / (255 · std), [1, C, 1, 1] float32."""
    mean, scale = _per_channel(mean, device), 1 / (255 * _per_channel(std, device))
    return 255 * mean, scale


_kept_constants = cache(_constants)


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """[1, C, 1, 1] float32, filled on the device: a copy to it would wait for its queue."""
    return torch.stack([torch.full((1, 1), v, device=device) for v in values])[None]


@dataclass(frozen=True)
class ModelSpec:
    """Everything that rebuilds a network, except its weights."""

    family: str
    network: str
    options: Mapping[str, Any]
    class_names: Sequence[str]
    input: InputSpec
    #: The pretraining's class number of each class; None if the last layer was not pretrained.
    pretrained_classes: Sequence[int] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def model_spec(
    family: str, params: NetworkParams, dataset: Dataset, *, native: InputSpec | None = None
) -> ModelSpec:
    """The spec of a network for the dataset's classes.

    Its input defaults to `native`, which the network was pretrained with; without it, to the
    dataset's image size, mean and std.

    Raises:
        UserError: `mean` or `std` has not one value per channel, or the pretraining had another
            number of channels.
    """
    if native and native.channels != dataset.channels:
        raise UserError(
            f"network `{params.name}` was pretrained on images of {native.channels} channels, but "
            f"`dataset.channels` is {dataset.channels}: set it to {native.channels}."
        )
    for name, values in (("mean", params.mean), ("std", params.std)):
        if values is not None and len(values) != dataset.channels:
            raise UserError(
                f"network `{params.name}`: `{name}` has {counted(len(values), 'value')}; expected "
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
            resize_ratio=params.resize_ratio or (native.resize_ratio if native else None),
            interpolation=params.interpolation or (native.interpolation if native else None),
        ),
    )


def build(spec: ModelSpec, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Build a network with fresh weights from torch's global generator, and try it on one blank
    image.

    Args:
        state: of a format that stores architecture and weights together (ONNX): the network to
            build. Its family has two functions: `read_file(path)` returns the state, and
            `build_from_file(state, num_classes, in_channels, **options)` the network.

    Raises:
        UserError: the family cannot be imported, it has no such network or option, or the network
            cannot be built, cannot take its input, or returns something else than logits. No other
            exception is raised, whatever the family's code does.
    """
    sizes = (spec.num_classes, spec.input.channels)
    network = build_network(spec.family, spec.network, sizes, spec.options, state)
    with suppress(RuntimeError):  # of weights with five dimensions: the layout affects speed alone
        network.to(memory_format=torch.channels_last)
    _try_on_blank_image(network, spec)
    return network


def native_input(
    family: str, network: str, options: Mapping[str, Any] | None = None
) -> InputSpec | None:
    """The input of the network's published weights; None if the family does not know it.

    A family knows it by a function `pretrained_input(network, **options)` that returns size, mean,
    std and, if it knows them, resize ratio and interpolation; or None.
    """
    pretrained_input = getattr(family_module(family), "pretrained_input", None)
    try:
        native = pretrained_input(network, **(options or {})) if pretrained_input else None
        if native is None:
            return None
        size, mean, std, *resizing = native
        return InputSpec(len(mean), size, list(mean), list(std), *resizing)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"`pretrained_input` of {family_file(family)} fails for network `{network}` "
            f"({describe_failure(error, family)}); expected size, mean, std and, if known, resize "
            "ratio and interpolation, or None."
        ) from None


def _try_on_blank_image(network: nn.Module, spec: ModelSpec) -> None:
    size, expected = spec.input.size, [1, spec.num_classes]
    subject, shape = f"network `{spec.network}`", (1, spec.input.channels, size, size)
    pixels = " x ".join(map(str, shape[1:])) + " pixels"
    network.eval()
    try:
        with torch.inference_mode():
            logits = network(torch.zeros(shape).to(memory_format=torch.channels_last))
            if isinstance(logits, Tensor) and not logits.isfinite().all():
                # A network that divides by an image's contrast fails on a blank one alone.
                noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
                logits = network(noise)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        failure = describe_failure(error, spec.family)
        of_the_size = isinstance(error, RuntimeError | AssertionError | ValueError)
        no_size_helps = isinstance(error, NotImplementedError | RecursionError)
        if no_size_helps or not of_the_size:  # no `forward`, for example
            raise UserError(f"{subject} fails on {pixels}: {failure}.") from None
        in_family = failure.startswith(family_file(spec.family))
        remedy = _remedy_for_size(spec) + ", or correct that line" * in_family
        raise UserError(f"{subject} cannot take {pixels} ({failure}). Set {remedy}.") from None
    if not isinstance(logits, Tensor) or list(logits.shape) != expected:
        actual = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        advice = "Return the logits alone"
        if isinstance(logits, Tensor):
            advice = "Let its last layer have `num_classes` outputs, an argument of `build`"
        raise UserError(
            f"{subject} returns {actual} for one image; expected logits {expected}. {advice}."
        )
    if not logits.isfinite().all():
        numbers = some_numbers(logits[0].float().numpy())
        raise UserError(f"{subject} returns {numbers} for one image; expected finite numbers.")
    check_raw(
        logits.float().numpy(),
        f"network `{spec.network}` returns",
        advice_for_network(spec.family, spec.network),
    )


def _remedy_for_size(spec: ModelSpec) -> str:
    """What to set for a network that cannot take images of the size of its input."""
    native = native_input(spec.family, spec.network, spec.options)
    if native is None:
        return "another `input_size`"
    option, side = getattr(family_module(spec.family), "SIZE_OPTION", None), spec.input.size
    if option in spec.options:
        return f"`input_size: {native.size}`, as its options say"
    other = ""
    if option is not None and side != native.size:
        with suppress(UserError):  # the network has no such option
            build(replace(spec, options={**spec.options, option: side}))
            other = f", or `options: {{{option}: {side}}}`"
    return f"`input_size: {native.size}`, as it was pretrained{other}"
