"""A trained network becomes an ONNX file, with all that happens to an image inside it."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.export.onnx_model import IMAGE, LOGITS, OnnxMetadata
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import UserError

#: The oldest with an antialiased Resize, which a network with an `input_size` of its own needs: the
#: older an opset, the more engines take it.
OPSET = 18


class _FromPixels(nn.Module):
    """What the pipeline does to a view, as one graph."""

    def __init__(self, network: nn.Module, spec: InputSpec):
        super().__init__()
        self.network, self.spec = network, spec

    def forward(self, image: Tensor) -> Tensor:  # [B, C, S, S] uint8 -> [B, num_classes] float32
        return self.network(self.spec.apply(image)).float()


def to_onnx(network: nn.Module, spec: InputSpec, card: OnnxMetadata) -> bytes:
    """The file's content: input `image`, [batch, C, S, S] uint8 of the card's size, in batches of
    any size; output `logits`, [batch, num_classes] float32. Equal networks give equal bytes.

    Raises:
        UserError: torch's exporter cannot take the network; gives its reason.
    """
    side = card.image_size
    example = torch.zeros(2, card.channels, side, side, dtype=torch.uint8)  # of 1 it would be fixed
    try:
        with _quiet():
            program = torch.onnx.export(
                _FromPixels(network, spec).eval(),
                (example,),
                input_names=[IMAGE],
                output_names=[LOGITS],
                opset_version=card.opset,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # of the exporter or of the network: any kind
        raise UserError(
            f"student `{card.student}` cannot become an ONNX file: torch's exporter says "
            f"({_reason(error)}). Its network must do the same for every image and batch size, "
            "without a decision in Python that hangs on pixels, and of operations that ONNX has: "
            "change its file in pipeline/networks/, or choose another network."
        ) from None
    model = program.model_proto
    _without_traces(model)
    model.doc_string = card.in_words()
    for key, value in card.metadata().items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString(deterministic=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and logs whole graphs where it fails; its error says it in a line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0].strip() or type(error).__name__


def _without_traces(message: Any) -> None:
    """Remove, at every depth of a protobuf message, what the exporter noted on the way: the source
    lines of each node, with their paths on this machine."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                _without_traces(part)
