"""A teacher that knows little is stopped before the cache, and nothing of it is written."""

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
from pipeline.teacher import accuracy_gate
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
            "The likeliest cause is the order of the classes: the teacher's logits must be in the "
            "order of the folders' names, ant, bee, cat, .... images of `ant` are predicted as "
            "`cat`, images of `cat` are predicted as `ant`. Reorder the rows of its last layer, or",
        ),
        (
            lambda layer: layer.weight.zero_(),
            "No other order explains it. Check that `teacher.checkpoint` was trained for these "
            "classes and images.",
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
    assert "Run `python -m pipeline.commands.diagnose_teacher` to see its accuracy" in message
    assert outputs() == before


def check(dataset: Dataset, correct: int, **changed: object) -> None:
    """Apply the gate to logits that are right for this many images."""
    answers = torch.from_numpy(dataset.splits["validation"].labels).clone()
    answers[correct:] = (answers[correct:] + 1) % 3
    params = load_section(TeacherParams, "teacher").model_copy(update=changed)
    accuracy_gate.check(dataset, nn.functional.one_hot(answers, 3).float(), params)


def test_a_teacher_passes_by_a_binomial_test_at_one_in_a_thousand_and_the_users_minimum(project):
    # Of 12 guesses at 1/3, 9 or more are right with probability 0.0039, 10 or more with 0.0005.
    dataset = open_dataset()
    check(dataset, 10)
    with pytest.raises(UserError, match="9 of 12.*expected significantly more than 33.33%"):
        check(dataset, 9)
    check(dataset, 12, minimum_accuracy=1.0)
    with pytest.raises(UserError, match="expected `teacher.minimum_accuracy`, 90.00%, or more"):
        check(dataset, 10, minimum_accuracy=0.9)
    with pytest.raises(UserError, match="expected significantly more than 33.33%"):
        check(dataset, 8, minimum_accuracy=0.5)  # 8 of 12 may be chance


def test_where_validation_is_too_small_to_judge_the_gate_says_so(project, capsys):
    dataset = open_dataset()
    split = dataset.splits["validation"]
    few = replace(split, images=split.images[:3], labels=split.labels[:3])
    check(replace(dataset, splits={"validation": few}), 3)
    assert "3 validation images of these classes are too few to tell" in capsys.readouterr().out


def test_a_permutation_is_not_found_in_answers_that_are_chance():
    rng = np.random.default_rng(0)
    labels, answers = np.arange(200) % 50, rng.integers(0, 50, 200)
    trial = accuracy_gate.in_another_order(answers, labels, [str(c) for c in range(50)], False)
    best_for_these = accuracy_gate._assignment(answers, labels, 50)
    assert (best_for_these[labels] == answers).sum() > 40
    assert trial.correct < 10
