"""Metrics against hand-computed values and independent ones; statistics by their rates."""

from math import comb, log

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from pipeline.comparison import metrics, statistics

CLASSES = 7


@pytest.fixture(params=[0, 1, 2])
def predictions(request) -> tuple[np.ndarray, np.ndarray]:
    """[200, 7] logits that favour the label, and [200] labels."""
    rng = np.random.default_rng(request.param)
    labels = rng.integers(0, CLASSES, 200)
    logits = rng.normal(0, 2, (200, CLASSES)).astype(np.float32)
    logits[np.arange(200), labels] += 2
    return logits, labels


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_equals_torchmetrics(predictions, k):
    logits, labels = predictions
    expected = multiclass_accuracy(*tensors(*predictions), CLASSES, top_k=k, average="micro")
    assert metrics.top_k_correct(logits, labels, k).mean() == pytest.approx(float(expected))


def test_top_1_equals_argmax_for_equal_logits():
    logits, labels = np.zeros((3, 3), np.float32), np.arange(3)
    assert metrics.top_k_correct(logits, labels, 1).tolist() == [True, False, False]
    assert metrics.top_k_correct(logits, labels, 2).tolist() == [True, True, False]
    assert metrics.top_k_correct(logits, labels, 5).all()  # of 3 classes


def test_nll_equals_torch(predictions):
    logits, labels = tensors(*predictions)
    expected = F.cross_entropy(logits.double(), labels, reduction="none")
    np.testing.assert_allclose(metrics.nll(*predictions), expected, rtol=1e-9)


def test_nll_of_equal_logits_is_the_logarithm_of_the_class_count():
    assert metrics.nll(np.full((2, 8), 1e4), np.array([0, 5])) == pytest.approx([log(8)] * 2)


def test_kl_equals_torch_and_is_0_for_equal_logits(predictions):
    logits, _ = predictions
    other = logits[::-1] * 0.7
    teacher, model = (F.log_softmax(t.double(), 1) for t in tensors(logits, other.copy()))
    expected = F.kl_div(model, teacher, log_target=True, reduction="none").sum(1)
    np.testing.assert_allclose(metrics.kl_divergence(logits, other), expected, rtol=1e-9)
    np.testing.assert_allclose(metrics.kl_divergence(logits, logits), 0)


def test_kl_is_weighted_by_the_teachers_probabilities():
    """By hand: the teacher's odds are 3 to 1, the model's 1 to 1."""
    teacher, model = np.log([[3.0, 1.0]]), np.zeros((1, 2))
    expected = 0.75 * log(1.5) + 0.25 * log(0.5)
    assert metrics.kl_divergence(teacher, model) == pytest.approx([expected])


def test_the_calibration_error_equals_torchmetrics(predictions):
    logits, labels = predictions
    expected = multiclass_calibration_error(*tensors(*predictions), CLASSES, n_bins=15, norm="l1")
    assert metrics.calibration_error(logits, labels) == pytest.approx(float(expected), abs=1e-6)


def test_the_calibration_error_equals_a_hand_computed_one():
    """Four predictions of confidence 0.8, three correct: 5 points of overconfidence."""
    logits = np.log(np.tile([[0.8, 0.2]], (4, 1)))
    assert metrics.calibration_error(logits, np.array([0, 0, 0, 1])) == pytest.approx(0.05)


def test_reliability_counts_every_sample_once_and_confidence_1_in_the_last_bin():
    logits = np.array([[0.0, 1e4], [0.0, 0.0], [0.0, 1e4]])
    count, confidence, accuracy = metrics.reliability(logits, np.array([1, 0, 0])).T
    assert count.tolist() == [0] * 7 + [1] + [0] * 6 + [2]
    assert (confidence[7], confidence[14]) == (0.5, 1)
    assert (accuracy[7], accuracy[14]) == (1, 0.5)


def test_the_fitted_temperature_minimises_nll(predictions):
    logits, labels = predictions
    temperature = metrics.fitted_temperature(logits, labels)
    candidates = np.geomspace(0.2, 10, 4000)
    losses = [metrics.nll(logits.astype(float) / t, labels).mean() for t in candidates]
    assert temperature == pytest.approx(candidates[np.argmin(losses)], rel=2e-3)


def test_the_fitted_temperature_undoes_a_scale(predictions):
    logits, labels = predictions
    scaled = metrics.fitted_temperature(logits * 3, labels)
    assert scaled == pytest.approx(3 * metrics.fitted_temperature(logits, labels), rel=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_no_temperature_is_fitted_if_all_predictions_are_correct_or_all_wrong(sign):
    logits, labels = sign * np.eye(4) * 5, np.arange(4)
    assert metrics.fitted_temperature(logits, labels) is None


def test_macro_f1_equals_torchmetrics(predictions):
    logits, labels = predictions
    decisions = logits.argmax(1)
    decisions[labels == 3], labels[labels == 3] = 4, 4  # class 3 is nowhere
    decisions[decisions == 3] = 4
    theirs = multiclass_f1_score(*tensors(decisions, labels), CLASSES, average="macro")
    assert metrics.macro_f1(decisions, labels) == pytest.approx(float(theirs))


def test_class_accuracy_equals_torchmetrics(predictions):
    logits, labels = predictions
    expected = multiclass_accuracy(*tensors(*predictions), CLASSES, average="none")
    ours = metrics.class_accuracy(logits.argmax(1), labels, CLASSES)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_a_class_without_samples_has_no_accuracy():
    ours = metrics.class_accuracy(np.array([0, 1]), np.array([0, 0]), 3)
    np.testing.assert_array_equal(ours, [0.5, np.nan, np.nan])


def test_the_confusion_matrix_equals_torchmetrics(predictions):
    logits, labels = predictions
    decisions = logits.argmax(1)
    expected = multiclass_confusion_matrix(*tensors(decisions, labels), CLASSES)
    np.testing.assert_array_equal(metrics.confusion(labels, decisions, CLASSES), expected)


def correct_pairs(rng: np.random.Generator, both: float, first: float, second: float, count: int):
    """Draw whether two models are correct, from the chances of both or only one: [count, 2]."""
    chance = [both, first, second, 1 - both - first - second]
    outcome = rng.choice(4, count, p=chance)
    return np.stack([outcome <= 1, (outcome == 0) | (outcome == 2)], 1)


def test_mcnemar_equals_twice_the_binomial_tail():
    rng = np.random.default_rng(0)
    for _ in range(50):
        correct = correct_pairs(rng, 0.6, *rng.uniform(0, 0.2, 2), 120)
        only = (
            int((correct[:, 0] > correct[:, 1]).sum()),
            int((correct[:, 0] < correct[:, 1]).sum()),
        )
        tail = sum(comb(sum(only), k) for k in range(min(only) + 1)) / 2 ** sum(only)
        assert statistics.mcnemar(*correct.T) == pytest.approx(min(1, 2 * tail))


def test_mcnemar_holds_for_many_samples():
    first = np.arange(40_000) % 10 < 6  # 60 %
    second = np.arange(40_000) % 10 >= 4  # 60 %, with 8,000 on either side
    assert statistics.mcnemar(first, second) == 1.0
    assert 0 <= statistics.mcnemar(first, np.zeros_like(first)) < 1e-300


def test_mcnemar_of_a_model_with_itself_is_1():
    correct = np.random.default_rng(0).random(50) < 0.7
    assert statistics.mcnemar(correct, correct) == 1.0


def test_mcnemar_rejects_equal_models_at_most_at_its_level():
    rng = np.random.default_rng(3)
    p_values = [statistics.mcnemar(*correct_pairs(rng, 0.8, 0.06, 0.06, 300).T) for _ in range(500)]
    assert np.mean(np.array(p_values) < 0.05) <= 0.05 + 0.02  # two standard errors


def test_holm_equals_hand_computed_values():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_the_bootstrap_has_the_mean_and_the_standard_error_of_theory():
    values = np.random.default_rng(0).random((400, 2)) < [0.8, 0.5]
    means = statistics.bootstrap_means(values)
    assert means.shape == (statistics.RESAMPLES, 2)
    np.testing.assert_allclose(means.mean(0), values.mean(0), atol=0.002)
    np.testing.assert_allclose(means.std(0), values.std(0) / 20, rtol=0.05)


def test_the_bootstrap_is_paired_and_deterministic(monkeypatch):
    values = np.random.default_rng(0).random((100, 1)) < 0.7
    twice = np.concatenate([values, values], 1)
    means = statistics.bootstrap_means(twice)
    np.testing.assert_array_equal(means[:, 0], means[:, 1])
    np.testing.assert_array_equal(means, statistics.bootstrap_means(twice))
    assert len(np.unique(means[:, 0])) > 10


@pytest.mark.parametrize(
    ("both", "first", "second"), [(0.7, 0.1, 0.1), (0.75, 0.1, 0.05), (0.9, 0.04, 0.02)]
)
def test_the_interval_of_a_gain_covers_the_truth_at_its_rate(both, first, second):
    """Of 400 test sets of 300 images, 95 % have a paired interval that holds the true gain."""
    rng, hits, trials = np.random.default_rng(5), 0, 400
    for _ in range(trials):
        correct = correct_pairs(rng, both, first, second, 300)
        means = statistics.bootstrap_means(correct, resamples=500)
        low, high = statistics.interval(means[:, 0] - means[:, 1])
        hits += low - 1e-9 <= first - second <= high + 1e-9
    assert 0.92 <= hits / trials <= 0.975  # three standard errors below; counts are discrete
