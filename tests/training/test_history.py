"""The history of a training: what the page draws and `dvc plots` shows."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from conftest import PARAMS, run_stage

from pipeline.runtime.outputs import TEACHER, ModelOutputs
from pipeline.runtime.progress import EpochLog
from pipeline.training.history import COLUMNS, write_history

OUTPUTS = {
    "teacher": TEACHER,
    "student": ModelOutputs("distilled", "small"),
    "baseline": ModelOutputs("baseline", "small"),
}


@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_history_has_a_row_per_epoch_and_the_learning_rate_of_its_last_step(
    finished_project, stage
):
    training = PARAMS["teacher"]["training"] if stage == "teacher" else PARAMS["training"]
    epochs, peak = training["epochs"], training["learning_rate"]
    steps = 5 if stage == "teacher" else 3  # of 36 images, the last batch of 4 with 8 a batch
    history = pd.read_csv(finished_project / OUTPUTS[stage].history)
    assert tuple(history) == COLUMNS
    assert history["epoch"].tolist() == list(range(1, epochs + 1))
    cosine = [
        0.5 * peak * (1 + math.cos(math.pi * (epoch * steps - 1) / (epochs * steps)))
        for epoch in range(1, epochs + 1)
    ]
    assert history["learning_rate"].tolist() == pytest.approx(cosine)
    assert (history[["train_loss", "validation_nll"]] > 0).all(axis=None)
    metrics = json.loads((finished_project / OUTPUTS[stage].metrics).read_text("utf-8"))
    kept = epochs if stage == "teacher" else metrics["kept_epoch"]
    assert history["epoch"][history["kept"]].tolist() == [kept]


def test_the_last_row_of_a_teachers_history_is_of_the_network_that_is_kept(finished_project):
    metrics = json.loads((finished_project / TEACHER.metrics).read_text("utf-8"))
    last = pd.read_csv(finished_project / TEACHER.history).iloc[-1]
    for key in ("validation_accuracy", "validation_nll"):
        assert last[key] == pytest.approx(metrics[key], rel=1e-4)


def test_the_history_of_a_network_that_was_not_trained_is_the_header_alone(tmp_path):
    write_history(tmp_path / "history.csv", ())
    assert Path(tmp_path / "history.csv").read_text("utf-8").splitlines() == [",".join(COLUMNS)]


@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_history_has_each_epoch_as_soon_as_it_ends_and_none_is_kept_before_the_last(
    project, monkeypatch, stage
):
    seen = []

    def read_at_the_end_of_an_epoch(log: EpochLog, *arguments: object, **figures: object) -> None:
        history = pd.read_csv(OUTPUTS[stage].history)
        seen.append((history["epoch"].tolist(), history["kept"].any()))

    monkeypatch.setattr(EpochLog, "line", read_at_the_end_of_an_epoch)
    run_stage(stage, *([] if stage == "teacher" else ["small"]))
    assert seen == [(list(range(1, n + 1)), False) for n in range(1, len(seen) + 1)]
    assert len(seen) == len(pd.read_csv(OUTPUTS[stage].history)) > 1
