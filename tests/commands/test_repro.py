"""Stages side by side, in the order of DVC's graph; test_caching.py compares their bytes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import PARAMS, write_params
from dvc.repo import Repo
from import_closure import ROOT
from stage_process import fork_command

from pipeline.commands.repro import jobs_of, number_of_jobs, seeds_of, stages_behind

GPUS = "echo $CUDA_VISIBLE_DEVICES"
#: `first` and `second` end only if they run at once.
STAGES = {
    "first": {"cmd": f"{GPUS} > 1; until [ -e 2 ]; do sleep .1; done; touch a", "outs": ["a"]},
    "second": {"cmd": f"{GPUS} > 2; until [ -e 1 ]; do sleep .1; done; touch b", "outs": ["b"]},
    "wrong": {"cmd": "echo no; exit 3", "deps": ["a"], "outs": ["c"]},
    "after_wrong": {"cmd": "touch d", "deps": ["c"], "outs": ["d"]},
    "after_both": {"cmd": "cat a b > e", "deps": ["a", "b"], "outs": ["e"]},
    "student": {
        "foreach": ["small"],
        "do": {"cmd": "echo $SEED_JOBS seeds at once; touch g", "deps": ["e"], "outs": ["g"]},
    },
    "speed": {"cmd": "touch f", "deps": ["b"], "outs": ["f"]},
}


def test_a_stage_that_more_stages_wait_for_starts_first():
    waits = {"baseline": set(), "teacher": set(), "soft_targets": {"teacher"}}
    waits |= {"student": {"soft_targets"}, "export": {"student", "baseline"}}
    behind = stages_behind(waits)
    assert behind["teacher"] == {"soft_targets", "student", "export"}
    assert behind["baseline"] == {"export"}


@pytest.mark.parametrize(
    ("ready", "free", "seeds", "expected"),
    [(1, 4, 5, 4), (2, 4, 5, 2), (3, 4, 5, 1), (4, 2, 5, 1), (1, 4, 1, 1), (1, 4, 3, 3)],
)
def test_free_jobs_go_to_the_seeds_of_the_trainings_that_are_ready(ready, free, seeds, expected):
    assert jobs_of(ready, free, seeds) == expected


def test_only_trainings_of_students_have_several_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_params(Path(), PARAMS | {"training": PARAMS["training"] | {"seeds": [3, 4, 5]}})
    stages = ("student@small", "baseline@small", "export@small", "soft_targets", "student@other")
    assert [seeds_of(stage) for stage in stages] == [3, 3, 1, 1, 1]


@pytest.mark.parametrize(
    ("gpus", "processes", "jobs"),
    [("", "1", 2), ("0", "1", 1), ("2,3,5,7", "1", 4), ("2,3,5,7", "2", 2), ("0,1", "4", 1)],
)
def test_by_default_there_are_as_many_jobs_as_gpus_for_them(monkeypatch, gpus, processes, jobs):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setenv("PROCESSES", processes)
    assert number_of_jobs(None) == jobs
    assert number_of_jobs("3") == 3


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / ".dvc/site"))
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    subprocess.run(["git", "init", "--quiet"], check=True)
    Repo.init().close()
    shutil.copy(ROOT / ".dvc/config", ".dvc")  # without analytics
    return tmp_path


def test_stages_run_at_once_and_a_failed_one_is_named_and_stops_only_what_reads_from_it(
    project, monkeypatch
):
    monkeypatch.setattr("subprocess.Popen", fork_command)
    result = subprocess.run(
        [sys.executable, "-m", "pipeline.commands.repro", "--jobs", "2"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "3,GPU-5"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    assert "error: 1 stage failed: wrong. Lines above" in result.stderr
    assert re.search(r"student@small: [12] seeds at once\n", result.stdout)
    assert "wrong: no\n" in result.stdout
    assert {(project / name).read_text() for name in "12"} == {"3\n", "GPU-5\n"}
    assert (project / "e").is_file()
    assert not (project / "d").exists()
    assert not (project / "f").exists()  # it is for the end, when nothing else runs
    assert {*yaml.safe_load((project / "dvc.lock").read_text())["stages"]} == {
        *("first", "second", "after_both", "student@small")
    }
