"""Metrics against hand-computed values and independent ones; statistics by their rates."""

from functools import partial
from math import comb, log

import numpy as np
import pytest
import scipy
import torch
from torch.nn import functional as F

from pipeline.comparison import metrics
from pipeline.comparison.compare import Predictions, model_metrics
from pipeline.comparison.measurement import statistics

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


def test_metrics_equal_those_of_torch_and_torchmetrics(predictions):
    from torchmetrics.functional.classification import (  # noqa: PLC0415  (loads for seconds)
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_f1_score,
        multiclass_precision,
    )

    logits, labels = predictions
    labels[labels == 3] = 4  # class 3 has no images
    teacher_logits = logits[::-1] * 0.7
    no_costs = {"parameters": None, "macs": None, "size_bytes": None}
    teacher, model = (
        Predictions(name=name, role=name, path=None, validation=x, test=x, **no_costs)
        for name, x in (("teacher", teacher_logits), ("distilled", logits))
    )
    splits = {"validation": labels, "test": labels}
    ours = model_metrics(model, teacher, splits, np.array([0, 1]), None)
    given = tensors(logits, labels)
    log_teacher, log_model = (F.log_softmax(t.double(), 1) for t in tensors(teacher_logits, logits))
    divergence = F.kl_div(log_model, log_teacher, log_target=True, reduction="none").sum(1)
    decided = tensors(logits.argmax(1), labels)
    ece = partial(multiclass_calibration_error, num_classes=CLASSES, n_bins=15, norm="l1")
    scaled = given[0] / ours.temperature
    for name, expected in {
        "accuracy": multiclass_accuracy(*given, CLASSES, average="micro"),
        "top5": multiclass_accuracy(*given, CLASSES, top_k=5, average="micro"),
        "nll": F.cross_entropy(given[0].double(), given[1]),
        "ece": ece(*given),
        "ece_scaled": ece(scaled, given[1]),
        "macro_f1": multiclass_f1_score(*decided, CLASSES, average="macro"),
        "kl": divergence.mean(),
    }.items():
        assert getattr(ours, name) == pytest.approx(float(expected), rel=1e-5), name
    np.testing.assert_allclose(ours.divergences, divergence, rtol=1e-9)
    class_accuracy = multiclass_accuracy(*given, CLASSES, average="none")
    class_accuracy[3] = np.nan
    np.testing.assert_allclose(ours.class_accuracy, class_accuracy, rtol=1e-6)
    class_precision = multiclass_precision(*given, CLASSES, average="none").numpy()
    class_precision[np.bincount(logits.argmax(1), minlength=CLASSES) == 0] = np.nan
    np.testing.assert_allclose(ours.class_precision, class_precision, rtol=1e-6)
    confidences = torch.from_numpy(logits).double().softmax(1).amax(1)
    np.testing.assert_allclose(ours.confidences, confidences, rtol=1e-9)


def test_of_equal_logits_the_top_k_are_the_lowest_classes_as_in_argmax():
    logits, labels = np.zeros((3, 3), np.float32), np.arange(3)
    for k, expected in ((1, [True, False, False]), (2, [True, True, False]), (5, 3 * [True])):
        assert metrics.top_k_correct(logits, labels, k).tolist() == expected


def test_kl_is_weighted_by_the_teachers_probabilities():
    """By hand: the teacher's odds are 3 to 1, the model's 1 to 1."""
    teacher, model = np.log([[3.0, 1.0]]), np.zeros((1, 2))
    expected = 0.75 * log(1.5) + 0.25 * log(0.5)
    assert metrics.kl_divergence(teacher, model) == pytest.approx([expected])


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


@pytest.mark.parametrize("sign", [1, -1])
def test_no_temperature_is_fitted_if_all_predictions_are_correct_or_all_wrong(sign):
    logits, labels = sign * np.eye(4) * 5, np.arange(4)
    assert metrics.fitted_temperature(logits, labels) is None


def correct_pairs(rng: np.random.Generator, both: float, first: float, second: float, count: int):
    """Draw whether two models are correct, from the chances of both or only one: [count, 2]."""
    chance = [both, first, second, 1 - both - first - second]
    outcome = rng.choice(4, count, p=chance)
    return np.stack([outcome <= 1, (outcome == 0) | (outcome == 2)], 1)


def test_mcnemar_equals_twice_the_binomial_tail():
    rng = np.random.default_rng(0)
    for _ in range(50):
        correct = correct_pairs(rng, 0.6, *rng.uniform(0, 0.2, 2), 120)
        first, second = correct.T.astype(int)
        only = int((first > second).sum()), int((first < second).sum())
        tail = sum(comb(sum(only), k) for k in range(min(only) + 1)) / 2 ** sum(only)
        assert statistics.mcnemar(*correct.T) == pytest.approx(min(1, 2 * tail))


def test_mcnemar_holds_for_many_samples():
    first = np.arange(40_000) % 10 < 6  # 60 %
    second = np.arange(40_000) % 10 >= 4  # 60 %, with 8,000 on either side
    assert statistics.mcnemar(first, second) == 1.0
    assert 0 <= statistics.mcnemar(first, np.zeros_like(first)) < 1e-300


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


def test_the_interval_of_a_share_of_all_or_none_is_clopper_and_pearsons():
    correct = np.ones((200, 3), bool)
    correct[:, 1] = False
    correct[:20, 2] = False
    means = statistics.bootstrap_means(correct)
    found = statistics.share_intervals(correct, means)
    for column, successes in enumerate((200, 0)):
        exact = scipy.stats.binomtest(successes, 200).proportion_ci(0.95, method="exact")
        np.testing.assert_allclose(found[:, column], exact)
    np.testing.assert_array_equal(found[:, 2], statistics.interval(means)[:, 2])


def test_the_bootstrap_is_paired_and_deterministic():
    values = np.random.default_rng(0).random((100, 1)) < 0.7
    means = statistics.bootstrap_means(np.concatenate([values, values], 1))
    np.testing.assert_array_equal(means[:, :1], means[:, 1:])
    np.testing.assert_array_equal(means[:, :1], statistics.bootstrap_means(values))
    assert len(np.unique(means)) > 10


@pytest.mark.parametrize(("both", "first", "second"), [(0.7, 0.1, 0.1), (0.9, 0.04, 0.02)])
def test_the_interval_of_a_gain_covers_the_truth_at_its_rate(both, first, second):
    """Of 400 test sets of 300 images, 95 % have a paired interval that holds the true gain."""
    rng, hits, trials = np.random.default_rng(5), 0, 400
    for _ in range(trials):
        correct = correct_pairs(rng, both, first, second, 300)
        means = statistics.bootstrap_means(correct, resamples=500)
        low, high = statistics.interval(means[:, 0] - means[:, 1])
        hits += low - 1e-9 <= first - second <= high + 1e-9
    assert 0.92 <= hits / trials <= 0.975  # three standard errors below; counts are discrete
