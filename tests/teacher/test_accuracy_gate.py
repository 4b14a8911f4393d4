"""A teacher that knows little, or whose classes are in another order, is stopped before the cache,
and nothing of it is written."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import bytes_of, change_params, run_stage
from torch import nn

from pipeline.data.prepared.dataset import Dataset, open_dataset
from pipeline.models import checkpoint
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.params import load_section
from pipeline.teacher import accuracy_gate, chance
from pipeline.teacher.chance import compare_with_chance, confusion_matrix
from pipeline.teacher.outputs import warn_if_nearly_uniform
from pipeline.teacher.params import TeacherParams


def change_last_layer(change) -> None:
    """Take the project's own good teacher as a checkpoint, changed."""
    own, _ = checkpoint.load(TEACHER.model, produced_by="-")
    with torch.no_grad():
        change(own.fc)
    torch.save(own.state_dict(), "mine.pth")
    change_params("teacher", weights="checkpoint", checkpoint="mine.pth")


def reverse_classes(layer: nn.Linear) -> None:
    layer.weight.copy_(layer.weight.clone().flip(0))
    layer.bias.copy_(layer.bias.clone().flip(0))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (
            reverse_classes,
            "images of `ant` are predicted as `cat`, images of `cat` are predicted as `ant`\n"
            "The likeliest cause is the order of the classes. Set `teacher.checkpoint_classes`: "
            "for each class, in the order of the folders' names, the number of its output.",
        ),
        (
            lambda layer: layer.weight.zero_(),
            "  classes in the best other order: 33.33%, not significantly better\n"
            "Check that `teacher.checkpoint` was trained for these classes and images. "
            "Normalisations and input sizes were not tried.",
        ),
    ],
    ids=["order", "unknown"],
)
def test_the_gate_names_the_likeliest_cause_and_the_command_and_leaves_all_as_it_was(
    project, change, cause
):
    def outputs() -> tuple:
        written = (TEACHER.metrics, TEACHER.predictions)
        return (bytes_of(TEACHER.model), *(path.read_bytes() for path in written))

    before = outputs()
    change_last_layer(change)
    with pytest.raises(UserError) as refusal:
        run_stage("teacher")
    message = str(refusal.value)
    assert re.match(r"teacher accuracy on validation: 33.33% \(4 of 12\); expected sig", message)
    assert cause in message
    assert "Run `python -m pipeline.commands.diagnose_teacher`: it tries them together" in message
    assert outputs() == before


def check(
    labels: np.ndarray, predictions: np.ndarray, names: list[str] | None = None, **changed: object
) -> None:
    """Apply the gate to predictions of a checkpoint."""
    labels, predictions = np.asarray(labels, np.int64), torch.tensor(np.asarray(predictions))
    names = names or [f"class {c:03d}" for c in range(labels.max() + 1)]
    split = replace(open_dataset().splits["validation"], labels=labels)
    dataset: Dataset = replace(open_dataset(), class_names=names, splits={"validation": split})
    params = load_section(TeacherParams, "teacher")
    params = params.model_copy(update={"weights": "checkpoint", **changed})
    accuracy_gate.check(dataset, nn.functional.one_hot(predictions, len(names)).float(), params)


def refusal(*arguments: object, **changed: object) -> str:
    with pytest.raises(UserError) as error:
        check(*arguments, **changed)
    return str(error.value)


def wrong_after(labels: np.ndarray, correct: int) -> np.ndarray:
    """Predictions that are right for this many images alone."""
    return np.where(np.arange(len(labels)) < correct, labels, (labels + 1) % (labels.max() + 1))


RARE = np.repeat([0, 1], [190, 10])  # 950 : 50 of 1,000, a fifth of them in validation


def test_a_good_teacher_of_a_rare_class_passes(project):
    """98 % accuracy, all of the rare class found: the majority class always gives 95 %."""
    check(RARE, np.where(np.arange(200) < 4, 1, RARE))
    check(RARE, np.where(np.arange(200) < 40, 1, RARE))  # and of 80 %


def test_a_teacher_that_knows_one_class_of_many_passes(project):
    labels = np.arange(1000) % 100
    guesses = np.random.default_rng(0).permutation(labels)
    check(labels, np.where(labels == 7, 7, guesses))


def test_the_majority_class_always_and_guesses_by_the_marginals_are_refused(project):
    by_chance = "expected significantly more than 95.00%, which such predictions have by chance"
    assert by_chance in refusal(RARE, np.zeros(200, int))
    assert "expected significantly" in refusal(RARE, np.ones(200, int))
    for seed in range(20):
        refusal(RARE, np.random.default_rng(seed).permutation(RARE))


def test_a_teacher_passes_by_a_binomial_test_at_one_in_a_thousand(project):
    # Of 12 guesses at 1/3, 9 or more are right with probability 0.0039, 10 or more with 0.0005.
    labels = np.arange(12) % 3
    check(labels, wrong_after(labels, 10))
    assert "(9 of 12); expected significantly more than 33.33%" in refusal(
        labels, wrong_after(labels, 9)
    )


def test_the_minimum_accuracy_replaces_the_test_in_both_directions(project):
    labels = np.arange(12) % 3
    check(labels, wrong_after(labels, 12), minimum_accuracy=1.0)
    message = refusal(labels, wrong_after(labels, 10), minimum_accuracy=0.9)
    assert "expected `teacher.minimum_accuracy`, 90.00%, or more" in message
    check(labels, wrong_after(labels, 8), minimum_accuracy=0.5)  # 8 of 12 may be chance
    check(RARE, np.zeros(200, int), minimum_accuracy=0.9)


@pytest.mark.parametrize("correct", [55, 56, 57, 58])  # 0.55 * 100 is more than 55
def test_exactly_the_minimum_accuracy_passes(project, correct):
    labels = np.arange(100) % 3
    check(labels, wrong_after(labels, correct), minimum_accuracy=correct / 100)


def test_where_validation_is_too_small_to_judge_the_gate_says_so_and_what_would_do(project, capsys):
    check([0, 1, 2], [0, 1, 2])
    printed = capsys.readouterr().out
    assert "3 validation images of these classes are too few to tell" in printed
    assert "expected 7 or more (`dataset.validation_fraction`)" in printed  # 3**-7 < 0.001
    labels = np.arange(7) % 3
    assert compare_with_chance(confusion_matrix(labels, labels, 3)).is_significant


def test_a_refusal_for_few_images_says_how_many_would_show_this_accuracy(project):
    labels = np.arange(37) % 5
    message = refusal(labels, wrong_after(labels, 13))  # 35 %
    few = re.search(r"37 images are few: if this accuracy is its true one, (\d+) would", message)
    labels = np.arange(int(few[1])) % 5
    check(labels, wrong_after(labels, len(labels) * 13 // 37))
    assert "few" not in refusal(np.arange(5000) % 5, wrong_after(np.arange(5000) % 5, 1001))


def rates_at_chance(trials: int, level: float) -> np.ndarray:
    """How often each of the two tests passes predictions of chance, for several class mixes."""
    rng, rates = np.random.default_rng(0), []
    for num_classes, images, skew in ((2, 200, 0.05), (3, 12, 1), (10, 100, 1), (50, 200, 1)):
        labels_mix = np.full(num_classes, 1.0)
        labels_mix[0] = num_classes / skew
        mixes = (labels_mix / labels_mix.sum(), rng.dirichlet(np.ones(num_classes)))
        passed = np.zeros(2)
        for _ in range(trials):
            labels, predictions = (rng.choice(num_classes, images, p=mix) for mix in mixes)
            found = compare_with_chance(confusion_matrix(predictions, labels, num_classes))
            passed += [found.p_accuracy <= level, found.p_class <= level]
        rates.append(passed / trials)
    return np.array(rates)


def test_chance_passes_each_test_no_more_often_than_its_level():
    # 0.05 + 3 standard errors of 400 trials.
    assert (rates_at_chance(400, 0.05) < 0.083).all()


@pytest.mark.slow
def test_chance_passes_the_gate_less_than_twice_in_a_thousand():
    assert (rates_at_chance(20_000, chance.SIGNIFICANCE).sum(1) < 0.002).all()


def test_a_softmax_that_is_far_less_sure_than_right_is_warned_of(capsys):
    """Cosines without CLIP's scale, and outputs of a tanh."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 200)
    towards = rng.standard_normal((10, 64))
    images = towards[labels] + rng.standard_normal((200, 64))
    cosines = (
        torch.nn.functional.normalize(torch.tensor(images))
        @ torch.nn.functional.normalize(torch.tensor(towards)).T
    )
    for logits, warned in ((cosines, True), (100 * cosines, False), (5 * cosines.tanh(), False)):
        warn_if_nearly_uniform(logits, labels)
        assert ("multiply them by the scale" in capsys.readouterr().out) == warned
    wrong = (labels + 1) % 10
    warn_if_nearly_uniform(cosines, wrong)  # nor is it right
    assert capsys.readouterr().out == ""
