"""The loss of a student, made from its `distillation` parameters."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.compute.device import to_device
from pipeline.distillation import losses
from pipeline.distillation.params import DistillationParams
from pipeline.students.label_loss import label_loss
from pipeline.students.loop import Loss, TrainingBatch
from pipeline.views.loader import AnyViews, PairedViews

#: (view, samples [B]) -> (teacher_logits [B, C], kept_classes [B, C] bool, or None for all).
SoftTargetLookup = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray | None]]

#: Parameters that are not arguments of the method's function.
_NOT_ARGUMENTS = {
    *("method", "hard_label_weight", "soft_label_weight", "warmup_epochs", "tail", "paired_views"),
}


def method_loss(params: DistillationParams, prefix: str = "") -> Callable[..., Tensor]:
    """The function of `losses` that computes the method's loss, with its parameters."""
    arguments = params.model_dump(exclude=_NOT_ARGUMENTS)
    return partial(getattr(losses, prefix + params.method), **arguments)


def lesson(
    params: DistillationParams,
    views: AnyViews,
    soft_targets: SoftTargetLookup,
    device: torch.device,
) -> tuple[AnyViews, Loss]:
    """What a student sees of the views, and the loss that it learns from.

    Args:
        soft_targets: of the store's views: those of pair p are 2p, the weak one, and 2p + 1.
    """
    if not isinstance(views, PairedViews):
        return views, student_loss(params, soft_targets, device)

    def of_weak(pair: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return soft_targets(2 * pair, samples)

    def of_strong(pair: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return soft_targets(2 * pair + 1, samples)

    if params.paired_views == "weak_to_strong":
        return views.strong, student_loss(params, of_weak, device)
    return views, _loss_of_both(params, (of_weak, of_strong), device)


def _loss_of_both(
    params: DistillationParams, soft_targets: Sequence[SoftTargetLookup], device: torch.device
) -> Loss:
    """The mean of both views' losses; or, of a method that joins the views, its authors' objective,
    which adds the views' cross-entropies."""
    if params.joins_views:
        method = method_loss(params, "paired_")

        def joint(logits: Tensor, batch: TrainingBatch) -> Tensor:
            rows = [lookup(batch.view, batch.samples)[0] for lookup in soft_targets]
            hard = sum(label_loss(each, batch.labels) for each in logits)
            soft = method(logits, [to_device(each, device) for each in rows])
            return params.hard_label_weight * hard + params.soft_label_weight * soft

        return joint
    of_views = [student_loss(params, lookup, device) for lookup in soft_targets]

    def mean(logits: Tensor, batch: TrainingBatch) -> Tensor:
        weak, strong = (loss(each, batch) for loss, each in zip(of_views, logits, strict=True))
        return (weak + strong) / 2

    return mean


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
