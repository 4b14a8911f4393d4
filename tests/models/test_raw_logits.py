"""Numbers that are no raw logits are recognised, whatever made them; logits are not."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import squeezenet1_1

from pipeline.models.raw_logits import recognise

RNG = np.random.default_rng(0)
CLASSES = RNG.integers(0, 5, 60)
LOGITS = RNG.normal(0, 2, (60, 5)) + 5 * np.eye(5)[CLASSES]
SIGMOID = 1 / (1 + np.exp(3 - LOGITS))
SOFTMAX = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
ONE_HOT = np.eye(5)[CLASSES]
SUM = "which are not negative and add up to"


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (SOFTMAX, f"probabilities, {SUM} 1"),
        (SOFTMAX.astype(np.float16), f"probabilities, {SUM} 1"),
        (np.sqrt(SOFTMAX) / np.sqrt(SOFTMAX).sum(1, keepdims=True), f"probabilities, {SUM} 1"),
        (SOFTMAX[:, :2] / SOFTMAX[:, :2].sum(1, keepdims=True), f"probabilities, {SUM} 1"),
        (SOFTMAX[:1], f"probabilities, {SUM} 1"),  # as for a blank image
        (SOFTMAX[:3], f"probabilities, {SUM} 1"),
        (100 * SOFTMAX, f"percentages, {SUM} 100"),
        (np.round(100 * SOFTMAX, 1), f"percentages, {SUM} 100"),
        (np.round(255 * SOFTMAX), f"probabilities in 255ths, {SUM} 255"),
        (7.5 * SOFTMAX, f"scaled probabilities, {SUM} 7.5"),
        (0.9 * ONE_HOT + 0.02, f"probabilities, {SUM} 1"),
        (ONE_HOT, "hard labels, which are 0 or 1"),
        (100 * ONE_HOT, "hard labels, which are 0 or 100"),
        (SIGMOID, "numbers from 0 to 1, as of a sigmoid"),
        (SIGMOID.round(2), "numbers from 0 to 1, as of a sigmoid"),
        (100 * SIGMOID, "numbers from 0 to 100, as of a sigmoid"),
        (np.where(ONE_HOT == 1, SOFTMAX, 0), "numbers from 0 to 1, as of a sigmoid or of some of"),
    ],
)
def test_numbers_that_are_no_logits_are_recognised_with_an_example(rows, kind):
    found = recognise(rows)
    assert found is not None
    assert found.kind.startswith(kind)
    assert found.example == "[" + ", ".join(f"{number:.4g}" for number in rows[found.row]) + "]"


@pytest.mark.parametrize(
    "rows",
    [
        LOGITS,
        LOGITS - 20_000,
        LOGITS + 1e6,
        LOGITS - LOGITS.mean(1, keepdims=True) + 3000,  # rows of one sum, as training makes them
        np.log(SOFTMAX),
        np.log(np.maximum(SOFTMAX, 1e-7)),
        np.maximum(LOGITS, 0),  # the network ends in a ReLU
        np.maximum(LOGITS - 4, 0),
        np.maximum(LOGITS, 0) / LOGITS.max(),  # of a small scale
        LOGITS[:, :2],
        LOGITS[:, :1] * [1, -1],  # two classes whose sum is always 0
        LOGITS[:1],
        LOGITS[:3],
        np.zeros((60, 5)),
        3 * ONE_HOT,  # of a rule: its softmax is what it says
        10 * ONE_HOT - 5,
        np.tile([0.2, 0.5, 0.3], (60, 1)),  # a dead network, and every image is the same to it
        np.full((60, 5), 1e6),
        np.full((2, 5), np.nan),
        np.zeros((0, 5)),
    ],
)
def test_logits_are_not_taken_for_anything_else(rows):
    assert recognise(rows) is None


def test_untrained_networks_return_logits():
    for seed in range(40):
        torch.manual_seed(seed)
        features = torch.randn(64, 32).relu()
        for num_classes in (2, 3, 10):
            with torch.inference_mode():
                logits = nn.Linear(32, num_classes)(features).numpy()
            assert recognise(logits) is None
    torch.manual_seed(2)
    network = squeezenet1_1(num_classes=3).eval()  # ends in a ReLU, and a mean
    with torch.inference_mode():
        assert recognise(network(torch.randn(12, 3, 64, 64)).numpy()) is None
