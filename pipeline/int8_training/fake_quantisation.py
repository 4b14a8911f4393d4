"""A network that computes as its int8 file will: fake quantisation by torchao (pt2e).

Each tensor that onnxruntime's static quantiser rounds is rounded here in the forward pass, and the
gradient passes through (Jacob et al. 2018, arXiv:1712.05877; batch norm is folded into the weights
that are rounded, section 3.2).
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.models.spec import ModelSpec
from pipeline.runtime.errors import UserError, first_line

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other parts of torchao, which nothing here uses
        logging.disable(logging.WARNING)
        from torchao.quantization.pt2e import (
            FusedMovingAvgObsFakeQuantize,
            MovingAverageMinMaxObserver,
            MovingAveragePerChannelMinMaxObserver,
            allow_exported_model_train_eval,
            disable_observer,
            enable_observer,
        )
        from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer import (
            QuantizationAnnotation,
            QuantizationSpec,
            Quantizer,
        )
except ImportError as error:
    raise UserError(
        f"`export.int8_training` needs torchao, which cannot be imported ({first_line(error)}). "
        "Run `python -m pip install 'torchao>=0.18'` in the project's environment, or set "
        "`int8_training: none`."
    ) from None
finally:
    logging.disable(logging.NOTSET)

aten = torch.ops.aten
#: Operations with weights, and others whose inputs onnxruntime rounds.
_WITH_WEIGHTS = {
    *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding),
    aten.linear.default,
}
_OTHERS = {
    *(aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor, aten.cat.default),
    *(aten.mean.dim, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default),
}
_EPS = 2**-12  # of a scale


def _fake_quantiser(observer: type, **range_and_scheme: object) -> QuantizationSpec:
    return QuantizationSpec(
        **range_and_scheme,
        observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(
            observer=observer, eps=_EPS
        ),
    )


#: onnxruntime's ranges: 7 bits, symmetric, for each output channel's weights, so that products
#: summed in pairs stay within 16 bits on processors without VNNI; 8 bits for activations.
WEIGHT = _fake_quantiser(
    MovingAveragePerChannelMinMaxObserver,
    dtype=torch.int8,
    quant_min=-64,
    quant_max=63,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
)
ACTIVATION = _fake_quantiser(
    MovingAverageMinMaxObserver,
    dtype=torch.uint8,
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
)


class OnnxruntimeQuantizer(Quantizer):
    """Mark what onnxruntime's static quantiser rounds: the weights of convolutions and linear
    layers, their inputs, and those of sums, products, concatenations and averages."""

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        for node in model.graph.nodes:
            if node.target not in _WITH_WEIGHTS | _OTHERS:
                continue
            inputs = [each for each in node.all_input_nodes if _is_float(each)]
            specs = dict.fromkeys(inputs, ACTIVATION)
            if node.target in _WITH_WEIGHTS:
                specs = {node.args[0]: ACTIVATION, node.args[1]: WEIGHT}
            node.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map=specs, _annotated=True
            )
        return model

    def validate(self, model: torch.fx.GraphModule) -> None:
        pass


def _is_float(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


class FakeQuantized(nn.Module):
    """A network whose forward pass rounds as int8 does. In training it also follows the ranges of
    the activations, as moving averages; in evaluation they stay."""

    def __init__(self, network: nn.Module, spec: ModelSpec):
        """Copy the network and its weights.

        Raises:
            UserError: it cannot be exported by torch, or torchao cannot prepare it.
        """
        super().__init__()
        side, device = spec.input.size, next(network.parameters()).device
        example = torch.zeros(4, spec.input.channels, side, side, device=device)
        example = example.to(memory_format=torch.channels_last)
        batch = ({0: torch.export.Dim("batch")},)
        try:
            with _quiet():
                program = torch.export.export(
                    copy.deepcopy(network).train(), (example,), dynamic_shapes=batch
                )
                self.graph = prepare_qat_pt2e(program.module(), OnnxruntimeQuantizer())
                allow_exported_model_train_eval(self.graph)
        except Exception as error:  # any error of torch, torchao or the network
            raise UserError(
                f"network `{spec.network}` cannot be prepared for int8_training: "
                f"{first_line(error)}. Its file in pipeline/networks/ must compute the same for "
                "every image and batch size, without a Python branch on pixels. Change it, or set "
                "`int8_training: none` in `export` of this student."
            ) from None

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, C, S, S] float32 -> logits [B, num_classes], in float32 even under autocast: bfloat16
        has as few digits as int8."""
        with torch.autocast(inputs.device.type, enabled=False):
            return self.graph(inputs)

    def train(self, mode: bool = True) -> "FakeQuantized":
        super().train(mode)
        self.apply(enable_observer if mode else disable_observer)
        return self


def float_state(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors of a network's state from the state of its `FakeQuantized`."""
    return {key: state[f"graph.{key}"] for key in network.state_dict()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings and graphs that torch and torchao print."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
