"""Several seeds: each has the bytes of a run with it alone, and none is trained twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import OUTPUTS, change_params, compare_every_network, run_stage
from import_closure import ROOT
from safetensors.numpy import load_file
from stage_process import fork_command

from pipeline.int8_training.training_run import own_training
from pipeline.models import checkpoint
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import ModelOutputs, Start
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.runtime.validation import validate
from pipeline.students import loop
from pipeline.students.loop import TrainingResult
from pipeline.students.params import TrainingSection, load_student, load_training
from pipeline.students.training_run import Trained, write_trained

KINDS = {"student": ("distilled", "students"), "baseline": ("baseline", "baselines")}


def weights(stage: str, seed: int) -> bytes:
    """The network of a seed, the main one or another."""
    model = ModelOutputs(KINDS[stage][0], "small")
    main = json.loads((model.model / "network.json").read_bytes())["start"]["seed"]
    folder = model.model if seed == main else ModelOutputs(model.role, "small", seed).model
    return (folder / "weights.safetensors").read_bytes()


def trained_seeds(output: str) -> list[str]:
    """The seeds whose epochs ran."""
    parts = output.split(" seed ")[1:]
    return [part.split(" ")[0] for part in parts if "epoch 1/" in part]


@pytest.mark.parametrize("stage", KINDS)
def test_one_more_seed_trains_one_more_and_one_less_none_each_with_the_bytes_of_a_single_run(
    stage, project, capfd
):
    kind = KINDS[stage][1]
    single = {}
    for seed in (0, 1):
        change_params("training", seeds=seed)
        run_stage(stage, "small")
        single[seed] = [Path(path.format(kind=kind)).read_bytes() for path in OUTPUTS]
    shutil.rmtree(".scratch")
    change_params("training", seeds=[0])
    run_stage(stage, "small")
    capfd.readouterr()
    change_params("training", seeds=[0, 1, 2])
    run_stage(stage, "small")
    assert trained_seeds(capfd.readouterr().out) == ["1", "2"]
    networks = {seed: weights(stage, seed) for seed in (0, 1, 2)}
    assert len(set(networks.values())) == 3
    assert [networks[0], networks[1]] == [single[0][0], single[1][0]]
    metrics = json.loads(Path(f"metrics/{kind}/small.json").read_bytes())
    best = max(metrics["seeds"], key=lambda of: (of["validation_accuracy"], -of["validation_nll"]))
    assert metrics["seed"] == best["seed"]
    accuracies = [of["test_accuracy"] for of in metrics["seeds"]]
    assert metrics["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert metrics["test_accuracy_deviation"] == pytest.approx(np.std(accuracies, ddof=1))
    logits = load_file(f"predictions/{kind}/small.safetensors")
    assert set(logits) == {
        *("validation", "test"),
        *(
            f"seeds.{s}.{split}"
            for s in {0, 1, 2} - {best["seed"]}
            for split in ("validation", "test")
        ),
    }
    change_params("training", seeds=1)
    run_stage(stage, "small")
    assert "epoch 1/" not in capfd.readouterr().out
    assert [Path(path.format(kind=kind)).read_bytes() for path in OUTPUTS][:4] == single[1][:4]
    assert not (ModelOutputs(KINDS[stage][0], "small").model / "seeds").exists()
    change_params("training", seeds=1, learning_rate=0.04)  # another training forgets the others
    run_stage(stage, "small")
    assert len(list(Path(f".scratch/training/{kind}/small").glob("*.state"))) == 1


def test_a_run_that_was_stopped_goes_on_at_its_seed(project, monkeypatch, capfd):
    change_params("training", seeds=[0, 1])
    run_stage("student", "small")
    expected = [weights("student", seed) for seed in (0, 1)]
    shutil.rmtree(".scratch")
    evaluate, calls = loop.evaluate, []

    def stopped(*arguments: object):
        calls.append(arguments)
        if len(calls) == 2 + 3 + 1:  # two epochs and three measurements of seed 0, one of seed 1
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", stopped)
    monkeypatch.setattr("pipeline.students.training_run.evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_stage("student", "small")
    monkeypatch.undo()
    os.chdir(project)
    capfd.readouterr()
    run_stage("student", "small")
    assert trained_seeds(capfd.readouterr().out) == ["1"]
    assert [weights("student", seed) for seed in (0, 1)] == expected


def test_seeds_side_by_side_have_the_bytes_of_seeds_in_turn(project, monkeypatch, capfd):
    change_params("training", seeds=[0, 1])
    run_stage("student", "small")
    outputs = [Path(path.format(kind="students")) for path in OUTPUTS]
    in_turn = [path.read_bytes() for path in outputs]
    shutil.rmtree(".scratch")
    for name, value in {"SEED_JOBS": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pipeline.seeds.prefixed.subprocess.Popen", fork_command)
    capfd.readouterr()
    run_stage("student", "small")
    assert {"seed 0:   epoch 1/2", "seed 1:   epoch 1/2"} <= {
        line[:19] for line in capfd.readouterr().out.splitlines()
    }
    assert [path.read_bytes() for path in outputs] == in_turn


def test_seeds_side_by_side_are_trained_once_under_dvc(project):
    """The stage, which DVC starts, finds the states of the seeds that it started itself."""
    change_params("training", seeds=[0, 1])
    environment = {"DVC_STAGE": "baseline@small", "SEED_JOBS": "2", "PYTHONPATH": str(ROOT)}

    def run() -> str:
        return subprocess.run(
            [sys.executable, "-m", "pipeline.stages.baseline", "small"],
            env=os.environ | environment | {"OMP_NUM_THREADS": "1,1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert run().count("epoch 1/2") == 2
    time = Path(".scratch/stage_times/baseline@small.json")  # of all of the stage's work
    time.unlink()
    assert "epoch 1/2" not in run()
    assert not time.exists()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_seeds_side_by_side_end_with_the_stage_that_started_them(project, signum):
    change_params("training", seeds=[0, 1], epochs=2000)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SEED_JOBS": "2"}
    command = [sys.executable, "-m", "pipeline.stages.student", "small"]
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    ) as stage:
        waiting = {"seed 0:   epoch", "seed 1:   epoch"}
        while waiting:
            waiting -= {stage.stdout.readline()[:15]}
        seeds = psutil.Process(stage.pid).children()
        assert len(seeds) == 2
        stage.send_signal(signum)
        stage.stdout.close()
    gone, _ = psutil.wait_procs(seeds, timeout=10)
    assert len(gone) == 2


def test_a_seed_that_is_none_of_the_student_is_refused(project):
    with pytest.raises(UserError, match=r"--seed is '9'; expected one of the seeds .*: 2\."):
        run_stage("student", "small", "--seed", "9")


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_are_different_numbers(seeds):
    with pytest.raises(UserError, match="expected a number, or a list of different numbers"):
        validate(
            TrainingSection,
            {"epochs": 1, "batch_size": 2, "optimizer": "sgd", "learning_rate": 1, "seeds": seeds},
            "params.yaml: training",
        )


#: Of two trainings each: accuracy and NLL on validation, the same on test; the second one is main.
MAIN_IS_THE_SECOND = {
    "by accuracy": [((0.8, 0.5), (0.9, 0.4)), ((0.9, 0.6), (0.7, 0.7))],
    "by NLL if accuracies are equal": [((0.8, 0.5), (0.9, 0.3)), ((0.8, 0.4), (0.9, 0.6))],
}


@pytest.mark.parametrize("case", MAIN_IS_THE_SECOND)
def test_the_main_training_is_the_best_on_validation_though_it_is_the_worst_on_test(project, case):
    outputs = ModelOutputs("distilled", "small")
    network, spec = checkpoint.load(outputs.model, produced_by="-")
    history = pd.read_csv(outputs.history).drop(columns="kept").to_dict("records")
    result = TrainingResult(history, 1, network.state_dict(), torch.empty(0), 8)
    trained = [
        Trained(
            seed,
            network,
            spec,
            Start(text="from scratch", sha256="0" * 64, seed=seed),
            result,
            {
                **dict(zip(("validation_accuracy", "validation_nll"), validation, strict=True)),
                **dict(zip(("test_accuracy", "test_nll"), test, strict=True)),
                **{"kept_epoch": 1, "optimiser_steps": 8},
            },
            {"validation": torch.zeros(12, 3), "test": torch.zeros(12, 3)},
        )
        for seed, (validation, test) in enumerate(MAIN_IS_THE_SECOND[case])
    ]
    write_trained(outputs, trained, StageInputs("student", "small"))
    assert json.loads(outputs.metrics.read_bytes())["seed"] == 1
    assert checkpoint.read_start(outputs.model, produced_by="-").seed == 1
    assert outputs.other_seeds == [0]


def test_the_comparison_is_over_all_seeds_and_ships_the_best_on_validation(project, capfd):
    change_params("training", seeds=[0, 1, 2])
    for stage in ("baseline", "student", "int8_training"):
        run_stage(stage, "small")
    compare_every_network()
    output = capfd.readouterr().out
    metrics = {
        role: json.loads(Path(f"metrics/{role}/small.json").read_bytes())
        for role in ("students", "baselines")
    }
    by_seed = {
        role: {of["seed"]: of["test_accuracy"] for of in content["seeds"]}
        for role, content in metrics.items()
    }
    comparison = json.loads(Path("metrics/comparison.json").read_bytes())
    student = comparison["students"]["small"]
    assert student["seeds"]["trainings"] == [
        {
            "seed": seed,
            "accuracy": pytest.approx(by_seed["students"][seed], abs=1e-6),
            "baseline": pytest.approx(by_seed["baselines"][seed], abs=1e-6),
        }
        for seed in (0, 1, 2)
    ]
    gains = [by_seed["students"][seed] - by_seed["baselines"][seed] for seed in (0, 1, 2)]
    assert student["gain"] == pytest.approx(np.mean(gains), abs=1e-6)
    assert student["gain_deviation"] == pytest.approx(np.std(gains, ddof=1), abs=1e-6)
    assert student["gain_low"] < student["gain"] < student["gain_high"]
    assert "baseline_start" not in student
    assert "small: 3 seeds, " in output
    shipped = json.loads(Path("models/chosen/classifier.json").read_bytes())
    role = "students" if shipped["role"] == "distilled" else "baselines"
    assert shipped["start"]["seed"] == metrics[role]["seed"]
    page = Path("reports/index.html").read_text("utf-8")
    assert all(f"small, seed {seed}: " in page for seed in (0, 1, 2))
    # A student that trains on for int8 goes on from its main training.
    section = load_training("small", load_student("small"))
    main = own_training(section, Path("models/students/small"), "dvc repro")
    assert main.seed == metrics["students"]["seed"]
