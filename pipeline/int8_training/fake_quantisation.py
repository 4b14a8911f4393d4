"""A network that rounds as its int8 file will: in its forward pass, while gradients pass through
(Jacob et al. 2018, arXiv:1712.05877).

Each output channel's weights are rounded to 7 bits, symmetrically, and the inputs of convolutions
and linear layers to 8 bits, as the quantiser of the export does. Batch norm needs no folding: it
scales a whole output channel, and such a factor does not change to which steps the weights of that
channel are rounded.

torchao 0.18 (`prepare_qat_pt2e`) is not used: it replaces a batch norm's epsilon and momentum by
1e-5 and 0.1, after the first evaluation a dropout's probability by 0.5, and evaluates a network's
drop path as in training. torch.ao.quantization is deprecated.
"""

import torch
from torch import Tensor, nn

from pipeline.runtime.errors import UserError

WEIGHT_STEPS = 64  # on each side of 0
INPUT_STEPS = 255
RANGE_RATE = 0.01  # of the moving averages of the inputs' ranges, for each step
_SMALLEST_STEP = 2.0**-30
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
RANGE = "int8_input_range"


def round_weight(weight: Tensor) -> Tensor:
    """Round weights, [out, ...], to 129 steps around 0 for each output channel."""
    largest = weight.detach().abs().flatten(1).amax(1)  # [out]
    step = (largest / WEIGHT_STEPS).clamp_min(_SMALLEST_STEP)
    zero = torch.zeros_like(step)  # of int32, torch would read its range, and wait for a GPU
    return torch.fake_quantize_per_channel_affine(
        weight, step, zero, 0, -WEIGHT_STEPS, WEIGHT_STEPS
    )


def round_input(features: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round to 256 steps from `low` to `high`, [] each; what is beyond is clipped."""
    step = ((high - low) / INPUT_STEPS).clamp_min(_SMALLEST_STEP)
    zero = (-low / step).round().clamp(0, INPUT_STEPS).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(features, step, zero, 0, INPUT_STEPS)


class _RoundedWeight:
    """Mixed into the class of a layer: its `weight` is rounded wherever its code reads it. The
    parameter, its name and the state dict stay."""

    @property
    def weight(self) -> Tensor:
        return round_weight(self._parameters["weight"])


def _round_inputs(
    layer: nn.Module, inputs: tuple[Tensor, ...], by_name: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Before a layer's forward pass. In training the range follows the inputs, as a moving average
    that begins with the first batch; in evaluation it stays."""
    features, *others = inputs or [by_name.pop("input")]
    limits = getattr(layer, RANGE)  # [2]
    if layer.training:
        with torch.no_grad():
            now = torch.stack(torch.aminmax(features.detach())).float()
            now = torch.stack([now[0].clamp_max(0), now[1].clamp_min(0)])  # 0 is a step
            seen = (limits != 0).any()
            limits.copy_(torch.where(seen, limits + RANGE_RATE * (now - limits), now))
    return (round_input(features, *limits), *others), by_name


class FakeQuantized(nn.Module):
    """A network whose forward pass rounds; changes the network in place. Its state dict gets the
    range of each layer's inputs."""

    def __init__(self, network: nn.Module, name: str):
        """Round at every convolution and linear layer.

        Args:
            name: of the network, for messages.

        Raises:
            UserError: there are none, or the weights of one are computed from others.
        """
        super().__init__()
        layers = [module for module in network.modules() if isinstance(module, _LAYERS)]
        if not layers:
            raise UserError(
                f"network `{name}` has no convolution or linear layer of torch.nn; "
                "`int8_training` rounds at these. Set `int8_training: none` in `export` of this "
                "student."
            )
        if any(layer._parameters.get("weight") is None for layer in layers):
            raise UserError(
                f"network `{name}` computes the weights of a layer from others (as weight_norm "
                "does); `int8_training` rounds parameters. Set `int8_training: none` in `export` "
                "of this student."
            )
        for layer in layers:
            kind = type(layer)
            layer.__class__ = type(f"Rounded{kind.__name__}", (_RoundedWeight, kind), {})
            layer.register_buffer(RANGE, torch.zeros(2, device=layer._parameters["weight"].device))
            layer.register_forward_pre_hook(_round_inputs, with_kwargs=True)
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, C, S, S] float32 -> logits [B, num_classes], in float32 even under autocast: bfloat16
        has as few digits as int8."""
        with torch.autocast(inputs.device.type, enabled=False):
            return self.network(inputs)


def float_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's own state in the state of its `FakeQuantized`: weights that are not rounded."""
    return {
        key.removeprefix("network."): value
        for key, value in state.items()
        if not key.endswith(f".{RANGE}")
    }
