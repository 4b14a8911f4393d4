"""The loss of a student, made from its `distillation` parameters."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.compute.device import to_device
from pipeline.distillation import losses
from pipeline.distillation.device_rows import DeviceRows, SoftTargetLookup
from pipeline.distillation.params import DistillationParams
from pipeline.students.label_loss import label_loss
from pipeline.students.loop import Loss, TrainingBatch

#: Parameters that are not arguments of the method's function.
_NOT_ARGUMENTS = {"method", "hard_label_weight", "soft_label_weight", "warmup_epochs", "tail"}


def method_loss(params: DistillationParams) -> Callable[..., Tensor]:
    """The function of `losses` that computes the method's loss, with its parameters."""
    arguments = params.model_dump(exclude=_NOT_ARGUMENTS)
    return partial(getattr(losses, params.method), **arguments)


def student_loss(
    params: DistillationParams,
    soft_targets: SoftTargetLookup,
    device: torch.device,
    stored: tuple[int, int] | None = None,
) -> Loss:
    """hard_label_weight · cross-entropy to the labels + soft_label_weight · the method's loss.

    Args:
        stored: views and samples of which `soft_targets` has rows that never change: a GPU keeps
            them, if they fit; None: each batch's rows are looked up and copied.

    During `warmup_epochs`, if the method has them, its loss grows linearly: in epoch e, counted
    from 1, it counts min(e / warmup_epochs, 1).
    """
    method = method_loss(params)
    soft_label_weight = getattr(params, "soft_label_weight", 1.0)
    warmup_epochs = getattr(params, "warmup_epochs", 0)
    uses_kept_classes = getattr(params, "tail", "spread") == "bucket"

    def look_up(view: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        rows, kept_classes = soft_targets(view, samples)
        return rows, kept_classes if uses_kept_classes else None

    on_device = None if stored is None else DeviceRows.if_they_fit(look_up, *stored, device)

    def loss(logits: Tensor, batch: TrainingBatch) -> Tensor:
        if on_device is not None:
            teacher_logits, kept = on_device.gather(batch.view, batch.rows)
        else:
            rows, kept_classes = look_up(batch.view, batch.samples)
            teacher_logits = to_device(rows, device)
            kept = None if kept_classes is None else to_device(kept_classes, device)
        tensors = {"labels": batch.labels} if params.needs_labels else {}
        if uses_kept_classes:
            tensors["kept"] = kept
        hard = label_loss(logits, batch.labels, batch.partner_labels, batch.weights)
        soft = method(logits, teacher_logits, **tensors)
        warmup = min(batch.epoch / warmup_epochs, 1.0) if warmup_epochs else 1.0
        return params.hard_label_weight * hard + soft_label_weight * warmup * soft

    return loss
