"""The weights kept are those of the latest epoch that validation cannot tell from the best."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import OUTPUTS, change_params, forget_trainings, run_module, run_stage, write_params
from safetensors.torch import load_file

from pipeline.comparison.measurement.statistics import mcnemar
from pipeline.runtime.errors import UserError
from pipeline.students import loop
from pipeline.students.kept_epoch import is_best, is_kept, mcnemar_p_value


def kept_by(rule: str, epochs: list[torch.Tensor], nll: list[float]) -> int:
    """The epoch that the rule keeps of these, [N] bool each: which images are classified
    correctly."""
    history, best, kept = [], torch.empty(0), 0
    for number, correct in enumerate(epochs, start=1):
        accuracy = correct.double().mean().item()
        history.append({"validation_accuracy": accuracy, "validation_nll": nll[number - 1]})
        if is_best(history):
            best = correct
        if is_kept(rule, history, correct, best):
            kept = number
    return kept


def correct(wrong: list[int], count: int = 40) -> torch.Tensor:
    flags = torch.ones(count, dtype=torch.bool)
    flags[wrong] = False
    return flags


RULES = ("latest_not_worse", "best", "last")
HISTORIES = {
    # 5 of 5 discordant images for the best: p = 2 / 32; of 6, p = 2 / 64.
    "a worse epoch within the noise of validation": ([[], range(5)], (2, 1, 2)),
    "a significantly worse epoch": ([[], range(6)], (1, 1, 2)),
    "as many wrong, but others": ([range(6), range(10, 16)], (2, 1, 2)),
    "a later best, with an epoch before it that no later one is worse than": (
        [range(3), range(8), range(2), range(4), range(9)],
        (4, 3, 5),
    ),
    "an epoch that is not worse than the last best though it is worse than none before": (
        [range(20), range(7), range(20, 29), [], range(6), range(5, 10), range(7)],
        (6, 4, 7),
    ),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_the_latest_epoch_that_is_not_significantly_worse_than_the_best_is_kept(name):
    wrong, expected = HISTORIES[name]
    epochs = [correct(list(numbers)) for numbers in wrong]
    nll = [0.5 + 0.01 * number for number in range(len(epochs))]
    assert tuple(kept_by(rule, epochs, nll) for rule in RULES) == expected


def test_of_equally_accurate_epochs_the_best_has_the_lower_nll_and_the_first_of_equals():
    same = [correct([1]), correct([2]), correct([3])]
    assert kept_by("best", same, [0.3, 0.2, 0.2]) == 2


def test_one_kept_state_is_enough_the_rule_epoch_by_epoch_is_that_of_the_whole_history():
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(60):
        quality = rng.uniform(0.4, 0.95, 8).round(1)
        epochs = [torch.from_numpy(rng.random(60) < share) for share in quality]
        accuracies = np.array([flags.double().mean().item() for flags in epochs])
        best = int(accuracies.argmax())  # equal NLL: the first of equals
        not_worse = [
            number
            for number, flags in enumerate(epochs[best:], start=best + 1)
            if mcnemar(flags.numpy(), epochs[best].numpy()) >= 0.05
        ]
        kept = kept_by("latest_not_worse", epochs, [1.0] * 8)
        assert kept == max(not_worse)
        found.add((kept == best + 1, kept == 8))
    assert found == {(True, True), (True, False), (False, True), (False, False)}


def test_the_p_value_is_that_of_the_comparison():
    rng = np.random.default_rng(1)
    for count in (1, 12, 300, 5000):
        first, second = rng.random((2, count)) < rng.uniform(0.3, 1, (2, 1))
        ours = mcnemar_p_value(torch.from_numpy(first), torch.from_numpy(second))
        assert ours == mcnemar(first, second)
    assert mcnemar_p_value(torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)) == 1


def metrics_of(kind: str) -> dict:
    return json.loads(Path(f"metrics/{kind}/small.json").read_text("utf-8"))


def classify(monkeypatch, right: list[int]) -> tuple[list[dict], list[bool]]:
    """Let the epochs of a training classify so many of the 12 validation images correctly.

    Returns the weights after each epoch, and a list that a test can fill: its last element, which
    is then removed, says whether the next epoch ends in Ctrl-C.
    """
    original, states, interrupts = loop.evaluate, [], []

    def evaluate(network, spec, split, *rest):
        logits, metrics = original(network, spec, split, *rest)
        if split.name == "validation" and len(states) < len(right):
            if interrupts and interrupts.pop():
                raise KeyboardInterrupt
            correct = torch.arange(12) < right[len(states)]
            shown = (torch.from_numpy(split.labels) + ~correct) % 3
            logits = torch.nn.functional.one_hot(shown, 3).float()
            metrics = metrics | {"validation_accuracy": right[len(states)] / 12}
            states.append({key: value.clone() for key, value in network.state_dict().items()})
        return logits, metrics

    monkeypatch.setattr(loop, "evaluate", evaluate)
    return states, interrupts


@pytest.mark.parametrize(("stage", "kind"), [("student", "students"), ("baseline", "baselines")])
@pytest.mark.parametrize(("rule", "expected"), [*zip(RULES, (3, 2, 4), strict=True)])
def test_the_weights_predictions_and_metrics_are_those_of_the_epoch_kept(
    project, monkeypatch, stage, kind, rule, expected
):
    change_params("training", epochs=4, keep=rule)
    # 10 of 12 against 12: p = 2 / 4; 1 of 12 against 12: p = 2 / 2048.
    states, _ = classify(monkeypatch, [1, 12, 10, 1])
    run_stage(stage, "small")
    metrics = metrics_of(kind)
    assert metrics["kept_epoch"] == expected
    assert "best_epoch" not in metrics
    written = load_file(f"models/{kind}/small/weights.safetensors")
    assert all(torch.equal(written[key], states[expected - 1][key]) for key in written)
    assert (metrics["test_nll"] == metrics["last_epoch_test_nll"]) == (rule == "last")


def test_a_student_overrides_the_rule_of_its_training_section(project):
    change_params("training", keep="best", epochs=1)
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["students"]["small"]["training"] = {"epochs": 3, "keep": "last"}
    write_params(Path(), params)
    run_stage("baseline", "small")
    assert metrics_of("baselines")["kept_epoch"] == 3


def test_the_rule_is_no_key_of_the_teacher_whose_last_epoch_is_kept(project):
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["teacher"]["training"]["keep"] = "best"
    write_params(Path(), params)
    message = "`params.yaml: teacher.training.keep` is unknown"
    with pytest.raises(UserError, match=re.escape(message)):
        run_stage("teacher")
    with pytest.raises(UserError, match=re.escape(message)):
        run_module("pipeline.commands.check")


def test_a_training_killed_after_its_best_epoch_keeps_the_same_epoch(project, monkeypatch):
    """The rule needs what the best epoch classified correctly: that is in the state."""
    change_params("training", epochs=4)
    paths = [Path(path.format(kind="students")) for path in OUTPUTS]
    written = []
    for interrupted in (False, True):
        with monkeypatch.context() as patch:
            forget_trainings()
            _, interrupts = classify(patch, [12, 10, 1, 1])
            for _ in range(3 * interrupted):  # one more epoch in each run
                interrupts[:] = [True, False]
                with pytest.raises(KeyboardInterrupt):
                    run_stage("student", "small")
            run_stage("student", "small")
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    assert metrics_of("students")["kept_epoch"] == 2
