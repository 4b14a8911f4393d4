"""DVC's plots and the artifact of dvc.yaml, with the real DVC."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from clone import Clone, committed, stages_run
from conftest import run_module, write_params
from import_closure import ROOT

NAMED = ["accuracy_against_size", "training_curves", "confusion"]
HISTORIES = [
    "metrics/history/teacher.csv",
    "metrics/history/baselines/small.csv",
    "metrics/history/students/small.csv",
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which everything has run and is committed. Only read it."""
    clone = committed(tmp_path_factory)
    clone.commit("finished")
    return clone


def rows(plot: list[dict]) -> list[dict]:
    return plot[0]["content"]["data"]["values"]


def test_plots_diff_shows_each_named_plot_once_in_both_revisions_and_no_other_but_histories(clone):
    shown = json.loads(clone.dvc("plots", "diff", "HEAD", "workspace", "--json"))
    assert "errors" not in shown
    plots = shown["data"]
    assert list(plots) == [*NAMED, *HISTORIES]
    for plot in plots.values():
        assert {row["rev"] for row in rows(plot)} == {"HEAD", "workspace"}
        assert "sha256" not in json.dumps(plot)
    size, curves, confusion = (rows(plots[name]) for name in NAMED)
    assert {(row["network"], row["role"]) for row in size} == {
        *(("teacher", "teacher"), ("small", "distilled"), ("small", "baseline")),
    }
    assert {(row["student"], row["role"]) for row in curves} == {
        *(("teacher", "teacher"), ("small", "distilled"), ("small", "baseline")),
    }
    decision = json.loads((clone.root / "metrics/comparison.json").read_text("utf-8"))["decision"]
    correct = sum(row["actual"] == row["predicted"] for row in confusion)
    assert correct / len(confusion) == pytest.approx(decision["accuracy"], abs=1e-6)
    specification = json.dumps(plots["confusion"][0]["content"])
    assert '"xy_count"' in specification  # DVC's own template, which counts the rows


def test_a_tooltip_of_a_named_plot_lists_its_columns():
    """Not `data`, which shows every column of the file."""
    templates = list((ROOT / ".dvc/plots").glob("*.json"))
    assert {template.stem for template in templates} == {*NAMED} - {"confusion"}  # DVC's own
    for template in templates:
        text = template.read_text("utf-8")
        assert '"tooltip": [' in text
        assert '"content": "data"' not in text


def test_every_stage_says_what_it_does():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
    said = [stage.get("do", stage).get("desc", "") for stage in stages.values()]
    assert len({*said}) == len(stages)
    assert all(10 < len(text) <= 80 for text in said)


def test_dvc_artifacts_get_brings_the_chosen_file_which_predict_runs(
    clone, tmp_path, monkeypatch, capsys
):
    tag = ["tag", "--annotate", "classifier@v1.0.0", "--message", "the first"]
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *tag], cwd=clone.root, check=True)
    command = ["artifacts", "get", str(clone.root), "classifier", "--out", str(tmp_path / "got")]
    clone.dvc(*command)
    subprocess.run(["git", "tag", "--delete", "classifier@v1.0.0"], cwd=clone.root, check=True)
    file = tmp_path / "got/classifier.onnx"
    decision = json.loads((clone.root / "metrics/comparison.json").read_text("utf-8"))["decision"]
    assert file.read_bytes() == (clone.root / decision["path"]).read_bytes()
    assert json.loads(file.with_suffix(".json").read_text("utf-8"))["file"]["name"] == file.name
    monkeypatch.chdir(tmp_path)
    image = next((clone.root / "images/train/bee").iterdir())
    run_module("pipeline.commands.predict", str(file), str(image))
    printed = capsys.readouterr()
    assert str(image) in printed.out
    assert f"small, {decision['role']}, float32: accuracy" in printed.err  # of the model card


def stop(process: psutil.Process) -> psutil.Process:
    """Pause the stage that this DVC runs."""
    (stage,) = process.children()
    stage.suspend()
    return stage


@pytest.mark.slow
def test_plots_show_has_each_epoch_of_a_training_that_runs_and_a_killed_one_leaves_no_result(
    clone, tmp_path
):
    """Of a killed training too: DVC deletes its history, and the run that resumes writes all of
    it again."""
    clone = clone.twin(tmp_path / "clone")
    path = "metrics/history/students/small.csv"
    before = (clone.root / path).read_bytes()
    clone.params["training"]["epochs"] = 30
    write_params(clone.root, clone.params)

    def shown() -> list[int]:
        plot = json.loads(
            clone.dvc("plots", "diff", "HEAD", "workspace", "--json", "--targets", path)
        )
        return [int(row["epoch"]) for row in rows(plot["data"][path]) if row["rev"] == "workspace"]

    def run_until(line: str) -> tuple[subprocess.Popen, psutil.Process, str]:
        process, output = clone.start(sys.executable, "-m", "dvc", "repro", "student@small"), ""
        for printed in process.stdout:
            output += printed
            if line in printed:
                return process, stop(psutil.Process(process.pid)), output
        raise AssertionError(output)

    dvc, stage, _ = run_until("epoch  3/30")
    first = shown()
    assert first == list(range(1, len(first) + 1))
    assert 3 <= len(first) < 30
    stage.kill()
    dvc.wait()
    assert (clone.root / path).read_bytes() != before
    killed = clone.run(sys.executable, "-m", "pipeline.stages.compare")
    assert killed.returncode != 0  # DVC has deleted the metrics, too

    dvc, stage, output = run_until(f"epoch {len(first) + 3:2}/30")
    assert f"resumes after epoch {len(first)} of 30" in output
    second = shown()
    assert second == list(range(1, len(second) + 1))
    assert len(first) + 3 <= len(second) < 30
    stage.resume()
    dvc.communicate()
    assert dvc.returncode == 0
    history = list(csv.DictReader((clone.root / path).read_text("utf-8").splitlines()))
    assert [int(row["epoch"]) for row in history] == list(range(1, 31))
    assert sum(row["kept"] == "True" for row in history) == 1

    clone.params["training"]["epochs"] = 2  # as at first: all of it is in DVC's cache
    write_params(clone.root, clone.params)
    assert not stages_run(clone.dvc("repro", "student@small"))
    assert (clone.root / path).read_bytes() == before
    clone.params["training"]["epochs"] = 30
    write_params(clone.root, clone.params)
    assert not stages_run(clone.dvc("repro", "student@small"))
    assert len((clone.root / path).read_text("utf-8").splitlines()) == 31


@pytest.mark.slow
def test_a_history_of_a_killed_training_is_replaced_when_its_parameters_are_reverted(
    clone, tmp_path
):
    clone = clone.twin(tmp_path / "clone")
    path = clone.root / "metrics/history/students/small.csv"
    before = path.read_bytes()
    clone.params["training"]["epochs"] = 30
    write_params(clone.root, clone.params)
    dvc = clone.start(sys.executable, "-m", "dvc", "repro", "student@small")
    for printed in dvc.stdout:
        if "epoch  3/30" in printed:
            stop(psutil.Process(dvc.pid)).kill()
    dvc.wait()
    assert b"True" not in path.read_bytes()
    clone.params["training"]["epochs"] = 2
    assert clone.repro() == set()
    assert path.read_bytes() == before


@pytest.mark.slow
def test_plots_show_says_which_plots_a_clone_without_reports_lacks_and_shows_the_others(
    clone, tmp_path
):
    clone = clone.twin(tmp_path / "clone")
    for folder in ("reports", "models", ".dvc/cache"):
        shutil.rmtree(clone.root / folder)
    shown = json.loads(clone.dvc("plots", "show", "--json"))
    assert {error["source"] for error in shown["errors"]} == {
        *("reports/training_curves.csv", "reports/confusion.csv"),
    }
    assert [name for name, plot in shown["data"].items() if plot] == [NAMED[0], *HISTORIES]
    page = Path(clone.dvc("plots", "show").strip().removeprefix("file://"))
    assert page.is_file()
