"""MLKD of a weak and a strong view, from its formula written out in NumPy, in float64.

`test_golden_losses.py` compares the same objective with values of both authors' code.
"""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from pipeline.distillation.losses import mlkd, paired_mlkd


def instances(student: np.ndarray, teacher: np.ndarray, temperature: float, standard: bool):
    if standard:
        student, teacher = (
            (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-7)
            for x in (student, teacher)
        )
    s, t = log_softmax(student / temperature, 1), log_softmax(teacher / temperature, 1)
    return temperature**2 * np.mean(np.sum(np.exp(t) * (t - s), axis=1))


def correlations(student: np.ndarray, teacher: np.ndarray, temperature: float):
    """Of the batch, and of the classes."""
    s, t = softmax(student / temperature, 1), softmax(teacher / temperature, 1)
    return (
        np.sum((t @ t.T - s @ s.T) ** 2) / len(s),
        np.sum((t.T @ t - s.T @ s) ** 2) / s.shape[1],
    )


def released(weak: tuple, strong: tuple, temperatures: list[float], standard: bool) -> float:
    """The objective without cross-entropies. The masks are of samples and of classes that the
    teacher is less sure of; the code multiplies means by them, and takes the mean again."""
    probabilities = softmax(weak[1], 1)
    sure, summed = probabilities.max(1), probabilities.sum(0)
    sample_mask = sure <= np.percentile(sure, 50)
    class_mask = summed <= np.percentile(summed, 50)
    total = 0.0
    for place, temperature in enumerate(temperatures):
        of_batch, of_classes = correlations(*weak, temperature)
        total += np.mean(instances(*weak, temperature, standard) * sample_mask)
        total += np.mean(of_batch * sample_mask) + np.mean(of_classes * class_mask)
        second = strong if place in (0, 1, 2) else weak
        total += instances(*second, temperature, standard)
    return total


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize(("batch", "classes"), [(8, 10), (7, 5), (2, 3), (9, 2)])
def test_the_loss_of_a_pair_is_the_released_formula(batch, classes, standard):
    rng = np.random.default_rng([batch, classes])
    student, teacher = (3 * rng.standard_normal((2, batch, classes)) for _ in range(2))
    teacher[0, 1] = teacher[0, 0]  # equal confidences
    temperatures = [2.0 if standard else 4.0, 3.0, 5.0, 2.0, 6.0]
    weak, strong = zip(student, teacher, strict=True)
    loss = paired_mlkd(
        torch.from_numpy(student),
        torch.from_numpy(teacher),
        temperatures=temperatures,
        standardize=standard,
    )
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(released(weak, strong, temperatures, standard), rel=1e-12)


def test_it_is_0_where_student_and_teacher_are_equal_and_differs_from_one_view():
    rng = np.random.default_rng(0)
    student, teacher = (torch.from_numpy(3 * rng.standard_normal((2, 8, 5))) for _ in range(2))
    temperatures = [4.0, 3.0, 5.0, 2.0, 6.0]
    equal = paired_mlkd(teacher, teacher, temperatures=temperatures)
    assert equal.item() == pytest.approx(0, abs=1e-12)
    one = mlkd(student[0], teacher[0], temperatures=temperatures)
    assert paired_mlkd(student, teacher, temperatures=temperatures) != one


@pytest.mark.parametrize("scale", [3, 80])
def test_in_float32_it_is_that_of_float64_and_finite_on_extreme_rows(scale):
    rng = np.random.default_rng(1)
    student, teacher = (torch.from_numpy(scale * rng.standard_normal((2, 6, 7))) for _ in range(2))
    losses = {}
    for dtype in (torch.float64, torch.float32):
        rows = student.to(dtype, copy=True).requires_grad_(True)
        loss = paired_mlkd(rows, teacher.to(dtype), temperatures=[4.0, 3.0, 5.0, 2.0, 6.0])
        loss.backward()
        assert torch.isfinite(rows.grad).all()
        losses[dtype] = loss.item()
    assert np.isfinite(losses[torch.float32])
    if scale == 3:  # at 80 the teacher's confidences round to 1 in float32, and so are all equal
        assert losses[torch.float32] == pytest.approx(losses[torch.float64], rel=1e-5)
