"""In any state of a project, a run ends with a correct result or reports the problem."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from clone import Clone, cloned, committed, stages_run, timeless
from conftest import run_stage, write_params
from stage_process import fork

from pipeline.runtime.errors import UserError
from pipeline.runtime.locks import exclusive
from pipeline.runtime.stage_inputs import StageInputs

STAGES = {
    *("prepare", "teacher", "soft_targets", "baseline@small", "student@small"),
    *("int8_training@small", "export_teacher", "export@small"),
    *("robustness_teacher", "robustness@small", "speed", "compare"),
}
#: What follows from other weights of the student.
AFTER_THE_STUDENT = {
    *("int8_training@small", "export@small", "robustness@small", "speed", "compare"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which everything has run and is committed. Copy it."""
    clone = committed(tmp_path_factory)
    clone.commit("finished")
    return clone


@pytest.fixture
def clone(finished: Clone, tmp_path: Path) -> Clone:
    return finished.twin(tmp_path / "clone")


def git(clone: Clone, *command: str) -> None:
    subprocess.run(["git", *command], cwd=clone.root, check=True, capture_output=True)


def change_student(clone: Clone, section: str, **values: object) -> None:
    clone.params["students"]["small"][section] |= values
    write_params(clone.root, clone.params)


def repro_disturbed(clone: Clone, stage: str, line: str, disturb: Callable[[], None]) -> str:
    """Run `dvc repro`, disturb it when a stage prints `line`, and return its output."""
    process = clone.start(sys.executable, "-m", "dvc", "repro", stage)
    output = ""
    for printed in process.stdout:
        output += printed
        if line in printed:
            disturb()
    process.wait()
    return output if process.returncode else f"no failure:\n{output}"


def epochs_of(clone: Clone) -> int:
    history = (clone.root / "metrics/history/students/small.csv").read_text("utf-8")
    return len(history.splitlines()) - 1


def recorded(clone: Clone, stage: str) -> dict:
    return clone.lock()["stages"][stage]


def test_a_stage_compares_everything_that_dvc_records_of_it(finished, monkeypatch):
    monkeypatch.chdir(finished.root)
    assert finished.lock()["stages"].keys() == STAGES
    for stage in finished.lock()["stages"]:
        name, _, student = stage.partition("@")
        inputs = StageInputs(name, student or None)
        entry = recorded(finished, stage)
        params = entry.get("params", {"params.yaml": {}})["params.yaml"]
        assert inputs.params.keys() == params.keys()
        assert {str(path) for path in inputs._states} == {dep["path"] for dep in entry["deps"]}


def test_a_parameter_edited_during_a_training_is_not_recorded_for_its_result(clone):
    change_student(clone, "training", epochs=12)
    change_student(clone, "distillation", temperature=3.0)
    before = recorded(clone, "student@small")

    def edit(printed: str) -> None:
        if "epoch  1/12" in printed:
            change_student(clone, "distillation", temperature=9.0)

    result = clone.dvc_here("repro", "student@small", see=edit)
    assert result.returncode != 0
    changed = "error: `params.yaml: students.small.distillation` changed while this stage"
    assert changed in result.stderr
    assert "Traceback" not in result.stderr
    assert recorded(clone, "student@small") == before
    change_student(clone, "distillation", temperature=3.0)
    assert "resumes after epoch 12 of 12" in clone.dvc_here("repro", "student@small").stdout


@pytest.mark.slow
def test_another_students_parameters_may_change_while_one_trains(clone):
    change_student(clone, "training", epochs=30)
    clone.params["students"]["other"] = deepcopy(clone.params["students"]["small"])

    def edit() -> None:
        clone.params["students"]["other"]["training"]["seeds"] = 9
        write_params(clone.root, clone.params)

    write_params(clone.root, clone.params)
    output = repro_disturbed(clone, "student@small", "epoch  1/30", edit)
    assert output.startswith("no failure"), output


@pytest.mark.slow
def test_a_branch_switched_during_a_training_gets_no_result_of_the_other_branch(clone):
    git(clone, "switch", "--create", "other")
    change_student(clone, "training", epochs=20)
    with open(clone.root / "pipeline/distillation/losses.py", "a", encoding="utf-8") as file:
        file.write("# another line\n")
    clone.commit("other")
    git(clone, "switch", "-")
    change_student(clone, "training", epochs=30)
    clone.commit("longer")
    output = repro_disturbed(
        clone, "student@small", "epoch  1/30", lambda: git(clone, "switch", "other")
    )
    assert "`pipeline/distillation` changed while this stage ran" in output
    assert "`params.yaml: students.small.training`" not in output.partition("changed while")[2]
    change_student(clone, "training", epochs=20)  # as the branch has it
    assert clone.repro() == {"student@small", "baseline@small", *AFTER_THE_STUDENT}
    assert epochs_of(clone) == 20
    git(clone, "stash")
    git(clone, "switch", "-")
    clone.dvc("repro", "student@small")
    assert epochs_of(clone) == 30


@pytest.mark.slow
def test_data_prepared_again_during_a_training_stops_it(clone):
    clone.params["teacher"]["training"]["epochs"] = 20
    write_params(clone.root, clone.params)

    def prepare_others() -> None:
        clone.params["dataset"]["split_seed"] = 1
        write_params(clone.root, clone.params)
        result = clone.run(sys.executable, "-m", "pipeline.stages.prepare")
        assert result.returncode == 0, result.stderr

    before = recorded(clone, "teacher")
    output = repro_disturbed(clone, "teacher", "epoch  1/20", prepare_others)
    assert "error: `data/prepared` changed while this stage ran" in output
    assert recorded(clone, "teacher") == before


def test_a_dvc_lock_that_records_other_parameters_than_the_predictions_is_refused(
    clone, monkeypatch
):
    """A manual merge can combine one branch's parameters with the other's outputs."""
    lock = clone.root / "dvc.lock"
    content = yaml.safe_load(lock.read_text("utf-8"))
    recorded_params = content["stages"]["student@small"]["params"]["params.yaml"]
    recorded_params["students.small.distillation"] = {"temperature": 5.0}
    lock.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    change_student(clone, "distillation", temperature=5.0)
    assert clone.invalidated() >= {"compare", "export@small"}
    assert "student@small" not in clone.invalidated()
    monkeypatch.chdir(clone.root)
    for stage, again in ((("compare",), "export@small"), (("export", "small"), "student@small")):
        remedy = f"dvc repro --force --single-item {again}"
        message = rf"was made when `params.yaml: students\.small(.|\n)* Run `{remedy}`"
        with pytest.raises(UserError, match=message):
            run_stage(*stage)
    assert clone.dvc_here(*remedy.split()[1:]).returncode == 0
    assert clone.invalidated() == {"int8_training@small", "export@small", "speed", "compare"}
    for stage in (("export", "small"), ("robustness", "small"), ("compare",)):
        run_stage(*stage)


def mark_a_conflict(file: Path) -> None:
    lines = file.read_text("utf-8").splitlines()
    lines[10:12] = ["<<<<<<< HEAD", *lines[10:12], "=======", *lines[10:12], ">>>>>>> other"]
    file.write_text("\n".join(lines), "utf-8")


def refusal_of(clone: Clone, *command: str) -> str:
    site = str(clone.root / ".venv/dvc")
    with chdir(clone.root):
        process = fork(*command, PYTHONPATH=str(clone.root), DVC_SITE_CACHE_DIR=site)
    printed = "".join(text for text in process.communicate() if text)
    assert process.returncode != 0
    assert "Traceback" not in printed
    return printed


def test_a_dvc_lock_with_conflict_markers_is_refused_and_can_be_removed(clone):
    mark_a_conflict(clone.root / "dvc.lock")
    before = clone.outputs()
    assert "`dvc.lock` has merge conflict markers" in refusal_of(clone, "pipeline.commands.check")
    for command in (("pipeline.commands.repro",), ("dvc", "repro")):
        assert "dvc.lock" in refusal_of(clone, *command)
    (clone.root / "dvc.lock").unlink()
    assert clone.repro(here=True) == set()
    assert clone.outputs() == before


@pytest.mark.parametrize("name", ["dvc.yaml", "params.yaml"])
def test_conflict_markers_in_dvc_yaml_and_params_yaml_are_refused(clone, name):
    mark_a_conflict(clone.root / name)
    before = clone.outputs()
    for command in (("pipeline.commands.check",), ("pipeline.stages.prepare",), ("dvc", "repro")):
        assert name in refusal_of(clone, *command)
    assert clone.outputs() == before


@pytest.mark.slow
def test_a_branch_switched_between_two_stages_ends_with_the_results_of_that_branch(clone):
    git(clone, "switch", "--create", "other")
    change_student(clone, "training", epochs=20)
    clone.commit("other")
    undisturbed = clone.twin()
    undisturbed.repro()
    git(clone, "switch", "-")
    change_student(clone, "training", epochs=30)
    clone.commit("longer")
    # The stage that this line announces has not started to load.
    repro_disturbed(
        clone,
        "compare",
        "Running stage 'student@small'",
        lambda: git(clone, "switch", "--force", "other"),
    )
    clone.params = deepcopy(undisturbed.params)
    clone.repro()
    assert epochs_of(clone) == 20
    assert timeless(clone.outputs()) == timeless(undisturbed.outputs())
    assert clone.repro() == set()


@pytest.mark.slow
def test_every_edited_output_is_restored(clone):
    before = clone.outputs()
    for name, content in before.items():
        if not content:
            continue  # .gitkeep
        (clone.root / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert clone.repro("--all-pipelines") == set()
    assert clone.outputs() == before


@pytest.mark.slow
def test_a_store_of_another_project_is_refused_by_a_stage_and_replaced_by_dvc(clone, tmp_path):
    other = clone.twin(tmp_path / "other")
    other.params["teacher"]["training"]["seed"] = 5
    other.params["views"]["seed"] = 8
    other.repro()
    store, before = clone.root / "data/soft_targets", clone.outputs()
    for file in (other.root / "data/soft_targets").iterdir():
        (store / file.name).write_bytes(file.read_bytes())
    result = clone.run(sys.executable, "-m", "pipeline.stages.student", "small")
    assert result.returncode != 0
    assert "was written for teacher" in result.stderr
    assert clone.repro() == set()
    assert clone.outputs() == before


@pytest.mark.slow
def test_two_parallel_runs_end_with_the_bytes_of_one(clone):
    """Each waits for the other or is refused; no two write to one path at once."""
    twin = clone.twin()
    for each in (clone, twin):
        change_student(each, "training", seeds=4)
    twin.repro("--all-pipelines")
    refusal = "busy|Unable to acquire lock|another run of this stage"
    command = (sys.executable, "-m", "pipeline.commands.repro", "--jobs", "2")
    for together in ((command, command), (command, (sys.executable, "-m", "dvc", "repro"))):
        processes = [clone.start(*each) for each in together]
        outputs = [process.communicate()[0] for process in processes]
        for process, text in zip(processes, outputs, strict=True):
            assert "Traceback" not in text
            assert process.returncode == 0 or re.search(refusal, text), text
    clone.repro("--all-pipelines")
    assert timeless(clone.outputs()) == timeless(twin.outputs())


def test_a_stage_that_another_process_runs_is_refused(clone):
    with exclusive(clone.root / ".scratch/prepare"):
        refusal = refusal_of(clone, "pipeline.stages.prepare")
    assert "another run of this stage has locked `.scratch/prepare`" in refusal


@pytest.mark.slow
@pytest.mark.parametrize("moment", [10**9, 4 * 10**9], ids=["past", "future"])
def test_file_dates_have_no_effect(clone, moment):
    before = clone.outputs()
    edited = clone.root / "models/students/small/weights.safetensors"
    edited.write_bytes(bytes([0]) + edited.read_bytes()[1:])
    files = [path for path in clone.root.rglob("*") if path.is_file() and ".git" not in path.parts]
    for path in files:
        if ".dvc" not in path.parts:
            os.utime(path, (moment, moment))
    assert clone.repro() == set()
    assert clone.outputs() == before
    change_student(clone, "distillation", temperature=6.0)
    os.utime(clone.root / "params.yaml", (moment, moment))
    assert "student@small" in stages_run(clone.dvc("repro"))


@pytest.mark.slow
def test_a_long_path_with_spaces_and_letters_of_any_script_works(tmp_path):
    root = tmp_path / "Jürgens Ordner, 画像 (neu) $HOME 'x'" / ("ein langer Name " * 15).strip()
    clone = cloned(root / "distillation")
    for folder in (clone.root / "images/train").iterdir():
        folder.rename(folder.with_name(f"{folder.name} ß 猫 -{'x' * 200}"))
    assert len(str(clone.root)) > 255
    assert clone.repro() == STAGES
    assert clone.repro() == set()
