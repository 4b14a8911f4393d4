"""Losses of a student: plain functions of tensors, computed in float32 or wider."""

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    kept: Tensor | None = None,
) -> Tensor:
    """KL divergence of the student from the teacher at one temperature, in nats.

    Both [B, C] raw scores. Mean over B, times temperature**2 so that gradients keep the scale of
    the label term (Hinton et al. 2015, arXiv:1503.02531, section 2).

    Args:
        kept: [B, C] bool; if given, the classes of a row that are not kept count as one, with the
            sum of their probabilities, in the teacher and in the student.
    """
    student = F.log_softmax(_at_least_float32(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(_at_least_float32(teacher_logits) / temperature, dim=1)
    if kept is not None:
        student, teacher = _with_bucket(student, kept), _with_bucket(teacher, kept)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def soft_and_hard_loss(
    student_logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    kept: Tensor | None = None,
    *,
    temperature: float,
    soft_label_weight: float,
    hard_label_weight: float,
    tail: str = "spread",
) -> Tensor:
    """soft_label_weight · T² · KL(teacher || student at T) + hard_label_weight · cross-entropy.

    Args:
        student_logits, teacher_logits: [B, C] raw scores.
        labels: [B] int64.
        kept: [B, C] bool, the classes whose logits a sparse store kept; None: all of them.
        tail: how the classes that are not kept enter: `spread` by the logits given for them,
            `bucket` as one class.
    """
    soft = distillation_loss(
        student_logits,
        teacher_logits,
        temperature=temperature,
        kept=kept if tail == "bucket" else None,
    )
    hard = F.cross_entropy(_at_least_float32(student_logits), labels)
    return soft_label_weight * soft + hard_label_weight * hard


def _with_bucket(log_probabilities: Tensor, kept: Tensor) -> Tensor:
    """[B, C] -> [B, C + 1]: kept classes as they are, and last the sum of the others.

    What stands elsewhere has probability 0, and is finite, so that 0 · log 0 and its gradient are
    0 instead of not a number; likewise the sum of a row that keeps every class.
    """
    nothing = torch.finfo(log_probabilities.dtype).min
    bucket = log_probabilities.masked_fill(kept, nothing).logsumexp(1, keepdim=True)
    return torch.cat([log_probabilities.masked_fill(~kept, nothing), bucket], dim=1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype.itemsize >= 4 else logits.float()
