"""Export a trained network to ONNX, with the preprocessing of views inside."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.onnx import ONNXProgram

from pipeline.export.onnx_teacher import OnnxPreprocessing, opset_of, with_preprocessing
from pipeline.export.preprocessing import Preprocessing
from pipeline.export.running.onnx_model import IMAGE, LOGITS, OnnxMetadata
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import UserError, first_line

#: The oldest with an antialiased Resize, which a network with a larger `input_size` than the view
#: needs. More engines support an older opset.
OPSET = 18


#: The captured graphs of networks, by what decides them beside the weights.
Graphs = dict[str, ONNXProgram]


class NotExportable(UserError):
    """There is no file that computes what the network computes."""


class _FromPixels(nn.Module):
    """Preprocessing and network as one module."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing):
        super().__init__()
        self.network, self.preprocessing = network, preprocessing

    def forward(self, image: Tensor) -> Tensor:  # [B, C, S, S] uint8 -> [B, num_classes] float32
        return self.network(self.preprocessing(image)).float()


def to_onnx(
    network: nn.Module, spec: InputSpec, metadata: OnnxMetadata, graphs: Graphs | None = None
) -> bytes:
    """Export to the bytes of an ONNX file. Equal networks give equal bytes.

    Input `image`: [batch, C, S, S] uint8, S = `metadata.image_size`, of any batch size; output
    `logits`: [batch, num_classes] float32. Refuses what torch's exporter refuses, with its reason.

    Args:
        graphs: kept between calls with networks of one family and options, it saves the later
            ones most of their time: they share the first one's graph.
    """
    try:
        with quiet():
            model = _exported(network, spec, metadata, {} if graphs is None else graphs)
    except Exception as error:  # any error of the exporter or of the network
        reason = f"{metadata.described} cannot be exported to ONNX: {_reason(error).rstrip('.')}."
        if not hasattr(network, "graph"):
            reason += (
                " The network must compute the same for every image and batch size, without a "
                "Python branch on pixels, with operations that ONNX has: change its file in "
                "pipeline/networks/, or choose another network."
            )
        raise NotExportable(reason) from None
    _without_traces(model)
    metadata = metadata.model_copy(update={"opset": opset_of(model)})
    model.doc_string = metadata.in_words()
    for key, value in metadata.metadata().items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString(deterministic=True)


def _exported(
    network: nn.Module, spec: InputSpec, metadata: OnnxMetadata, graphs: Graphs
) -> onnx.ModelProto:
    preprocessing = Preprocessing(spec, metadata.image_size)
    graph = getattr(network, "graph", None)  # of a network that is an ONNX file itself
    if graph is not None:
        if network.batch_size is not None:
            raise ValueError(f"its file takes {network.batch_size} images at a time")
        module = OnnxPreprocessing(preprocessing, **network.input_format)
        own = _with_weights(_captured(module, metadata), module)
        return with_preprocessing(own, graph, len(metadata.class_names))
    module = _FromPixels(network, preprocessing).eval()
    for layer in network.modules():  # the exporter takes longer for activations in place
        if hasattr(layer, "inplace"):
            layer.inplace = False
    key = f"{network} {spec} {metadata.image_size} {metadata.channels} {metadata.opset}"
    if key not in graphs:
        graphs[key] = _captured(module, metadata)
    return _with_weights(graphs[key], module)


def _captured(module: nn.Module, metadata: OnnxMetadata) -> ONNXProgram:
    side = metadata.image_size
    # A batch of 1 would fix the batch size.
    example = torch.zeros(2, metadata.channels, side, side, dtype=torch.uint8)
    return torch.onnx.export(
        module,
        (example,),
        input_names=[IMAGE],
        output_names=[LOGITS],
        opset_version=metadata.opset,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
        optimize=False,  # it would merge weights
    )


def _with_weights(captured: ONNXProgram, module: nn.Module) -> onnx.ModelProto:
    """The captured graph with the module's weights, optimised."""
    program = ONNXProgram(captured.model.clone(), None)
    with warnings.catch_warnings(action="ignore"):  # of weights that no logit depends on
        program.apply_weights(module.state_dict())
    program.optimize()
    return program.model_proto


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress what exporters print and log, such as graphs when they fail."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """The first line of the error at the root of the chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _without_traces(message: Any) -> None:
    """Remove the exporter's notes at every depth of a protobuf message: the source lines of each
    node, with paths of this machine."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                _without_traces(part)
