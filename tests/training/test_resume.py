"""A killed training goes on from its last finished epoch, and ends with the bytes of one that was
never killed."""

import io
import random
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from subprocess import Popen

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import (
    OUTPUTS,
    change_params,
    forget_trainings,
    run_stage,
    take_as_prepared,
    write_params,
)
from import_closure import ROOT
from safetensors.torch import load_file
from stage_process import finish, kill, start, start_module

from pipeline.compute import provenance
from pipeline.compute.distributed import SINGLE_PROCESS, ProcessGroup
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.files import sha256_of_file
from pipeline.runtime.locks import exclusive
from pipeline.runtime.outputs import PREPARED
from pipeline.students import initial_network, loop, training_run
from pipeline.training import resume

SCRATCH = Path(".scratch/training")

#: A network that draws random numbers in training, and is quick to load and to train.
DROPOUT_FAMILY = """
from torch import nn


def build(network, num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(72, num_classes),
    )
"""
TRAINING = {"schedule": "step", "milestones": [5, 9], "warmup_epochs": 3, "ema_decay": 0.9}


def states(kind: str = "students") -> list[Path]:
    return list((SCRATCH / kind / "small").glob("*.state"))


def read(path: Path) -> dict:
    """A state, of which the first 32 bytes are a checksum."""
    return torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)


def finished_epochs() -> int:
    return max((len(read(path)["trained"]["history"]) for path in states()), default=0)


def wait_for_epochs(process, count: int) -> None:
    """Until so many more have been finished, or the run has ended."""
    changes, last = 0, None
    while changes < count and process.poll() is None:
        try:
            now = [path.stat().st_ino for path in states()]
        except FileNotFoundError:  # it was replaced between the two
            continue
        changes, last = changes + (now != last), now
        time.sleep(0.001)


def outputs(kind: str = "students") -> list[bytes]:
    return [Path(path.format(kind=kind)).read_bytes() for path in OUTPUTS]


def resumed_after(output: str) -> int:
    said = re.search(r"resumes after epoch (\d+) of", output)
    return int(said[1]) if said else 0


@pytest.mark.parametrize(
    ("processes", "kills", "epochs"),
    [(1, 1, 12), pytest.param(2, 1, 20, marks=pytest.mark.slow)],
)
def test_a_training_killed_at_any_moments_ends_with_the_bytes_of_an_uninterrupted_one(
    project, tmp_path, processes, kills, epochs
):
    code = tmp_path / "code"
    shutil.copytree(ROOT / "pipeline", code / "pipeline")
    (code / "pipeline/networks/dropout.py").write_text(DROPOUT_FAMILY, "utf-8")
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["training"] |= TRAINING | {"epochs": epochs}
    params["distillation"]["temperature"] = {"first": 8.0, "last": 1.0}
    params["students"]["small"] |= {"family": "dropout", "network": "any"}
    write_params(Path(), params)
    arguments = (processes, code, "student", "small")
    uninterrupted = finish(start(*arguments))
    assert resumed_after(uninterrupted) == 0
    # Several processes print once, and count each sample once.
    assert uninterrupted.count(f"epoch {epochs}/{epochs}") == 1
    assert uninterrupted.count("test accuracy") == 1
    logits = load_file("predictions/students/small.safetensors")
    assert {split: len(rows) for split, rows in logits.items()} == {"validation": 12, "test": 12}
    expected = outputs()
    forget_trainings()

    moments = random.Random(processes)
    kept = 0
    for _ in range(kills):
        process = start(*arguments)
        wait_for_epochs(process, moments.randint(2, 12))
        time.sleep(moments.uniform(0, 0.02))
        kill(process)
        assert kept < finished_epochs() < epochs
        kept = finished_epochs()
    output = finish(start(*arguments))
    assert resumed_after(output) == kept
    assert outputs() == expected
    assert not list(SCRATCH.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "epochs", "frozen"), [(1, 2, 11), (2, 2, 11), (2, 5, 4)])
def test_a_fine_tuned_student_killed_while_frozen_or_thawed_ends_with_the_same_bytes(
    project, processes, epochs, frozen
):
    shutil.copytree("models/baselines/small", "start")
    weights = {"path": "start", "sha256": sha256_of_file(Path("start/network.json"))}
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["training"] |= {
        **{"epochs": 12, "freeze_epochs": frozen, "backbone_learning_rate_factor": 0.1},
        **{"optimizer": "adamw", "learning_rate": 0.001, "ema_decay": 0.9},
    }
    params["students"]["small"]["network"] = {"name": "resnet8", "weights": weights}
    write_params(Path(), params)

    def begin() -> Popen:  # no fork, which has the state of autograd that earlier tests have left
        return start_module("pipeline.stages.student", "small", PROCESSES=str(processes))

    finish(begin())
    expected = outputs()
    forget_trainings()
    process = begin()
    wait_for_epochs(process, epochs + 1)  # the first change is that there is none
    kill(process)
    kept = finished_epochs()
    assert 0 < kept < frozen if epochs < frozen else frozen <= kept < 12
    assert resumed_after(finish(begin())) == kept
    assert outputs() == expected


@pytest.fixture
def interrupted(project, monkeypatch):
    """Three epochs of which the run ends in the second: the folder, and the function to call
    before running on."""
    change_params("training", epochs=3)
    original, calls = loop.evaluate, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    def interrupt(stage: str) -> None:
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(loop, "evaluate", failing)
            with pytest.raises(KeyboardInterrupt):
                run_stage(stage, "small")

    return interrupt


@pytest.mark.parametrize(("stage", "kind"), [("student", "students"), ("baseline", "baselines")])
def test_a_run_says_what_it_goes_on_from_and_leaves_the_finished_training(
    interrupted, capsys, stage, kind
):
    run_stage(stage, "small")
    expected = outputs(kind)
    forget_trainings()
    interrupted(stage)
    (path,) = states(kind)
    assert "conv.weight" in read(path)["network"]
    history = pd.read_csv(f"metrics/history/{kind}/small.csv")
    assert history["epoch"].tolist() == [1]
    assert not history["kept"].any()  # so the comparison refuses it
    capsys.readouterr()
    run_stage(stage, "small")
    assert "  resumes after epoch 1 of 3\n" in capsys.readouterr().out
    assert outputs(kind) == expected
    assert states(kind) == [path]
    assert (
        not {"network", "optimisation"} & read(path).keys()
    )  # the kept epoch's weights are enough


def change_network() -> None:
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["students"]["small"]["network"] = {"name": "resnet8", "input_size": 12}
    write_params(Path(), params)


def change_store() -> None:
    change_params("soft_targets", precision="bfloat16")
    run_stage("soft_targets")


def change_prepared_images() -> None:
    images = np.load(PREPARED / "train_images.npy", mmap_mode="r+")
    images[0, 0, 0, 0] ^= 1
    images.flush()
    take_as_prepared()


CHANGES_OF_BOTH = {
    "training": lambda: change_params("training", learning_rate=0.04),
    "network": change_network,
}
CHANGES = {
    "student": {
        "store": change_store,
        "distillation": lambda: change_params("distillation", temperature=2.0),
        **CHANGES_OF_BOTH,
    },
    "baseline": {
        "views' policy": lambda: change_params("views", policy="random_resized_crop"),
        "views' seed": lambda: change_params("views", seed=8),
        "prepared images": change_prepared_images,
        **CHANGES_OF_BOTH,
    },
}


@pytest.mark.parametrize(("stage", "changed"), [(of, it) for of in CHANGES for it in CHANGES[of]])
def test_a_change_of_an_input_starts_anew_and_removes_the_old_state(
    interrupted, capsys, stage, changed
):
    interrupted(stage)
    (before,) = states(f"{stage}s")
    CHANGES[stage][changed]()
    interrupted(stage)
    assert "resumes" not in capsys.readouterr().out
    (after,) = states(f"{stage}s")
    assert after != before


def test_another_students_state_stays(interrupted):
    interrupted("student")
    interrupted("baseline")
    other = SCRATCH / "students/other/0.state"
    other.parent.mkdir()
    other.write_bytes(b"")
    run_stage("student", "small")
    assert other.exists()
    assert states("baselines")


@pytest.mark.parametrize("damage", ["truncated", "bit"])
def test_a_damaged_state_is_said_and_not_used(interrupted, capsys, damage):
    run_stage("student", "small")
    expected = outputs()
    forget_trainings()
    interrupted("student")
    (path,) = states()
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1  # of a weight
    path.write_bytes(content if damage == "bit" else content[:-1])
    run_stage("student", "small")
    assert "is damaged: the training starts again" in capsys.readouterr().out
    assert outputs() == expected


def test_whatever_moves_a_trainings_bytes_is_in_the_name_of_its_state(monkeypatch, project):
    cpu = torch.device("cpu")
    inputs = {"training": {"seed": 1}, "dataset": "x"}

    def name(inputs: dict, group: ProcessGroup = SINGLE_PROCESS) -> str:
        return resume.fingerprint(inputs, cpu, group).name

    found = {name(inputs), name(inputs | {"dataset": "y"})}
    found |= {name(inputs | {"training": {"seed": 2}}), name(inputs, ProcessGroup(0, 2))}
    for target, attribute, value in (
        (torch, "__version__", "3"),
        (torch, "get_num_threads", lambda: 77),
        (torch.backends.cpu, "get_cpu_capability", lambda: "other"),
        (resume, "computes_in_bfloat16", lambda _: None),
        (resume, "device_name", lambda _: "other"),
        (resume, "loaded_code", lambda: {"training.py": "edited"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, value)
            found.add(name(inputs))
    assert len(found) == 10
    assert name(inputs, ProcessGroup(1, 2)) in found  # of any rank
    assert name(inputs) in found


def test_a_state_of_other_threads_or_code_is_said_and_kept_until_the_training_has_finished(
    interrupted, monkeypatch, capsys
):
    interrupted("student")
    (before,) = states()
    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads + 1)
        patch.setattr(resume, "loaded_code", lambda: {"training.py": "edited"})
        capsys.readouterr()
        interrupted("student")
        assert (
            f"  starts again: a state of 1 epoch was made with {counted(threads, 'thread')} "
            f"instead of {threads + 1}, other code. It is kept until this training has finished, "
            "for a run with these.\n"
        ) in capsys.readouterr().out
    interrupted("student")
    assert "resumes after epoch 1 of" in capsys.readouterr().out
    assert len(states()) == 2
    run_stage("student", "small")
    assert states() == [before]


def test_of_states_of_other_code_or_other_first_weights_the_newest_is_kept(
    interrupted, monkeypatch, capsys
):
    found = []
    for code in ("first", "second", "third"):
        monkeypatch.setattr(resume, "loaded_code", lambda code=code: {"training.py": code})
        interrupted("student")
        found.append(set(states()))
    assert [len(each) for each in found] == [1, 2, 2]
    assert not found[0] & found[2]
    start = initial_network.build_initial_network

    def other_start(*arguments: object) -> object:
        initial = start(*arguments)
        return replace(initial, start=initial.start.model_copy(update={"sha256": "0" * 64}))

    capsys.readouterr()
    monkeypatch.setattr(training_run, "build_initial_network", other_start)
    run_stage("student", "small")
    assert "was made with other first weights" in capsys.readouterr().out
    assert len(states()) == 1


def test_the_name_of_a_state_fits_encrypted_folders(interrupted):
    interrupted("student")
    (path,) = states()
    assert len(f".{path.name}.partial") < 143


def test_the_code_that_is_loaded_counts_and_no_other():
    code = provenance.loaded_code()
    assert {"students/loop.py", "training/resume.py"} <= code.keys()
    modules = {f"pipeline.{name.removesuffix('.py').replace('/', '.')}" for name in code}
    assert {name.removesuffix(".__init__") for name in modules} <= sys.modules.keys()


def test_two_trainings_of_one_student_at_once_are_refused(project):
    with (
        exclusive(SCRATCH / "students/small"),
        pytest.raises(UserError, match="another run of this stage has locked `.scratch/train"),
    ):
        run_stage("student", "small")
