"""The student's loss."""

import math

import numpy as np
import pytest
import torch

from pipeline.encodings import decode, encode
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


def test_the_loss_with_the_tail_in_one_bucket_is_the_value_computed_by_hand():
    # Teacher (1/2, 1/4, 1/8, 1/8), student (1/4, 1/4, 1/3, 1/6); classes 2 and 3 are the tail:
    # p = (1/2, 1/4 | 1/4), q = (1/4, 1/4 | 1/2).
    teacher = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]], dtype=torch.float64).log()
    student = torch.tensor([[1 / 4, 1 / 4, 1 / 3, 1 / 6]], dtype=torch.float64).log()
    kept = torch.tensor([[True, True, False, False]])
    by_hand = 1 / 2 * math.log(2) + 0 + 1 / 4 * math.log(1 / 2)
    loss = distillation_loss(student, teacher, temperature=1.0, kept=kept)
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)
    # T = 2 on twice the logits is the same, times T**2 = 4.
    loss = distillation_loss(2 * student, 2 * teacher, temperature=2.0, kept=kept)
    assert loss.item() == pytest.approx(4 * by_hand, rel=1e-12)


def test_the_loss_with_the_tail_spread_is_the_value_computed_by_hand():
    # The same, the teacher's tail of 1/4 spread over classes 2 and 3 as 1/8 each: the bucket's
    # terms, and that of the tail's shares, 1/4 * KL((1/2, 1/2) || (2/3, 1/3)).
    rows = np.log(np.array([[1 / 2, 1 / 4, 3 / 16, 1 / 16]], np.float32))
    labels = np.array([0])
    dense, _ = decode(encode(rows, labels, "top_k", 2), labels, 4, temperature=1.0)
    student = torch.tensor([[1 / 4, 1 / 4, 1 / 3, 1 / 6]], dtype=torch.float64).log()
    loss = distillation_loss(student, torch.from_numpy(dense).double(), temperature=1.0)
    bucket = 1 / 2 * math.log(2) + 1 / 4 * math.log(1 / 2)
    shares = 1 / 4 * (1 / 2 * math.log(3 / 4) + 1 / 2 * math.log(3 / 2))
    assert loss.item() == pytest.approx(bucket + shares, abs=2e-3)  # float16 logits


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("tail", ["spread", "bucket"])
def test_top_k_equals_dense_when_k_is_the_number_of_classes(tail, temperature):
    rng = np.random.default_rng(0)
    rows, labels = 4 * rng.standard_normal((8, 10)).astype(np.float32), rng.integers(0, 10, 8)
    teacher, kept = decode(encode(rows, labels, "top_k", 10), labels, 10, temperature=temperature)
    student = torch.from_numpy(rng.standard_normal((8, 10)).astype(np.float32))
    common = {"temperature": temperature, "soft_label_weight": 0.9, "hard_label_weight": 0.1}
    dense, sparse = (
        soft_and_hard_loss(student, torch.from_numpy(labels), *map(torch.from_numpy, rows), **extra)
        for rows, extra in (
            ((rows.astype(np.float16).astype(np.float32),), common),
            ((teacher, kept), common | {"tail": tail}),
        )
    )
    assert sparse.item() == pytest.approx(dense.item(), rel=1e-6)
    assert tail == "bucket" or sparse.item() == dense.item()


def test_gradients_of_the_bucket_are_those_of_its_probabilities_in_float64():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 10), 5 * torch.randn(6, 10)
    kept = torch.rand(6, 10) < 0.4
    kept[0], kept[1] = True, False
    for temperature in (1.0, 4.0, 20.0):
        exact = student.double().requires_grad_()
        loss = distillation_loss(exact, teacher.double(), temperature=temperature, kept=kept)
        (gradient,) = torch.autograd.grad(loss, exact)
        q, p = (torch.softmax(x.double() / temperature, 1) for x in (student, teacher))
        q_tail, p_tail = (x.masked_fill(kept, 0).sum(1, keepdim=True) for x in (q, p))
        by_class = torch.where(kept, q - p, q - p_tail * q / q_tail.clamp_min(1e-300))
        torch.testing.assert_close(gradient, temperature * by_class / 6, rtol=1e-9, atol=1e-14)
        assert torch.autograd.gradcheck(
            lambda x, t=temperature: distillation_loss(
                x, teacher.double(), temperature=t, kept=kept
            ),
            exact,
        )
        single = student.clone().requires_grad_()
        loss = distillation_loss(single, teacher, temperature=temperature, kept=kept)
        (approximate,) = torch.autograd.grad(loss, single)
        torch.testing.assert_close(approximate.double(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_bucket_is_finite_for_extreme_logits_and_for_rows_without_a_tail(dtype):
    student = torch.tensor([[80, -80, 0, 0], [-80, 80, 0, 0], [0, 0, 80, -80.0]], dtype=dtype)
    kept = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 1]]).bool()
    student.requires_grad_()
    loss = distillation_loss(student, -student.detach(), temperature=1.0, kept=kept)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_what_was_kept_matters_to_the_bucket_alone():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(4, 10), torch.randn(4, 10), torch.arange(4)
    kept = torch.rand(4, 10) < 0.5
    weights = {"temperature": 4.0, "soft_label_weight": 1.0, "hard_label_weight": 0.0}
    dense = soft_and_hard_loss(student, labels, teacher, **weights)
    spread = soft_and_hard_loss(student, labels, teacher, kept, **weights, tail="spread")
    bucket = soft_and_hard_loss(student, labels, teacher, kept, **weights, tail="bucket")
    of_a_dense_store = soft_and_hard_loss(student, labels, teacher, None, **weights, tail="bucket")
    assert dense.item() == spread.item() == of_a_dense_store.item()
    assert bucket.item() < dense.item()
