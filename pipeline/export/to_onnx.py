"""Export a trained network to ONNX, with the preprocessing of views inside."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from pipeline.export.onnx_teacher import OnnxPreprocessing, opset_of, with_preprocessing
from pipeline.export.preprocessing import Preprocessing
from pipeline.export.running.onnx_model import IMAGE, LOGITS, OnnxMetadata
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import UserError, first_line

#: The oldest with an antialiased Resize, which a network with a larger `input_size` than the view
#: needs. More engines support an older opset.
OPSET = 18


class NotExportable(UserError):
    """There is no file that computes what the network computes."""


class _FromPixels(nn.Module):
    """Preprocessing and network as one module."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing):
        super().__init__()
        self.network, self.preprocessing = network, preprocessing

    def forward(self, image: Tensor) -> Tensor:  # [B, C, S, S] uint8 -> [B, num_classes] float32
        return self.network(self.preprocessing(image)).float()


def to_onnx(network: nn.Module, spec: InputSpec, metadata: OnnxMetadata) -> bytes:
    """Export to the bytes of an ONNX file. Equal networks give equal bytes.

    Input `image`: [batch, C, S, S] uint8, S = `metadata.image_size`, of any batch size; output
    `logits`: [batch, num_classes] float32. Refuses what torch's exporter refuses, with its reason.
    """
    try:
        with _quiet():
            model = _exported(network, spec, metadata)
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


def _exported(network: nn.Module, spec: InputSpec, metadata: OnnxMetadata) -> onnx.ModelProto:
    graph = getattr(network, "graph", None)  # of a network that is an ONNX file itself
    side = metadata.image_size
    preprocessing = Preprocessing(spec, side)
    module = _FromPixels(network, preprocessing)
    if graph is not None:
        if network.batch_size is not None:
            raise ValueError(f"its file takes {network.batch_size} images at a time")
        module = OnnxPreprocessing(preprocessing, **network.input_format)
    # A batch of 1 would fix the batch size.
    example = torch.zeros(2, metadata.channels, side, side, dtype=torch.uint8)
    program = torch.onnx.export(
        module.eval(),
        (example,),
        input_names=[IMAGE],
        output_names=[LOGITS],
        opset_version=metadata.opset,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    if graph is None:
        return program.model_proto
    return with_preprocessing(program.model_proto, graph, len(metadata.class_names))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the graphs that the exporter prints and logs when it fails."""
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
