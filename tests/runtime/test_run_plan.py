"""Where a stage is in the whole run, and how long what is ahead took the last time."""

import json
import os
from pathlib import Path

import pytest
from conftest import PARAMS, change_params, write_params

from pipeline.runtime import environment, run_plan, stage_times
from pipeline.runtime.run_plan import StageOfRun, write_plan
from pipeline.runtime.stage_times import FOLDER, known_seconds, resumed, work_of

SIZES = {"train": 100, "validation": 20, "test": 30}
STAGES = ["teacher", "baseline@small", "student@small", "export@small", "compare"]


@pytest.fixture
def run(folder, capsys):
    """A run of `STAGES` in the current folder, of which nothing was timed yet."""
    write_params(folder, PARAMS)
    Path("data/prepared").mkdir(parents=True)
    Path("data/prepared/dataset.json").write_text(json.dumps({"splits": SIZES}), "utf-8")
    write_plan(STAGES, all_run=True)

    def begin(stage: str) -> tuple[StageOfRun, str]:
        stage_of_run = StageOfRun(stage, start=0.0)
        return stage_of_run, capsys.readouterr().out.strip()

    return begin


def time_stage(stage: str, params: dict, startup: float, seconds: float) -> None:
    stage_times.start(stage)
    stage_times.finish(stage, work_of(stage, params, SIZES), startup, seconds)


def test_without_a_measured_time_a_stage_says_what_is_ahead_and_no_minutes(run):
    line = "stage 1 of 5; ahead: 3 trainings of 10 epochs over 100 images; not timed yet"
    assert run("teacher")[1] == line
    assert run("compare")[1] == "stage 5 of 5; not timed yet"


def test_measured_stages_are_estimated_and_a_student_takes_the_time_of_its_baseline(run):
    time_stage("baseline@small", PARAMS, 10, 600)
    assert run("baseline@small")[1] == (
        "stage 2 of 5; more than 20 minutes left; 2 stages were not timed yet"
    )
    for stage in ("export@small", "compare"):
        time_stage(stage, PARAMS, 0, 60)
    assert run("student@small")[1] == "stage 3 of 5; about 12 minutes left"


def test_a_training_of_more_epochs_takes_longer_and_another_network_is_not_timed(folder):
    def seconds(**changes: object) -> float | None:
        student = PARAMS["students"]["small"] | changes
        params = PARAMS | {"students": {"small": student}}
        return known_seconds({"student@small": work_of("student@small", params, SIZES)})[
            "student@small"
        ]

    time_stage("student@small", PARAMS, 10, 600)  # of 2 epochs
    assert seconds() == pytest.approx(610)
    assert seconds(training={"epochs": 20}) == pytest.approx(6_010)
    assert seconds(training={"learning_rate": 0.1}) == pytest.approx(610)
    assert seconds(network="resnet20") is None
    assert seconds(training={"batch_size": 4}) is None


def test_a_plan_of_other_parameters_and_damaged_files_say_nothing_and_stop_nothing(run):
    time_stage("compare", PARAMS, 0, 60)
    for path in FOLDER.glob("*.json"):
        path.write_text('{"alike": 1, "units": "x"}', "utf-8")
    assert run("compare")[1] == "stage 5 of 5; not timed yet"
    assert run("speed")[1] == ""  # not in the plan
    change_params("training", epochs=3)
    assert run("compare")[1] == ""
    run_plan.FILE.write_text("[", "utf-8")
    stage, line = run("compare")
    assert line == ""
    stage.finish()
    Path("params.yaml").unlink()
    assert run("compare")[1] == ""


def test_a_stage_remembers_its_time_unless_it_resumed_or_failed(run, monkeypatch):
    run("teacher")  # fails
    assert not list(FOLDER.glob("*.json"))
    stage, _ = run("teacher")
    monkeypatch.setenv("DVC_STAGE", "teacher")
    resumed()
    stage.finish()
    assert not list(FOLDER.glob("*.json"))
    stage, _ = run("teacher")
    stage.finish()
    content = json.loads((FOLDER / "teacher.json").read_text("utf-8"))
    assert content["units"] == 600  # 6 epochs of 100 images
    assert content["seconds"] < 60
    assert os.listdir(FOLDER) == ["teacher.json"]


def test_the_last_stage_removes_the_plan_and_stages_at_once_share_the_time(run, monkeypatch):
    monkeypatch.setenv(environment.JOBS, "2")
    time_stage("compare", PARAMS, 10, 60)
    content = json.loads((FOLDER / "compare.json").read_text("utf-8"))
    assert (content["startup"], content["seconds"]) == (5, 30)
    monkeypatch.setenv(environment.SEED_JOBS, "2")  # a training of several seeds had both jobs
    time_stage("compare", PARAMS, 10, 60)
    content = json.loads((FOLDER / "compare.json").read_text("utf-8"))
    assert (content["startup"], content["seconds"]) == (10, 60)
    run("compare")[0].finish()
    assert not run_plan.FILE.exists()
