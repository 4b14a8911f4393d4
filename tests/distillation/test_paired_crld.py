"""CRLD of a weak and a strong view, from values of its authors' code, in float64."""

import numpy as np
import pytest
import torch

from pipeline.distillation.losses import paired_crld
from pipeline.distillation.objective import paired_loss
from pipeline.distillation.params import CRLD
from pipeline.students.loop import TrainingBatch

STEPS = torch.arange(48, dtype=torch.float64).reshape(6, 8)
STUDENT = [3 * torch.sin(1.7 * STEPS), 2 * torch.sin(1.3 * STEPS + 1)]
SCALE = torch.arange(6, dtype=torch.float64)[:, None]  # so the teacher grows surer row by row
TEACHER = [4 * (SCALE + 1) * torch.cos(STEPS), 0.5 * SCALE * torch.sin(0.7 * STEPS)]
DEFAULTS = {
    "temperature": 4.0,
    "within_view_weight": 2.0,
    "cross_view_weight": 0.5,
    "weak_confidence": 0.9,
    "strong_confidence": 0.2,
}


def test_the_loss_and_gradient_are_those_of_its_authors_code():
    """The figures: `CRLD.forward_train` as in scx-822/CRLD-main at c9d6657, with its defaults."""
    student = [logits.clone().requires_grad_() for logits in STUDENT]
    rows = [(logits.numpy(), None) for logits in TEACHER]
    params = CRLD(method="crld")
    assert DEFAULTS.items() <= params.model_dump().items()
    loss = paired_loss(params, lambda view, _: rows[view], torch.device("cpu"))
    labels = torch.tensor([0, 3, 5, 7, 2, 2])
    found = loss(student, TrainingBatch(1, 0, np.arange(6), labels))
    found.backward()
    assert found.item() == pytest.approx(29.993465905455476, rel=1e-12)
    norms = [logits.grad.norm().item() for logits in student]
    assert norms == pytest.approx([1.4903789625660624, 0.6008412946327315], rel=1e-12)


def test_each_term_takes_the_images_of_which_the_teacher_is_sure():
    for threshold, view in (("weak_confidence", 0), ("strong_confidence", 1)):
        sure = torch.softmax(TEACHER[view], 1).amax(1)
        only = {"cross_view_weight": 0.0} if view == 0 else {"within_view_weight": 0.0}
        limit = sure.sort().values[3].item()  # this image and two surer ones
        found = paired_crld(STUDENT, TEACHER, **DEFAULTS | only | {threshold: limit})
        chosen = sure >= limit
        of_these = [[logits[chosen] for logits in both] for both in (STUDENT, TEACHER)]
        whole = paired_crld(*of_these, **DEFAULTS | only | {threshold: 0.0})
        assert chosen.sum() == 3
        assert found.item() == pytest.approx(whole.item() * 3 / 6, rel=1e-12)


@pytest.mark.parametrize("scale", [1, 80])
def test_in_float32_it_is_that_of_float64_and_finite_on_extreme_rows(scale):
    losses = []
    for dtype in (torch.float64, torch.float32):
        student, teacher = (
            [(scale * logits).to(dtype) for logits in both] for both in (STUDENT, TEACHER)
        )
        student = [logits.requires_grad_() for logits in student]
        losses.append(paired_crld(student, teacher, **DEFAULTS))
        losses[-1].backward()
        assert all(torch.isfinite(logits.grad).all() for logits in student)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
