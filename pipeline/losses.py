"""Losses of a student: plain functions of tensors, computed in float32 or wider."""

from torch import Tensor
from torch.nn import functional as F


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float
) -> Tensor:
    """KL divergence of the student from the teacher at one temperature, in nats.

    Both [B, C] raw scores. Mean over B, times temperature**2 so that gradients keep the scale of
    the label term (Hinton et al. 2015, arXiv:1503.02531, section 2).
    """
    student = F.log_softmax(_at_least_float32(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(_at_least_float32(teacher_logits) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def soft_and_hard_loss(
    student_logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    soft_label_weight: float,
    hard_label_weight: float,
) -> Tensor:
    """soft_label_weight · T² · KL(teacher || student at T) + hard_label_weight · cross-entropy.

    Args:
        student_logits, teacher_logits: [B, C] raw scores.
        labels: [B] int64.
    """
    soft = distillation_loss(student_logits, teacher_logits, temperature=temperature)
    hard = F.cross_entropy(_at_least_float32(student_logits), labels)
    return soft_label_weight * soft + hard_label_weight * hard


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype.itemsize >= 4 else logits.float()
