"""A student's `distillation` parameters as the loss that the training loop adds."""

from torch import Tensor

from pipeline.distillation import losses
from pipeline.distillation.params import DistillationParams
from pipeline.students.loop import DistillationLoss

#: Parameters that are not the loss function's own.
_AROUND = {"method", "hard_label_weight", "soft_label_weight", "warmup_epochs", "tail"}


def distillation_loss(params: DistillationParams) -> DistillationLoss:
    """The method's loss, weighted; its weight grows linearly over `warmup_epochs`, if it has any:
    in epoch e, counted from 1, it is min(e / warmup_epochs, 1) of it."""
    function = getattr(losses, params.method)
    arguments = params.model_dump(exclude=_AROUND)
    weight = getattr(params, "soft_label_weight", 1.0)
    warmup_epochs = getattr(params, "warmup_epochs", 0)
    bucket = getattr(params, "tail", "spread") == "bucket"

    def loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        kept: Tensor | None,
        epoch: int,
    ) -> Tensor:
        tensors = {"labels": labels} if params.needs_labels else {}
        if bucket:
            tensors["kept"] = kept
        warmed_up = min(epoch / warmup_epochs, 1.0) if warmup_epochs else 1.0
        return weight * warmed_up * function(student_logits, teacher_logits, **tensors, **arguments)

    return loss
