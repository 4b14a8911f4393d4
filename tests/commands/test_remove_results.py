"""Results of students that params.yaml no longer defines are named, and removed only when asked."""

import shutil
from pathlib import Path

import pytest
from conftest import PARAMS, bytes_of, run_module, write_params
from stage_process import fork_command

from pipeline.comparison.removed_students import results_of_removed_students
from pipeline.models.params import WeightsFile
from pipeline.runtime.errors import UserError
from pipeline.students.start_file import check_start_file

COMMAND = "pipeline.commands.remove_results"
#: What the stages of a student write, beside the state of an unfinished training.
WRITTEN = [
    *(f"models/{kind}/{{}}" for kind in ("students", "baselines")),
    *(f"metrics/{kind}/{{}}.json" for kind in ("students", "baselines", "export/students")),
    *(f"metrics/history/{kind}/{{}}.csv" for kind in ("students", "baselines")),
    *(f"predictions/{kind}/{{}}.safetensors" for kind in ("students", "baselines")),
    *(f"predictions/{kind}/students/{{}}.safetensors" for kind in ("exported", "robustness")),
    *(
        f"models/exported/{kind}{{}}.{end}"
        for kind in ("", "baselines/")
        for end in ("onnx", "json")
    ),
    *("models/exported/int8/{}", "models/exported/seeds/{}", "models/int8/{}"),
]


@pytest.fixture
def renamed(finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose student `small`, with every result, was renamed to `other`, without a run."""
    root = shutil.copytree(finished_project, tmp_path / "project")
    monkeypatch.chdir(root)
    write_params(root, PARAMS | {"students": {"other": PARAMS["students"]["small"]}})
    return root


def test_every_result_of_a_removed_student_is_listed_and_nothing_else(renamed, capsys):
    before = {path for path in renamed.rglob("*") if "small" in path.name}
    assert before == {renamed / path.format("small") for path in WRITTEN}
    Path("models/students/notes.txt").write_text("mine")
    Path("metrics/students/.small.json.partial").write_text("")
    run_module(COMMAND)
    printed = capsys.readouterr().out
    assert set(printed.splitlines()[:-1]) == {path.format("small") for path in WRITTEN}
    assert f"results of 1 student; `python -m {COMMAND} --remove` deletes them" in printed
    assert all(path.exists() for path in before)


def test_weights_that_a_student_starts_from_are_no_results_of_a_removed_one(renamed, capsys):
    student = PARAMS["students"]["small"]
    weights = {"path": "models/students/small", "sha256": "0" * 64}
    other = student | {"network": {"name": student["network"], "weights": weights}}
    write_params(renamed, PARAMS | {"students": {"other": other}})
    before = bytes_of(Path("models/students/small"))
    run_module(COMMAND, "--remove")
    assert bytes_of(Path("models/students/small")) == before
    assert not Path("models/baselines/small").exists()
    shutil.rmtree("models/students/small")
    with pytest.raises(UserError, match="is absent; expected .* Put them there"):
        check_start_file(WeightsFile(**weights), "other")


def test_results_are_removed_when_asked_and_each_is_named(renamed, capsys):
    kept = {path for path in renamed.rglob("*") if path.is_file() and "small" not in str(path)}
    run_module(COMMAND, "--remove")
    printed = capsys.readouterr().out.splitlines()
    assert set(printed) == {f"removed {path.format('small')}" for path in WRITTEN}
    assert {path for path in renamed.rglob("*") if path.is_file()} == kept
    assert results_of_removed_students(["other"]) == {}
    run_module(COMMAND)
    assert "no results of students that params.yaml no longer defines" in capsys.readouterr().out


def test_check_names_removed_students_with_the_command_that_removes_their_results(
    renamed, monkeypatch, capsys
):
    monkeypatch.setattr("subprocess.Popen", fork_command)
    run_module("pipeline.commands.check")
    printed = capsys.readouterr().out
    assert "left out, because params.yaml no longer defines them: small." in printed
    assert f"`python -m {COMMAND}` lists and removes" in printed
