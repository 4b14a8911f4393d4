"""The loss of a distillation method alone, from tensors."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.distillation.objective import student_loss
from pipeline.distillation.params import DistillationParams
from pipeline.students.loop import TrainingBatch


def method_loss(
    params: DistillationParams,
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]:
    """(student_logits, teacher_logits, labels, kept_classes, epoch) -> the student's loss without
    cross-entropy to the labels."""
    params = params.model_copy(update={"hard_label_weight": 0.0})

    def loss(student_logits, teacher_logits, labels, kept_classes, epoch):
        rows = teacher_logits.detach().numpy()
        kept = None if kept_classes is None else kept_classes.numpy()
        function = student_loss(params, lambda view, samples: (rows, kept), torch.device("cpu"))
        return function(student_logits, TrainingBatch(epoch, 0, np.arange(len(rows)), labels))

    return loss
