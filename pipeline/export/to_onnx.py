"""Export a trained network to ONNX, with the preprocessing of views inside."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.export.onnx_model import IMAGE, LOGITS, OnnxMetadata
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import UserError, first_line

#: The oldest with an antialiased Resize, which a network with a larger `input_size` than the view
#: needs. More engines support an older opset.
OPSET = 18


class _FromPixels(nn.Module):
    """Preprocessing and network as one module."""

    def __init__(self, network: nn.Module, spec: InputSpec, side: int):
        super().__init__()
        self.network, self.spec = network, spec
        mode = spec.interpolation or "bilinear"
        same_in_every_engine = side == spec.size or (mode == "bilinear" and side < spec.size)
        self.resize = None if same_in_every_engine else _Resize(side, spec.size, mode)

    def forward(self, image: Tensor) -> Tensor:  # [B, C, S, S] uint8 -> [B, num_classes] float32
        if self.resize is not None:
            image = self.resize(image)
        return self.network(self.spec.apply(image)).float()


class _Resize(nn.Module):
    """Antialiased resizing of squares as two matrix products, without ONNX's Resize.

    OpenVINO 2026.4 ignores `antialias` and `exclude_outside` of a Resize. If it shrinks, all pixels
    are others; if it is bicubic, those at the edges.
    """

    def __init__(self, side: int, size: int, mode: str):
        super().__init__()
        self.mode = mode
        # Resizing is linear: the unit vectors give its weights. In float32, as PyTorch computes them.
        rows = F.interpolate(torch.eye(side)[None, None], (size, side), mode=mode, antialias=True)
        self.register_buffer("rows", rows[0, 0], persistent=False)  # [size, side]
        self.register_buffer("columns", rows[0, 0].T.contiguous(), persistent=False)

    def forward(self, image: Tensor) -> Tensor:  # [B, C, side, side] -> [B, C, size, size] float32
        pixels = self.rows @ (image.float() @ self.columns)
        return pixels.clamp(0, 255) if self.mode == "bicubic" else pixels


def to_onnx(network: nn.Module, spec: InputSpec, metadata: OnnxMetadata) -> bytes:
    """Export to the bytes of an ONNX file. Equal networks give equal bytes.

    Input `image`: [batch, C, S, S] uint8, S = `metadata.image_size`, of any batch size; output
    `logits`: [batch, num_classes] float32. Refuses what torch's exporter refuses, with its reason.
    """
    side = metadata.image_size
    # A batch of 1 would fix the batch size.
    example = torch.zeros(2, metadata.channels, side, side, dtype=torch.uint8)
    try:
        with _quiet():
            program = torch.onnx.export(
                _FromPixels(network, spec, side).eval(),
                (example,),
                input_names=[IMAGE],
                output_names=[LOGITS],
                opset_version=metadata.opset,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # any error of the exporter or of the network
        raise UserError(
            f"student `{metadata.student}` cannot be exported to ONNX: {_reason(error)}. Its "
            "network must compute the same for every image and batch size, without a Python branch "
            "on pixels, with operations that ONNX has: change its file in pipeline/networks/, or "
            "choose another network."
        ) from None
    model = program.model_proto
    _without_traces(model)
    model.doc_string = metadata.in_words()
    for key, value in metadata.metadata().items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString(deterministic=True)


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
