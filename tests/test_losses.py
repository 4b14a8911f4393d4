"""The student's loss."""

import math

import pytest
import torch

from pipeline.losses import distillation_loss, soft_and_hard_loss


def test_distillation_loss_is_the_value_computed_by_hand():
    # Teacher [ln 3, 0], student [0, 0], T = 1: p = (3/4, 1/4), q = (1/2, 1/2).
    student, teacher = (
        torch.zeros(1, 2).double(),
        torch.tensor([[math.log(3), 0.0]], dtype=torch.float64),
    )
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    loss = distillation_loss(student, teacher, temperature=1.0)
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)
    # T = 2 on [2 ln 3, 0] is the same p, times T**2 = 4.
    loss = distillation_loss(student, 2 * teacher, temperature=2.0)
    assert loss.item() == pytest.approx(4 * by_hand, rel=1e-12)


def test_distillation_loss_is_a_mean_over_the_batch_and_not_over_classes():
    student, teacher = torch.randn(1, 10), torch.randn(1, 10)
    one = distillation_loss(student, teacher, temperature=3.0)
    many = distillation_loss(student.repeat(5, 1), teacher.repeat(5, 1), temperature=3.0)
    assert many.item() == pytest.approx(one.item(), rel=1e-6)


def test_the_gradient_is_temperature_times_the_difference_of_the_softened_probabilities():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 10).double().requires_grad_(), torch.randn(6, 10).double()
    for temperature in (1.0, 4.0, 20.0):
        (gradient,) = torch.autograd.grad(
            distillation_loss(student, teacher, temperature=temperature), student
        )
        q, p = (torch.softmax(logits / temperature, 1) for logits in (student, teacher))
        torch.testing.assert_close(gradient, temperature * (q - p) / 6, rtol=1e-10, atol=1e-14)


def test_temperature_squared_keeps_the_scale_of_the_gradient_at_high_temperatures():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 10).double().requires_grad_(), torch.randn(6, 10).double()
    norms = [
        torch.autograd.grad(distillation_loss(student, teacher, temperature=t), student)[0].norm()
        for t in (100.0, 200.0)
    ]
    assert norms[1].item() == pytest.approx(norms[0].item(), rel=0.01)


def test_the_whole_loss_is_the_weighted_sum_of_its_two_terms():
    student = torch.zeros(1, 2).double()
    teacher = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    loss = soft_and_hard_loss(
        student,
        torch.tensor([1]),
        teacher,
        temperature=1.0,
        soft_label_weight=0.9,
        hard_label_weight=0.1,
    )
    soft = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert loss.item() == pytest.approx(0.9 * soft + 0.1 * math.log(2), rel=1e-12)


def test_half_precision_logits_are_computed_in_float32():
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 100).half(), torch.randn(8, 100).half()
    loss = distillation_loss(student, teacher, temperature=4.0)
    assert loss.dtype == torch.float32
    exact = distillation_loss(student.double(), teacher.double(), temperature=4.0)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_a_student_that_answers_like_the_teacher_has_no_loss():
    logits = torch.randn(4, 10)
    assert distillation_loss(logits, logits, temperature=4.0).item() == pytest.approx(0, abs=1e-6)
