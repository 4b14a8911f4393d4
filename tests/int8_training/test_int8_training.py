"""A distilled student trains on for its int8 file, from the cached soft labels."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import change_params, run_stage
from import_closure import ROOT
from torch import nn

from pipeline.export.params import Int8TrainingParams
from pipeline.int8_training import fake_quantisation
from pipeline.int8_training.fake_quantisation import (
    RANGE,
    FakeQuantized,
    float_state,
    round_input,
    round_weight,
)
from pipeline.int8_training.training_run import continued, continued_loss
from pipeline.models import checkpoint
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import ModelOutputs
from pipeline.runtime.progress import EpochLog
from pipeline.students.loop import TrainingBatch
from pipeline.students.params import TrainingParams
from pipeline.training.fine_tuning import FineTuning

OUTPUT, STUDENT = Path("models/int8/small"), Path("models/students/small")
OPTIONS = {"epochs": 2, "learning_rate_factor": 0.2}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8, eps=0.1), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_resumed_training_writes_the_bytes_of_one_in_one_run_and_no_file_of_the_student(
    project, monkeypatch, capsys
):
    change_params("export", precision="int8", int8_training=OPTIONS)
    before = contents(Path("models/students"))

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EpochLog, "line", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_stage("int8_training", "small")
    assert [path.name for path in OUTPUT.iterdir()] == ["not_trained.json"]
    capsys.readouterr()
    run_stage("int8_training", "small")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  resumes after epoch 1 of 2"
    assert [line.split("validation accuracy")[0].split("  train")[0] for line in lines[2:]] == [
        "  epoch 2/2",
        "  ",
    ]
    resumed = contents(OUTPUT)
    run_stage("int8_training", "small")  # which has finished, and is not trained again
    assert "  resumes after epoch 2 of 2\n" in capsys.readouterr().out
    assert contents(OUTPUT) == resumed
    shutil.rmtree(".scratch/training/int8")
    run_stage("int8_training", "small")
    assert contents(OUTPUT) == resumed
    assert ModelOutputs("distilled", "small").int8_source == OUTPUT
    assert ModelOutputs("baseline", "small").int8_source == Path("models/baselines/small")
    assert contents(Path("models/students")) == before

    trained, spec = checkpoint.load(OUTPUT, produced_by="-")
    own, own_spec = checkpoint.load(STUDENT, produced_by="-")
    assert spec == own_spec
    pairs = zip(trained.parameters(), own.parameters(), strict=True)
    assert all(not torch.equal(first, second) for first, second in pairs)


def change_views() -> None:
    change_params("views", seed=8)
    run_stage("soft_targets")


def change_store() -> None:
    change_params("soft_targets", precision="bfloat16")
    run_stage("soft_targets")


CHANGES = {
    "the student's weights": lambda: shutil.copytree(
        "models/baselines/small", STUDENT, dirs_exist_ok=True
    ),
    "its epochs before": lambda: change_params("training", epochs=3),
    "training": lambda: change_params("training", learning_rate=0.04),
    "distillation": lambda: change_params("distillation", temperature=2.0),
    "views": change_views,
    "store": change_store,
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_change_of_an_input_trains_anew(project, capsys, changed):
    change_params("export", precision="int8", int8_training=OPTIONS | {"epochs": 1})
    scratch = ModelOutputs("distilled", "small").int8_scratch
    run_stage("int8_training", "small")
    (before,) = scratch.glob("*.state")
    CHANGES[changed]()
    run_stage("int8_training", "small")
    assert "resumes" not in capsys.readouterr().out
    (after,) = scratch.glob("*.state")
    assert after != before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precision": "int8", "int8_training": "none"}, "export: int8_training: none"),
        ({"precision": "float32", "int8_training": OPTIONS}, "export: precision: float32"),
    ],
)
def test_without_it_nothing_is_trained_and_the_folder_says_why(project, options, reason):
    change_params("export", **options)
    run_stage("int8_training", "small")
    assert ModelOutputs("distilled", "small").int8_source == STUDENT
    (file,) = OUTPUT.iterdir()
    assert json.loads(file.read_text("utf-8")) == {"reason": reason}


def test_without_it_torch_is_not_loaded():
    code = "import sys, pipeline.stages.int8_training; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_weights_are_rounded_to_steps_of_each_channel_and_gradients_pass():
    weight = torch.tensor([[0.64, 0.014, -0.626], [64.0, -1.6, 0.4]], requires_grad=True)
    rounded = round_weight(weight)  # steps of 0.01 and 1
    assert torch.allclose(rounded, torch.tensor([[0.64, 0.01, -0.63], [64.0, -2.0, 0.0]]))
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 3))
    assert torch.equal(round_weight(torch.zeros(2, 3)), torch.zeros(2, 3))  # a dead channel


def test_rounding_before_a_batch_norm_is_rounding_after_it_is_folded():
    weight, factor = torch.randn(8, 27), torch.rand(8, 1) + 0.1
    assert torch.allclose(round_weight(weight) * factor, round_weight(weight * factor), atol=1e-6)


def test_inputs_are_rounded_to_256_steps_and_clipped():
    features = torch.tensor([-3.0, -1.0, 0.0, 0.004, 0.006, 1.55, 9.0])
    expected = torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.01, 1.55, 1.55])
    low, high = torch.tensor(-1.0), torch.tensor(1.55)  # steps of 0.01
    assert torch.allclose(round_input(features, low, high), expected)


def test_a_network_rounds_at_each_layer_and_is_otherwise_as_it_was():
    network, inputs = tiny().eval(), images(64)
    fake = FakeQuantized(copy.deepcopy(network), "tiny")
    fake.train()(inputs)
    assert torch.allclose(getattr(fake.network[0], RANGE), torch.stack(torch.aminmax(inputs)))
    network.load_state_dict(float_state(fake.state_dict()))

    features = network[2](
        network[1](
            nn.functional.conv2d(
                round_input(inputs, *torch.aminmax(inputs)),
                round_weight(network[0].weight),
                network[0].bias,
                stride=2,
            )
        )
    )
    pooled = features.mean((2, 3))
    pooled = round_input(pooled, *getattr(fake.network[6], RANGE))
    expected = nn.functional.linear(pooled, round_weight(network[6].weight), network[6].bias)
    assert torch.allclose(fake.eval()(inputs), expected, atol=1e-5)
    assert not torch.allclose(fake(inputs), network(inputs), atol=1e-5)


def test_a_layer_that_gets_its_input_by_name_rounds_it():
    layer, inputs = nn.Linear(8, 3), torch.randn(5, 8)
    by_place, by_name = (FakeQuantized(copy.deepcopy(layer), "mine").network for _ in range(2))
    rounded = by_place(inputs)
    assert torch.equal(by_name(input=inputs), rounded)
    assert not torch.equal(rounded, layer(inputs))


def test_ranges_follow_the_inputs_in_training_alone():
    fake, inputs = FakeQuantized(tiny(), "tiny"), images(8)
    fake.train()(inputs)
    before = copy.deepcopy(fake.state_dict())
    fake.eval()(10 * inputs)
    assert all(torch.equal(value, before[key]) for key, value in fake.state_dict().items())
    fake.train()(10 * inputs)
    key = f"network.0.{RANGE}"
    assert torch.allclose(fake.state_dict()[key], 1.09 * before[key])


def test_frozen_batch_norm_keeps_its_statistics_while_the_ranges_follow_the_inputs():
    fake = FakeQuantized(tiny(), "tiny")
    training = {"batch_size": 8, "optimizer": "sgd", "learning_rate": 0.1, "seed": 0}
    params = TrainingParams(epochs=1, freeze_batch_norm=True, **training)
    FineTuning(fake, params, frozenset(), lambda network: network).begin_epoch(1)(images(8))
    assert torch.equal(fake.network[1].running_mean, torch.zeros(8))
    assert getattr(fake.network[0], RANGE).any()


def test_a_network_without_layers_to_round_at_is_refused():
    with pytest.raises(UserError, match="network `own` has no convolution or linear layer of"):
        FakeQuantized(nn.Flatten(), "own")


def test_training_recovers_half_of_what_rounding_costs(monkeypatch):
    monkeypatch.setattr(fake_quantisation, "WEIGHT_STEPS", 1)  # where rounding costs much
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(27, 64), nn.ReLU(), nn.Linear(64, 3))
    inputs = images(256)[:, :, :3, :3]
    targets = network(inputs).detach()
    fake = FakeQuantized(network, "own")
    optimizer = torch.optim.Adam(fake.parameters(), lr=3e-3)
    losses = []
    for _ in range(300):
        loss = (fake(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < losses[0] / 2


def test_it_continues_the_students_training():
    kept = {"batch_size": 16, "optimizer": "sgd", "weight_decay": 0.1, "seed": 1}
    schedule = {"schedule": "step", "milestones": [20], "warmup_epochs": 3, "ema_decay": 0.9}
    own = TrainingParams(epochs=40, learning_rate=0.5, **kept, **schedule)
    fine_tuning = {"freeze_epochs": 5, "backbone_learning_rate_factor": 0.2}
    own = own.model_copy(update=fine_tuning | {"freeze_batch_norm": True})
    expected = TrainingParams(epochs=2, learning_rate=0.01, freeze_batch_norm=True, **kept)
    found = continued(own, Int8TrainingParams()).model_dump()
    assert found["learning_rate"] == pytest.approx(0.01)
    assert found | {"learning_rate": 0.01} == expected.model_dump()

    seen = []
    batch = TrainingBatch(2, 0, np.arange(3), torch.zeros(3))
    continued_loss(lambda _, batch: seen.append(batch), 40)(torch.zeros(3, 3), batch)
    assert seen == [replace(batch, epoch=42)]  # so a method's warm-up does not begin again


def test_computed_weights_are_refused_in_words():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    )
    with pytest.raises(
        UserError, match="network `own` computes the weights of a layer from others"
    ):
        FakeQuantized(network, "own")
