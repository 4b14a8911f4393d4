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


def paired_loss(
    params: DistillationParams, soft_targets: SoftTargetLookup, device: torch.device
) -> Loss:
    """The loss of a student of pairs, of what it sees of them: the mean of both views' losses; or,
    of a method that joins the views, its authors' objective, which adds their cross-entropies; or
    that of the strong view with the weak view's row.

    Args:
        soft_targets: of the store's views: those of pair p are 2p, the weak one, and 2p + 1.
    """

    def of_weak(pair: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return soft_targets(2 * pair, samples)

    def of_strong(pair: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return soft_targets(2 * pair + 1, samples)

    if params.paired_views == "weak_to_strong":
        return student_loss(params, of_weak, device)
    if params.joins_views:
        method = method_loss(params, "paired_")

        def joint(logits: Tensor, batch: TrainingBatch) -> Tensor:
            rows = [lookup(batch.view, batch.samples)[0] for lookup in (of_weak, of_strong)]
            hard = sum(label_loss(each, batch.labels) for each in logits)
            soft = method(logits, [to_device(each, device) for each in rows])
            return params.hard_label_weight * hard + params.soft_label_weight * soft

        return joint
    of_views = [student_loss(params, lookup, device) for lookup in (of_weak, of_strong)]

    def mean(logits: Tensor, batch: TrainingBatch) -> Tensor:
        weak, strong = (loss(each, batch) for loss, each in zip(of_views, logits, strict=True))
        return (weak + strong) / 2

    return mean


def seen_views(params: DistillationParams, views: AnyViews) -> AnyViews:
    """What a student sees: the views, and of pairs both views or the strong one alone."""
    if isinstance(views, PairedViews) and params.paired_views == "weak_to_strong":
        return views.strong
    return views


def loss_over_epochs(
    params: DistillationParams,
    soft_targets_at: Callable[[float], SoftTargetLookup],
    device: torch.device,
    epochs: int,
    *,
    paired: bool = False,
) -> Loss:
    """The student's loss in a training of so many epochs, at each epoch's temperature.

    Args:
        soft_targets_at: temperature -> the lookup whose rows are decoded for it.
        paired: views are pairs.
    """
    of_views = paired_loss if paired else student_loss

    @lru_cache(maxsize=1)
    def loss_of(epoch: int) -> Loss:
        now = params.at_epoch(epoch, epochs)
        return of_views(now, soft_targets_at(now.decoding_temperature), device)

    def loss(logits: Tensor, batch: TrainingBatch) -> Tensor:
        return loss_of(batch.epoch)(logits, batch)

    return loss
