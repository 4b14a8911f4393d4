"""Own data under DVC, and experiments with it, with the real DVC."""

import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from clone import committed, stages_run
from conftest import run_module, write_params
from dvc.repo import Repo
from dvc.utils.cli_parse import to_path_overrides
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps
from import_closure import ROOT

from pipeline.commands import experiments
from pipeline.distillation.params import load_distillation
from pipeline.runtime.errors import UserError
from pipeline.runtime.params import read_params, student_names
from pipeline.students.params import load_student, load_training

OWN = ["data/raw/pets.tar.gz", "models/imported/best.pt"]
IDENTITY = ["-c", "user.name=test", "-c", "user.email=test@example.org"]


def git(root: Path, *arguments: str) -> str:
    return subprocess.check_output(["git", *IDENTITY, *arguments], cwd=root, text=True)


def test_what_dvc_add_tracks_is_pushed_and_a_clone_pulls_it_and_git_sees_no_other_file(
    tmp_path, monkeypatch
):
    """DVC looks for `.dvc` files by another reading of .gitignore than Git's."""
    root = tmp_path / "project"
    for name in (".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name in (*OWN, "data/raw/loose/0.png", "data/prepared/a.npy", "models/teacher/b.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "-m", "without data")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.chdir(root)
    with Repo() as repo:
        repo.add(OWN)
        with repo.config.edit() as config:
            config["remote"]["shared"] = {"url": str(tmp_path / "remote")}
            config["core"]["remote"] = "shared"
        repo.push()
    untracked = git(root, "ls-files", "--others", "--exclude-standard").split()
    assert untracked == [f"{name}.dvc" for name in OWN]
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "-m", "with data")
    git(tmp_path, "clone", "--quiet", str(root), "clone")
    monkeypatch.chdir(tmp_path / "clone")
    with Repo() as repo:
        repo.pull()
    assert [Path(name).read_text() for name in OWN] == OWN


PAGE = (ROOT / "docs/experiments.md").read_text("utf-8")
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
#: The sections of params.yaml that the stages on the teacher's side depend on.
TEACHERS = [
    section
    for stage in ("prepare", "teacher", "soft_targets")
    for section in STAGES[stage]["params"]
]


def documented(command: str) -> list[list[str]]:
    """The page's lines that begin with this command, as a shell splits them."""
    lines = re.findall(rf"^({re.escape(command)}.*)$", PAGE, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def overrides(command: list[str]) -> list[str]:
    return [value for flag, value in pairwise(command) if flag in ("-S", "--set-param")]


def test_each_documented_experiment_is_valid_and_changes_nothing_that_the_teacher_reads(folder):
    before = read_params(ROOT / "params.yaml")
    sweeps = [
        sweep
        for command in documented("dvc exp run")
        if overrides(command)
        for sweep in get_hydra_sweeps(to_path_overrides(overrides(command)))
    ]
    for sweep in sweeps:
        shutil.copy(ROOT / "params.yaml", folder)
        apply_overrides(folder / "params.yaml", sweep["params.yaml"])
        after = read_params()
        assert after != before
        assert [after[section] for section in TEACHERS] == [before[key] for key in TEACHERS]
        for name in student_names():
            student = load_student(name)
            load_distillation(student.distillation, name)
            load_training(name, student)
    assert len(sweeps) == 9


def test_experiments_are_listed_in_100_columns_with_accuracies_and_the_parameters_that_differ(
    folder, monkeypatch, capsys
):
    shutil.copy(ROOT / "params.yaml", folder)
    for name in student_names():
        metrics = folder / f"metrics/students/{name}.json"
        metrics.parent.mkdir(parents=True, exist_ok=True)
        metrics.write_text('{"validation_accuracy": 0.875}')
    stage = {"cmd": "true", "params": ["distillation"], "deps": ["params.yaml"]}
    files = [str(path.relative_to(folder)) for path in folder.glob("metrics/*/*")]
    pipeline = {"stages": {"students": stage}, "metrics": files}
    (folder / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    git(folder, "init", "--quiet")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(folder / ".dvc/site"))
    Repo.init().close()
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "finished")
    with Repo() as repo:
        repo.experiments.run(queue=True, params=["distillation.temperature=1,2"])
    capsys.readouterr()  # DVC's lines about the queue
    run_module("pipeline.commands.experiments")
    heading, *rows = (line.split() for line in capsys.readouterr().out.splitlines() if line)
    assert heading == ["state", *student_names(), "distillation.temperature"]
    assert rows[0] == ["workspace", *["87.50%"] * len(student_names()), "4.0"]
    assert sorted(row[1:] for row in rows[2:]) == [
        ["queued", *["-"] * len(student_names()), str(temperature)] for temperature in (1, 2)
    ]


def test_a_student_called_state_leaves_the_column_of_states_as_it_is():
    experiment = {"rev": "1" * 40, "name": "one", "data": {}}
    group = {"revs": [experiment], "executor": {"state": "failed"}}
    states = [{"rev": "workspace", "data": {}, "experiments": [group]}]
    lines = [line.split() for line in experiments.table(states, ["state"]).splitlines()]
    assert lines == [["state", "state"], ["workspace", "-"], ["one", "failed", "-"]]


def test_a_repository_without_a_commit_has_no_experiments_and_says_so(folder, monkeypatch):
    shutil.copy(ROOT / "params.yaml", folder)
    git(folder, "init", "--quiet")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(folder / ".dvc/site"))
    Repo.init().close()
    with pytest.raises(UserError, match="there is no commit yet"):
        run_module("pipeline.commands.experiments")


@pytest.mark.slow
def test_a_documented_sweep_with_own_data_trains_students_and_no_teacher_and_one_is_applied(
    tmp_path_factory,
):
    clone = committed(tmp_path_factory)
    shutil.make_archive(str(clone.root / "data/raw/pets"), "gztar", clone.root / "images")
    shutil.rmtree(clone.root / "images")
    clone.params["dataset"]["root"] = OWN[0]
    write_params(clone.root, clone.params)
    clone.dvc("add", OWN[0])
    clone.dvc("repro")
    for key in ("name", "email"):
        git(clone.root, "config", f"user.{key}", "a@example.org")
    clone.commit("finished")
    for command in documented("dvc exp run --queue"):
        clone.dvc(*(part.replace("resnet8", "small") for part in command[1:]))
    run = clone.run(sys.executable, "-m", "dvc", "exp", "run", "--run-all")
    assert run.returncode == 0, run.stdout + run.stderr
    assert {stage.partition("@")[0] for stage in stages_run(run.stdout)} <= {
        *("student", "int8_training", "export", "robustness", "speed", "compare"),
    }
    assert "student@small" in stages_run(run.stdout)
    listed = clone.run(sys.executable, "-m", "pipeline.commands.experiments").stdout
    assert max(len(line) for line in listed.splitlines()) <= 100
    rows = [line.split() for line in listed.splitlines() if " success " in line]
    assert len(rows) == 6, listed + run.stdout
    shown = clone.dvc(
        *(part.replace("resnet8", "small") for part in documented("dvc exp show")[0][1:]),
        "--no-pager",
    )
    assert max(len(line) for line in shown.splitlines()) <= 100
    clone.dvc("exp", "apply", rows[0][0])
    assert read_params(clone.root / "params.yaml") != clone.params
