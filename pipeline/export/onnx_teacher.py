"""Put the preprocessing of views before the graph of a teacher that is an ONNX file itself."""

import numpy as np
import onnx
import torch
from onnx import compose, helper, shape_inference, version_converter
from torch import Tensor, nn

from pipeline.export.preprocessing import Preprocessing
from pipeline.export.running.onnx_model import LOGITS


class OnnxPreprocessing(nn.Module):
    """What such a teacher's file takes, from [B, C, S, S] uint8."""

    def __init__(
        self, preprocessing: Preprocessing, dtype: np.dtype, *, channels_last: bool, bgr: bool
    ):
        super().__init__()
        self.preprocessing, self.dtype = preprocessing, dtype
        self.channels_last, self.bgr = channels_last, bgr

    def forward(self, image: Tensor) -> Tensor:
        images = self.preprocessing(image)
        if self.bgr:
            images = images.flip(1)
        if self.dtype == np.uint8:
            images = images.round().clamp(0, 255).to(torch.uint8)
        elif self.dtype == np.float16:
            images = images.half()
        return images.permute(0, 2, 3, 1) if self.channels_last else images


def with_preprocessing(
    preprocessing: onnx.ModelProto, graph: onnx.ModelProto, num_classes: int
) -> onnx.ModelProto:
    """Join the preprocessing and the teacher's own graph, whose only output are its logits.

    Args:
        preprocessing: of one input; its output has the name that the joined graph's output gets.

    Raises:
        ValueError, RuntimeError, onnx.checker.ValidationError: the graphs cannot be joined, for
            example because an operation of the teacher's has no newer version.
    """
    weights = {tensor.name for tensor in graph.graph.initializer}
    inputs = [each for each in graph.graph.input if each.name not in weights]
    del graph.graph.input[:]  # old files list the weights, too
    graph.graph.input.extend(inputs)
    version = max(opset_of(preprocessing), opset_of(graph))
    first, second = (
        shape_inference.infer_shapes(model)
        if opset_of(model) == version
        else version_converter.convert_version(model, version)
        for model in (preprocessing, graph)
    )
    first.ir_version = second.ir_version = max(first.ir_version, second.ir_version)
    first = compose.add_prefix(first, "preprocessing/", rename_inputs=False)
    second = compose.add_prefix(second, "teacher/")
    passed = (first.graph.output[0].name, f"teacher/{inputs[0].name}")
    joined = compose.merge_models(first, second, io_map=[passed])
    logits = joined.graph.output[0].name
    joined.graph.node.append(
        helper.make_node("Cast", [logits], [LOGITS], to=onnx.TensorProto.FLOAT)
    )
    del joined.graph.output[:]
    shape = ["batch", num_classes]
    joined.graph.output.append(helper.make_tensor_value_info(LOGITS, onnx.TensorProto.FLOAT, shape))
    return joined


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operations."""
    return next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
