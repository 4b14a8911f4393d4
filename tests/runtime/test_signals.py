"""An interrupted command exits at once with one line, and a second run gives the same bytes.

training/test_resume.py and store/writing/test_finished_shards.py test what a killed training and a
killed store keep. `python -m soak.interruptions` interrupts every command, many times.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PARAMS, change_params, run_stage, write_images, write_params
from import_closure import ROOT
from stage_process import finish, kill, start

from pipeline.compute.distributed import SINGLE_PROCESS
from pipeline.data.prepared.dataset import open_dataset
from pipeline.models.params import NetworkParams
from pipeline.models.spec import build, model_spec
from pipeline.runtime import signals
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import atomic_directory
from pipeline.teacher import accuracy_gate, fine_tuning
from pipeline.teacher import loop as teacher_loop
from pipeline.teacher.params import TeacherTraining
from pipeline.training.resume import ResumeState
from soak import common, interruptions
from soak.interruptions import Project, Row, Target

TEACHER_STATES = Path(".scratch/training/teacher")


def command(module: str, *arguments: str, **settings: str) -> subprocess.Popen:
    """Start `python -m module arguments` in the current folder and a new process group."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


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
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + signum, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("interrupted; nothing half-written is kept. Run the same command again")
    return line


COMMANDS = {
    "pipeline.stages.prepare": (),
    "pipeline.stages.teacher": (),
    "pipeline.stages.soft_targets": (),
    "pipeline.stages.student": ("small",),
    "pipeline.stages.baseline": ("small",),
    "pipeline.stages.compare": (),
    "pipeline.commands.store": ("verify", "--recompute", "9"),
    "pipeline.commands.train_students": (),
}


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_that_is_interrupted_while_it_loads_ends_with_one_line(project, module):
    process = command(module, *COMMANDS[module])
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
    process = command("pipeline.commands.repair_dvc", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert process.stdout.readline() == "clearing up\n"
    os.killpg(process.pid, signum)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")


def test_every_command_installs_its_handlers_before_it_imports_anything_else():
    sources = {path: path.read_text("utf-8") for path in (ROOT / "pipeline").rglob("*.py")}
    commands = {path: text for path, text in sources.items() if '__name__ == "__main__"' in text}
    assert {path.parent.name for path in commands} == {"stages", "commands"}
    for path, text in commands.items():
        first = re.search(r"^(?:from|import) .*", text, re.MULTILINE)[0]
        assert first == "from pipeline.runtime.command import run_command", path
        assert text.endswith('if __name__ == "__main__":\n    run_command(main)\n'), path


def teacher_has_saved() -> bool:
    return any(TEACHER_STATES.glob("*.state"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_training_ends_at_once_on_either_signal_and_leaves_no_temporary_file(project, signum):
    change_teacher(epochs=500)
    process = command("pipeline.stages.teacher")
    wait_until(teacher_has_saved, process)
    begin = time.monotonic()
    line = interrupt(process, signum)
    assert time.monotonic() - begin < 5
    assert line.endswith("it resumes after its last finished epoch.")
    assert not list(Path().rglob("*.partial"))


def test_processes_that_share_a_training_end_together_with_one_line(project):
    change_teacher(epochs=500)
    process = command("pipeline.stages.teacher", PROCESSES="2")
    wait_until(teacher_has_saved, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    interrupt(process, signal.SIGINT)
    assert not any(map(lives, ranks))  # `communicate` waited for the output that they held


def test_decoding_workers_end_with_their_stage(project):
    change_params("dataset", storage="encoded", quality=90)
    run_stage("prepare")
    change_teacher(epochs=500)
    process = command("pipeline.stages.teacher")
    workers: list[int] = []

    def decoding() -> bool:
        workers[:] = children(process.pid)
        return teacher_has_saved() and bool(workers)

    wait_until(decoding, process)
    os.kill(process.pid, signal.SIGTERM)  # the stage alone
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert len(stderr.splitlines()) == 1
    wait_until(lambda: not any(map(lives, workers)), subprocess.Popen(["sleep", "10"]))
    assert not any(map(lives, workers))


def children(process: int) -> list[int]:
    result = subprocess.run(
        ["pgrep", "-P", str(process)], capture_output=True, text=True, check=False
    )
    return [int(number) for number in result.stdout.split()]


def lives(process: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_a_stage_ends_when_the_dvc_that_started_it_is_killed(project):
    change_teacher(epochs=500)
    script = "exec python -m pipeline.stages.teacher"  # dvc.yaml's
    dvc = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({script!r}, shell=True)"],
        env=os.environ
        | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DVC_STAGE": "teacher",
        },
        start_new_session=True,
    )
    wait_until(teacher_has_saved, dvc)
    (stage,) = children(dvc.pid)
    dvc.kill()
    dvc.wait()
    deadline = time.monotonic() + 10
    while lives(stage) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives(stage)


def test_each_stage_replaces_the_shell_in_which_dvc_starts_it():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
    for stage in stages.values():
        assert stage.get("do", stage)["cmd"].startswith("exec python -m pipeline.stages.")


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(folder):
    """`nohup`, and shells that start a background job, ignore signals."""
    write_params(folder, PARAMS)
    write_images(folder / "images")
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "sys.exit(subprocess.run([sys.executable, '-m', 'pipeline.stages.prepare']).returncode)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
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
    files = [*Path("models/teacher").iterdir(), Path("predictions/teacher.safetensors")]
    return [path.read_bytes() for path in sorted([*files, Path("metrics/teacher.json")])]


def test_a_teacher_killed_at_any_moment_ends_with_the_bytes_of_an_uninterrupted_one(project):
    change_teacher(epochs=16, ema_decay=0.9, warmup_epochs=3, schedule="step", milestones=[8])
    assert "resumes" not in finish(start(stage="teacher"))
    expected = teachers_outputs()
    assert not teacher_has_saved()
    process = start(stage="teacher")
    wait_until(teacher_has_saved, process)
    time.sleep(random.Random(1).uniform(0, 0.2))
    kill(process)
    resumed = re.search(r"resumes after epoch (\d+) of 16", finish(start(stage="teacher")))
    assert int(resumed[1]) > 0
    assert teachers_outputs() == expected
    assert not teacher_has_saved()


@pytest.mark.parametrize("whole_epochs", [1, 2])
def test_a_fine_tuned_teacher_resumes_frozen_or_thawed(project, monkeypatch, whole_epochs):
    dataset, params = (
        open_dataset(),
        TeacherTraining(
            **PARAMS["teacher"]["training"] | {"epochs": 4, "freeze_epochs": 2, "ema_decay": 0.5}
        ),
    )
    description = model_spec(
        "cifar_resnet", NetworkParams.model_validate({"name": "resnet8"}), dataset
    )

    def train(folder: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        network = build(description)
        fine_tuning.mark_last_layer(network, ["fc.weight", "fc.bias"])
        Path(folder).mkdir(exist_ok=True)
        progress = ResumeState(Path(folder), "any", SINGLE_PROCESS)
        device = torch.device("cpu")
        teacher_loop.fit_teacher(
            network, description.input, dataset, params, device, resume=progress
        )
        return network.state_dict()

    expected = train("uninterrupted")
    original, calls = teacher_loop.classification_metrics, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) > whole_epochs:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_loop, "classification_metrics", failing)
        with pytest.raises(KeyboardInterrupt):
            train("interrupted")
    found = train("interrupted")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.fixture
def refused(monkeypatch):
    """Train a teacher of one epoch that the gate refuses; return its state's path."""
    change_teacher(epochs=1)

    def refuse(*_: object, **__: object) -> None:
        raise UserError("refused")

    def train() -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(accuracy_gate, "check", refuse)
            with pytest.raises(UserError, match="refused"):
                run_stage("teacher")
        (state,) = TEACHER_STATES.glob("*.state")
        return state

    return train


def test_a_teacher_that_the_gate_refused_is_not_trained_again(
    project, refused, monkeypatch, capsys
):
    refused()
    monkeypatch.setattr(accuracy_gate, "check", lambda *_, **__: None)
    change_params("teacher", minimum_accuracy=0.01)
    run_stage("teacher")
    assert "  resumes after epoch 1 of 1\n" in capsys.readouterr().out
    assert not teacher_has_saved()


@pytest.mark.parametrize(
    "change",
    [
        lambda: change_teacher(seed=5),
        lambda: (write_images(Path("images"), per_class=21), run_stage("prepare")),
    ],
)
def test_a_teacher_does_not_resume_from_a_state_of_other_inputs(project, refused, capsys, change):
    before = refused()
    change()
    capsys.readouterr()
    after = refused()
    assert "resumes" not in capsys.readouterr().out
    assert after != before


@pytest.mark.parametrize("stage", ["prepare", "compare"])
def test_a_stage_killed_at_any_moment_leaves_its_outputs_complete(project, stage):
    output = Path({"prepare": "data/prepared", "compare": "reports"}[stage])
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    moments = random.Random(2)
    for _ in range(3):
        process = start(stage=stage)
        wait_until(output.with_name(f".{output.name}.partial").exists, process)
        time.sleep(moments.uniform(0, 0.01))
        kill(process)
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    finish(start(stage=stage))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert not list(Path().rglob("*.partial"))


def test_an_unfinished_output_is_removed_when_its_writing_fails(folder):
    def fail() -> None:
        with atomic_directory("out") as partial:
            assert signals.unfinished == {partial}
            raise UserError("any")

    with pytest.raises(UserError):
        fail()
    assert not signals.unfinished
    assert not list(folder.iterdir())


PREPARE = Target("prepare", ("pipeline.stages.prepare",))


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of the soak, after one stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "OUTPUTS", ("data/prepared",))
        project = Project(tmp_path_factory.mktemp("soak"))
        project.measure(PREPARE)
        yield project


def test_the_soak_counts_a_survived_interruption(soaked):
    row = Row()
    assert soaked.interrupt(PREPARE, signal.SIGTERM, 0.5, row)
    assert (row.kills, row.failures) == (1, [])


def test_the_soak_reports_different_bytes_and_stray_files(soaked, monkeypatch):
    row = Row()
    monkeypatch.setattr(soaked, "strays", lambda: ["/tmp/x"])
    monkeypatch.setattr(soaked, "expected", {PREPARE.run: ({"data/prepared/other": ""}, 1.0)})
    soaked.interrupt(PREPARE, signal.SIGKILL, 0.0, row)
    assert any("other bytes in data/prepared/dataset.json" in failure for failure in row.failures)
    assert any("left behind: /tmp/x" in failure for failure in row.failures)


def test_the_interruptions_every_command_by_every_signal():
    turns = interruptions.schedule(200)
    assert len(turns) == 200
    every = {(target, signum) for target, signum in turns}
    assert {target for target, _ in every} == {*interruptions.STAGES, *interruptions.WHOLE}
    assert all(
        (target, signum) in every
        for target in (*interruptions.STAGES, *interruptions.WHOLE)
        for signum in interruptions.SIGNALS
        if target.to != "rank" or signum != signal.SIGINT
    )
