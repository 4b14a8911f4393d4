"""The loss of a student, made from its `distillation` parameters."""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from pipeline.compute.device import compile_long_runs, to_device
from pipeline.distillation import losses
from pipeline.distillation.device_rows import DeviceRows, SoftTargetLookup
from pipeline.distillation.params import DistillationParams
from pipeline.students.label_loss import label_loss
from pipeline.students.loop import Loss, TrainingBatch
from pipeline.views.loader import AnyViews, PairedViews

#: Parameters that are not arguments of the method's function.
_NOT_ARGUMENTS = {
    *("method", "hard_label_weight", "soft_label_weight", "warmup_epochs", "tail", "paired_views"),
    *("sort_teacher", "student_teaches_after"),
}


def method_loss(params: DistillationParams, prefix: str = "") -> Callable[..., Tensor]:
    """The function of `losses` that computes the method's loss, with its parameters."""
    arguments = params.model_dump(exclude=_NOT_ARGUMENTS)
    return partial(getattr(losses, prefix + params.method), **arguments)


def teacher_rows(
    params: DistillationParams,
    soft_targets: SoftTargetLookup,
    device: torch.device,
    stored: tuple[int, int] | None,
) -> Callable[[TrainingBatch], tuple[Tensor, Tensor | None]]:
    """A function that returns a batch's teacher logits and, if the method uses them, the classes
    that the store kept, on the device. `stored`: as for `student_loss`."""
    uses_kept_classes = getattr(params, "tail", "spread") == "bucket"

    def look_up(view: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        rows, kept_classes = soft_targets(view, samples)
        return rows, kept_classes if uses_kept_classes else None

    on_device = None if stored is None else DeviceRows.if_they_fit(look_up, *stored, device)

    def of_batch(batch: TrainingBatch) -> tuple[Tensor, Tensor | None]:
        if on_device is not None:
            return on_device.gather(batch.view, batch.rows)
        rows, kept_classes = look_up(batch.view, batch.samples)
        return to_device(rows, device), (
            None if kept_classes is None else to_device(kept_classes, device)
        )

    return of_batch


def student_loss(
    params: DistillationParams,
    soft_targets: SoftTargetLookup,
    device: torch.device,
    stored: tuple[int, int] | None = None,
    steps: int = 0,
) -> Loss:
    """hard_label_weight · cross-entropy to the labels + soft_label_weight · the method's loss.

    Args:
        stored: views and samples of which `soft_targets` has rows that never change: a GPU keeps
            them, if they fit; None: each batch's rows are looked up and copied.
        steps: of the training; a GPU compiles the method for a long one.

    During `warmup_epochs`, if the method has them, its loss grows linearly: in epoch e, counted
    from 1, it counts min(e / warmup_epochs, 1). `student_teaches_after` counts epochs from 1, too.
    """
    method = compile_long_runs(method_loss(params), device, steps)
    soft_label_weight = getattr(params, "soft_label_weight", 1.0)
    warmup_epochs = getattr(params, "warmup_epochs", 0)
    student_teaches_after = getattr(params, "student_teaches_after", None)
    sort_teacher = getattr(params, "sort_teacher", False)
    uses_kept_classes = getattr(params, "tail", "spread") == "bucket"
    rows_of = teacher_rows(params, soft_targets, device, stored)

    def loss(logits: Tensor, batch: TrainingBatch) -> Tensor:
        teacher_logits, kept = rows_of(batch)
        if sort_teacher:
            teacher_logits = losses.sorted_by_label(teacher_logits, batch.labels)
        arguments = {"labels": batch.labels} if params.needs_labels else {}
        if uses_kept_classes:
            arguments["kept"] = kept
        if student_teaches_after is not None:
            arguments["student_teaches"] = batch.epoch > student_teaches_after
        hard = label_loss(logits, batch.labels, batch.partner_labels, batch.weights)
        soft = method(logits, teacher_logits, **arguments)
        warmup = min(batch.epoch / warmup_epochs, 1.0) if warmup_epochs else 1.0
        return params.hard_label_weight * hard + soft_label_weight * warmup * soft

    return loss


def paired_loss(
    params: DistillationParams,
    soft_targets: SoftTargetLookup,
    device: torch.device,
    stored: tuple[int, int] | None = None,
    steps: int = 0,
) -> Loss:
    """Return the loss of a student of pairs, by `paired_views`. `both`: the mean of the two views'
    losses or, of a method that joins the views (`mlkd`, `crld`), its authors' objective, which adds
    their cross-entropies. `weak_to_strong`: the strong view's loss with the weak view's row.

    Args:
        soft_targets: of the store's views: those of pair p are 2p, the weak one, and 2p + 1.
        stored, steps: as for `student_loss`.
    """

    def of_weak(pair: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return soft_targets(2 * pair, samples)

    def of_strong(pair: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return soft_targets(2 * pair + 1, samples)

    both = of_weak, of_strong
    pairs = None if stored is None else (stored[0] // 2, stored[1])
    if params.paired_views == "weak_to_strong":
        return student_loss(params, of_weak, device, pairs, steps)
    if params.joins_views:
        method = compile_long_runs(method_loss(params, "paired_"), device, steps)
        rows_of = [teacher_rows(params, lookup, device, pairs) for lookup in both]
        soft_label_weight = getattr(params, "soft_label_weight", 1.0)

        def joint(logits: Tensor, batch: TrainingBatch) -> Tensor:
            hard = sum(label_loss(each, batch.labels) for each in logits)
            # Of one tensor, because only such a function can be compiled.
            soft = method(torch.stack(tuple(logits)), [rows(batch)[0] for rows in rows_of])
            return params.hard_label_weight * hard + soft_label_weight * soft

        return joint
    of_views = [student_loss(params, lookup, device, pairs, steps) for lookup in both]

    def mean(logits: Tensor, batch: TrainingBatch) -> Tensor:
        weak, strong = (loss(each, batch) for loss, each in zip(of_views, logits, strict=True))
        return (weak + strong) / 2

    return mean


def seen_views(params: DistillationParams, views: AnyViews) -> AnyViews:
    """Return the views that a student sees: of pairs both views or the strong one alone."""
    if isinstance(views, PairedViews) and params.paired_views == "weak_to_strong":
        return views.strong
    return views


def loss_over_epochs(
    params: DistillationParams,
    soft_targets_at: Callable[[float], SoftTargetLookup],
    device: torch.device,
    epochs: int,
    *,
    stored: tuple[int, int] | None = None,
    paired: bool = False,
    steps: int = 0,
) -> Loss:
    """The student's loss in a training of so many epochs, at each epoch's temperature.

    Args:
        soft_targets_at: temperature -> the lookup whose rows are decoded for it.
        stored: as for `student_loss`; of a temperature that changes, rows are not kept.
        paired: views are pairs.
        steps: as for `student_loss`; of a temperature that changes, nothing is compiled.
    """
    of_views = paired_loss if paired else student_loss
    if params.at_epoch(1, epochs) is params:
        return of_views(params, soft_targets_at(params.decoding_temperature), device, stored, steps)

    @lru_cache(maxsize=1)
    def loss_of(epoch: int) -> Loss:
        now = params.at_epoch(epoch, epochs)
        return of_views(now, soft_targets_at(now.decoding_temperature), device)

    def loss(logits: Tensor, batch: TrainingBatch) -> Tensor:
        return loss_of(batch.epoch)(logits, batch)

    return loss
