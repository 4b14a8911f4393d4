"""An interrupted command exits at once with one line, and a second run gives the same bytes.

training/test_resume.py and store/writing/test_finished_shards.py test what a killed training and a
killed store keep. `python -m soak.interruptions` interrupts every command, many times.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import PARAMS, bytes_of, change_params, run_stage, write_images, write_params
from import_closure import ROOT
from stage_process import (
    TORCHRUNS_POPEN,
    finish,
    fork_command,
    kill,
    start,
    start_module,
)

from pipeline.compute.distributed import SINGLE_PROCESS
from pipeline.data.prepared.dataset import open_dataset
from pipeline.models.params import NetworkParams
from pipeline.models.spec import build, model_spec
from pipeline.runtime import signals
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import atomic_directory
from pipeline.runtime.outputs import TEACHER
from pipeline.teacher import accuracy_gate
from pipeline.teacher import loop as teacher_loop
from pipeline.teacher.params import TeacherTraining
from pipeline.training.resume import Fingerprint, ResumeState
from soak import common
from soak.interruptions import Project, Row, Target

TEACHER_STATES = Path(".scratch/training/teacher")


def has_begun(process: subprocess.Popen) -> bool:
    """Whether the process has installed its handlers."""
    caught = re.search(r"^SigCgt:\s+(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.M)
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def wait_until(reached: Callable[[], bool], process: subprocess.Popen) -> None:
    while not reached() and process.poll() is None:
        time.sleep(0.005)


def interrupt(process: subprocess.Popen, signum: int) -> str:
    """Signal the whole process group, as a terminal does, and return the one line printed."""
    os.killpg(process.pid, signum)
    return end_of(process, signum)


def end_of(process: subprocess.Popen, signum: int) -> str:
    """Wait for the end of a process that was sent the signal, and return the one line printed."""
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + signum, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("interrupted; nothing half-written is kept. Run the same command again")
    return line


#: One that resumes after a shard, one that resumes otherwise, and one that starts anew.
COMMANDS = {
    "pipeline.stages.soft_targets": (),
    "pipeline.commands.repro": (),
    "pipeline.commands.store": ("verify", "--recompute", "9"),
}


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_that_is_interrupted_while_it_loads_ends_with_one_line(project, module):
    process = start_module(module, *COMMANDS[module])
    wait_until(lambda: has_begun(process), process)
    line = interrupt(process, signal.SIGINT)
    point = signals.RESUMES.get(module)
    assert line.endswith(f"again: it resumes {point}." if point else "again.")


#: Python imports this module first, and takes a second to destroy it during shutdown.
SLOW_TO_END = """
import os, time

class Slow:
    def __del__(self, write=os.write, sleep=time.sleep):
        write(1, b"clearing up\\n")
        sleep(1)

slow = Slow()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_shutdown_does_not_fail_a_finished_command(project, tmp_path, signum):
    (tmp_path / "sitecustomize.py").write_text(SLOW_TO_END, "utf-8")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    process = start_module("pipeline.commands.repair_dvc", PYTHONPATH=path)
    assert process.stdout.readline() == "clearing up\n"
    os.killpg(process.pid, signum)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")


def test_every_command_installs_its_handlers_before_it_imports_anything_else():
    sources = {path: path.read_text("utf-8") for path in (ROOT / "pipeline").rglob("*.py")}
    commands = {path: text for path, text in sources.items() if '__name__ == "__main__"' in text}
    modules = {f"pipeline.{path.parent.name}.{path.stem}" for path in commands}
    assert modules > signals.RESUMES.keys()
    for path, text in commands.items():
        first = re.search(r"^(?:from|import) .*", text, re.MULTILINE)[0]
        assert first == "from pipeline.runtime.command import run_command", path
        assert text.endswith('if __name__ == "__main__":\n    run_command(main)\n'), path


def teacher_has_saved() -> bool:
    return any(TEACHER_STATES.glob("*.state"))


def test_processes_that_share_a_training_end_together_with_one_line(project, monkeypatch):
    monkeypatch.setattr(TORCHRUNS_POPEN, fork_command)
    change_teacher(epochs=500)
    process = start(2, ROOT, "teacher")
    wait_until(teacher_has_saved, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    interrupt(process, signal.SIGINT)
    wait_until(lambda: not any(map(lives, ranks)), subprocess.Popen(["sleep", "1"]))
    assert not any(map(lives, ranks))


def test_a_training_and_its_decoding_workers_end_at_once_with_one_line(project):
    change_params("dataset", storage="encoded", quality=90)
    run_stage("prepare")
    change_teacher(epochs=500)
    process = start(stage="teacher")
    wait_until(lambda: teacher_has_saved() and bool(children(process.pid)), process)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGTERM)  # the stage alone
    process.wait(timeout=5)
    assert end_of(process, signal.SIGTERM).endswith("it resumes after its last finished epoch.")
    assert workers
    wait_until(lambda: not any(map(lives, workers)), subprocess.Popen(["sleep", "10"]))
    assert not any(map(lives, workers))
    assert not list(Path().rglob("*.partial"))


#: A command that forks as `multiprocessing` does, and is interrupted before it notes the process.
FORKS = """
import os, sys, time
from importlib.machinery import ModuleSpec
sys.modules["__main__"].__spec__ = ModuleSpec("pipeline.stages.forks", None)
from pipeline.runtime import signals
signals.handle_in_commands()
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_forked_process_ends_with_the_command_that_does_not_know_it_yet(signum):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FORKS]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    os.kill(process.pid, signum)
    process.wait(timeout=5)
    wait_until(lambda: not lives(child), subprocess.Popen(["sleep", "10"]))
    assert not lives(child)


def children(process: int) -> list[int]:
    return [child.pid for child in psutil.Process(process).children()]


def lives(process: int) -> bool:
    """Whether the process runs; a zombie does not."""
    return psutil.pid_exists(process) and psutil.Process(process).status() != "zombie"


def test_a_stage_ends_when_the_dvc_that_started_it_is_killed(project):
    change_teacher(epochs=500)
    script = "exec python -m pipeline.stages.teacher"  # dvc.yaml's
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    dvc = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({script!r}, shell=True)"],
        env=os.environ | settings | {"DVC_STAGE": "teacher"},
        start_new_session=True,
    )
    wait_until(teacher_has_saved, dvc)
    (stage,) = children(dvc.pid)
    dvc.kill()
    dvc.wait()
    wait_until(lambda: not lives(stage), subprocess.Popen(["sleep", "10"]))
    assert not lives(stage)


def test_each_stage_replaces_the_shell_in_which_dvc_starts_it():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
    for stage in stages.values():
        assert stage.get("do", stage)["cmd"].startswith("exec python -m pipeline.stages.")


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(folder):
    """`nohup`, and shells that start a background job, ignore signals."""
    write_params(folder, PARAMS)
    write_images(folder / "images")
    process = subprocess.Popen(
        ["sh", "-c", f"trap '' INT; exec {sys.executable} -m pipeline.stages.prepare"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    wait_until(Path("data/.prepared.partial").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0


def change_teacher(**training: object) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["teacher"]["training"] |= training
    write_params(Path(), params)


def teachers_outputs() -> list[bytes]:
    files = [TEACHER.predictions, TEACHER.metrics, TEACHER.history]
    return [path.read_bytes() for path in sorted([*TEACHER.model.iterdir(), *files])]


def test_a_teacher_killed_at_any_moment_ends_with_the_bytes_of_an_uninterrupted_one(project):
    change_teacher(epochs=9, ema_decay=0.9, warmup_epochs=3, schedule="step", milestones=[5])
    run_stage("teacher")
    expected = teachers_outputs()
    shutil.rmtree(TEACHER_STATES)
    process = start(stage="teacher")
    wait_until(lambda: b"True" not in TEACHER.history.read_bytes(), process)
    time.sleep(random.Random(1).uniform(0, 0.2))
    kill(process)
    assert b"True" not in TEACHER.history.read_bytes()  # of no epoch that is kept
    resumed = re.search(r"resumes after epoch (\d+) of 9", finish(start(stage="teacher")))
    assert int(resumed[1]) > 0
    assert teachers_outputs() == expected


@pytest.mark.parametrize("whole_epochs", [1, 2])
def test_a_fine_tuned_teacher_resumes_frozen_or_thawed(project, monkeypatch, whole_epochs):
    dataset, options = open_dataset(), {"epochs": 4, "freeze_epochs": 2, "ema_decay": 0.5}
    params = TeacherTraining(**PARAMS["teacher"]["training"] | options)
    network_params = NetworkParams.model_validate({"name": "resnet8"})
    description = model_spec("cifar_resnet", network_params, dataset)

    def train(folder: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        network = build(description)
        Path(folder).mkdir(exist_ok=True)
        progress = ResumeState(Path(folder), Fingerprint("any", {}), SINGLE_PROCESS)
        teacher_loop.fit_teacher(
            network,
            description.input,
            dataset,
            params,
            torch.device("cpu"),
            resume=progress,
            head={"fc.weight", "fc.bias"},
        )
        return network.state_dict()

    expected = train("uninterrupted")
    original, results = teacher_loop.classification_metrics, iter(range(4))

    def failing(*arguments):
        if next(results) == whole_epochs:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_loop, "classification_metrics", failing)
        with pytest.raises(KeyboardInterrupt):
            train("interrupted")
    found = train("interrupted")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_teacher_is_trained_again_only_for_other_inputs_whatever_the_gate(
    project, monkeypatch, capsys
):
    def refuse(*_: object, **__: object) -> None:
        raise UserError("refused")

    def refused_teacher() -> Path:
        with pytest.raises(UserError, match="refused"):
            run_stage("teacher")
        (state,) = TEACHER_STATES.glob("*.state")
        return state

    change_teacher(epochs=1)
    monkeypatch.setattr(accuracy_gate, "check", refuse)
    states = [refused_teacher()]
    change_teacher(seed=5)
    states.append(refused_teacher())
    write_images(Path("images"), per_class=21)
    run_stage("prepare")
    states.append(refused_teacher())
    assert len(set(states)) == 3
    assert "resumes" not in capsys.readouterr().out
    monkeypatch.setattr(accuracy_gate, "check", lambda *_, **__: None)
    written = []
    for minimum in (0.01, 0.02):  # DVC runs the stage for a gate that another teacher would pass
        change_params("teacher", minimum_accuracy=minimum)
        run_stage("teacher")
        assert "  resumes after epoch 1 of 1\n" in capsys.readouterr().out
        written.append(teachers_outputs())
    shutil.rmtree(TEACHER_STATES)
    run_stage("teacher")
    written.append(teachers_outputs())
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("stage", ["prepare", "compare"])
def test_a_stage_killed_at_any_moment_leaves_its_outputs_complete(project, stage):
    output = Path({"prepare": "data/prepared", "compare": "reports"}[stage])
    before = bytes_of(output)
    process = start(stage=stage)
    wait_until(output.with_name(f".{output.name}.partial").exists, process)
    time.sleep(random.Random(stage).uniform(0, 0.01))
    kill(process)
    assert bytes_of(output) == before
    finish(start(stage=stage))
    assert bytes_of(output) == before
    assert not list(Path().rglob("*.partial"))


def test_an_unfinished_output_is_removed_when_its_writing_fails(folder):
    with suppress(UserError), atomic_directory("out") as partial:
        assert signals.unfinished == {partial}
        raise UserError("any")
    assert not signals.unfinished
    assert not list(folder.iterdir())


PREPARE = Target("prepare", ("pipeline.stages.prepare",))


def test_the_soak_counts_a_survived_interruption_and_reports_other_bytes_and_stray_files(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(common, "OUTPUTS", ("data/prepared",))
    project, survived, failed = Project(tmp_path), Row(), Row()
    project.measure(PREPARE)
    assert project.interrupt(PREPARE, signal.SIGTERM, 0.5, survived)
    assert (survived.kills, survived.failures) == (1, [])
    monkeypatch.setattr(project, "strays", lambda: ["/tmp/x"])
    monkeypatch.setattr(project, "expected", {PREPARE.run: ({"data/prepared/other": ""}, 1.0)})
    project.interrupt(PREPARE, signal.SIGKILL, 0.0, failed)
    assert any("other bytes in data/prepared/dataset.json" in each for each in failed.failures)
    assert any("left behind: /tmp/x" in each for each in failed.failures)
