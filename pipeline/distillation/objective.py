"""The loss of a student, made from its `distillation` parameters."""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from pipeline.compute.device import to_device
from pipeline.distillation import losses
from pipeline.distillation.params import DistillationParams
from pipeline.students.label_loss import label_loss
from pipeline.students.loop import Loss, TrainingBatch

#: (view, samples [B]) -> (teacher_logits [B, C], kept_classes [B, C] bool, or None for all).
SoftTargetLookup = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray | None]]

#: Parameters that are not arguments of the method's function.
_NOT_ARGUMENTS = {"method", "hard_label_weight", "soft_label_weight", "warmup_epochs", "tail"}


def method_loss(params: DistillationParams) -> Callable[..., Tensor]:
    """The function of `losses` that computes the method's loss, with its parameters."""
    arguments = params.model_dump(exclude=_NOT_ARGUMENTS)
    return partial(getattr(losses, params.method), **arguments)


def student_loss(
    params: DistillationParams, soft_targets: SoftTargetLookup, device: torch.device
) -> Loss:
    """hard_label_weight · cross-entropy to the labels + soft_label_weight · the method's loss.

    During `warmup_epochs`, if the method has them, its loss grows linearly: in epoch e, counted
    from 1, it counts min(e / warmup_epochs, 1).
    """
    method = method_loss(params)
    soft_label_weight = getattr(params, "soft_label_weight", 1.0)
    warmup_epochs = getattr(params, "warmup_epochs", 0)
    uses_kept_classes = getattr(params, "tail", "spread") == "bucket"

    def loss(logits: Tensor, batch: TrainingBatch) -> Tensor:
        rows, kept_classes = soft_targets(batch.view, batch.samples)
        teacher_logits = to_device(rows, device)
        tensors = {"labels": batch.labels} if params.needs_labels else {}
        if uses_kept_classes:
            tensors["kept"] = None if kept_classes is None else to_device(kept_classes, device)
        hard = label_loss(logits, batch.labels, batch.partner_labels, batch.weights)
        soft = method(logits, teacher_logits, **tensors)
        warmup = min(batch.epoch / warmup_epochs, 1.0) if warmup_epochs else 1.0
        return params.hard_label_weight * hard + soft_label_weight * warmup * soft

    return loss


def loss_over_epochs(
    params: DistillationParams,
    soft_targets_at: Callable[[float], SoftTargetLookup],
    device: torch.device,
    epochs: int,
) -> Loss:
    """`student_loss` of a training of so many epochs, at each epoch's temperature.

    Args:
        soft_targets_at: temperature -> the lookup whose rows are decoded for it.
    """

    @lru_cache(maxsize=1)
    def loss_of(epoch: int) -> Loss:
        now = params.at_epoch(epoch, epochs)
        return student_loss(now, soft_targets_at(now.decoding_temperature), device)

    def loss(logits: Tensor, batch: TrainingBatch) -> Tensor:
        return loss_of(batch.epoch)(logits, batch)

    return loss
