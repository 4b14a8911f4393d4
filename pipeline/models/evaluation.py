"""Predictions, accuracy metrics, parameter and MAC counts: the figures that every model reports."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as serialised
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pipeline.data.prepared.dataset import AnySplit, EncodedSplit
from pipeline.models.raw_logits import beyond_float16, check_raw
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.files import canonical_json, write_bytes
from pipeline.views.loader import AnyViews, CleanView, batches_of, open_views
from pipeline.views.policy import ViewPolicy

_SAVE_LOGITS = (
    "Save the input of the softmax, or the logarithm of the probabilities (raised to at least "
    "1e-7, because that of 0 is not finite); of a sigmoid its input, or log(p / (1 - p))."
)


@torch.inference_mode()
def predict(
    network: nn.Module,
    spec: InputSpec,
    views: Tensor,
    *,
    precision: str = "float32",
    clean: bool = False,
) -> Tensor:
    """Compute the raw logits of one batch of views, in evaluation mode.

    Args:
        views: [B, C, H, W] uint8, on the network's device.
        precision: of the forward pass; below float32 by autocast.
        clean: the views are those of `open_clean_views`.

    Returns:
        [B, num_classes] float32, on the same device.
    """
    network.eval()
    dtype = getattr(torch, precision)
    with torch.autocast(views.device.type, dtype, enabled=dtype != torch.float32):
        return network(spec.apply_clean(views) if clean else spec.apply(views)).float()


def open_clean_views(split: AnySplit, spec: InputSpec, device: torch.device) -> AnyViews:
    """Open a split's images without augmentation, for `predict(..., clean=True)`.

    They are the views of policy `none`; for a network with its own `resize_ratio`, whole square
    images, out of which `predict` cuts the middle.
    """
    policy = ViewPolicy("none")
    if spec.resize_ratio is None or not isinstance(split, EncodedSplit):
        return open_views(split, policy, 0, device)
    square = CleanView(ratio=1, bicubic=spec.interpolation == "bicubic")
    return open_views(split.resized(spec.resized_side), policy, 0, device, clean=square)


def check_imported(
    logits: np.ndarray, class_names: Sequence[str], source: str, row_name: Callable[[int], str]
) -> None:
    """Refuse numbers of another system that cannot be raw logits, or cannot be stored.

    Args:
        logits: [n, C] float32.
        source: for messages: where the numbers are from.
        row_name: the name of a row, by its number.

    Raises:
        UserError: a number is not finite in float16, or the rows are probabilities, percentages or
            hard labels.
    """
    wrong = beyond_float16(logits)
    rows = np.flatnonzero(wrong.any(1))
    if len(rows):
        row = int(rows[0])
        column = int(wrong[row].argmax())
        raise UserError(
            f"`{source}`: {counted(len(rows), 'row has', 'rows have')} numbers that are not "
            f"finite, or beyond float16's ±65504; the first is {row_name(row)}: "
            f"{logits[row, column]:g} for `{class_names[column]}`. Expected finite logits."
        )
    check_raw(logits, f"`{source}` holds", _SAVE_LOGITS, row_name)


def predict_all(
    network: nn.Module,
    spec: InputSpec,
    split: AnySplit,
    *,
    device: torch.device,
    samples: np.ndarray | None = None,
    views: AnyViews | None = None,
) -> Tensor:
    """Compute the raw logits of a split's images without augmentation: [N, num_classes] float32, on
    the CPU.

    Args:
        samples: [N] sample numbers; None for all.
        views: of `open_clean_views`, for several passes; None: opened for this one.
    """
    samples = np.arange(len(split)) if samples is None else samples
    views = views or open_clean_views(split, spec, device)
    batches = views.batches(0, batches_of(samples))
    # Together on the device, and copied once: each copy would wait for its batch.
    return torch.cat([predict(network, spec, it.pixels, clean=True) for it in batches]).cpu()


def classification_metrics(logits: Tensor, labels: Tensor, prefix: str) -> dict[str, float]:
    """Accuracy, top-5 accuracy (the label is among the 5 largest logits) and mean NLL in nats.

    Args:
        logits: [N, num_classes] float32.
        labels: [N] int64.
        prefix: of the names: `test` gives `test_accuracy`.
    """
    top5 = logits.topk(min(5, logits.shape[1])).indices  # [N, 5]
    return {
        f"{prefix}_accuracy": (logits.argmax(1) == labels).double().mean().item(),
        f"{prefix}_top5_accuracy": (top5 == labels[:, None]).any(1).double().mean().item(),
        f"{prefix}_nll": F.cross_entropy(logits.double(), labels).item(),
    }


def count_parameters_and_macs(network: nn.Module, spec: InputSpec) -> Mapping[str, int]:
    """Count parameters, and multiply-accumulates of convolutions and matrix products for one image.
    A network that is not torch's counts them in a method `cost(channels, size)`."""
    if hasattr(network, "cost"):
        return network.cost(spec.channels, spec.size)
    device = next(network.parameters()).device
    network.eval()
    with torch.inference_mode(), _plain_attention(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, spec.channels, spec.size, spec.size, device=device))
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "macs": counter.get_total_flops() // 2,
    }


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Switch off the fused inference of nn.MultiheadAttention, which FlopCounterMode cannot see."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def write_predictions(path: Path, made_from: Mapping[str, Any], **logits: Tensor) -> None:
    """Write the raw logits of each split, [N, num_classes] float32, for comparisons.

    Args:
        made_from: the stage's parameters, as JSON; written beside the logits.
    """
    tensors = {split: values.contiguous() for split, values in logits.items()}
    write_bytes(path, serialised(tensors, {"made_from": canonical_json(made_from)}))
