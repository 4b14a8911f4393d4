"""The loop that students and baselines share, and their comparison."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import OUTPUTS, change_params, run_stage
from import_closure import ROOT
from safetensors.numpy import load_file

from pipeline.compute import device
from pipeline.compute.device import depthwise_in_float32, training_autocast
from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import checkpoint
from pipeline.models.spec import build
from pipeline.students.label_loss import label_loss
from pipeline.students.loop import whole_batch
from pipeline.training.optimisation import Average, batches
from pipeline.views.loader import Batch


def read(path: str) -> dict:
    return json.loads(Path(path).read_text("utf-8"))


def test_batches_hold_every_sample_once_and_never_one_alone():
    for count in (2, 16, 17, 33, 48):
        parts = batches(np.arange(count), 16)
        assert np.array_equal(np.concatenate(parts), np.arange(count))
        assert all(2 <= len(part) <= 17 for part in parts)


@pytest.mark.parametrize(("stage", "kind"), [("student", "students"), ("baseline", "baselines")])
def test_a_repeated_run_writes_the_same_bytes_a_baseline_without_teacher_and_store(
    project, stage, kind
):
    shutil.copy(ROOT / "dvc.yaml", project)  # the predictions say what it lists
    paths = [Path(path.format(kind=kind)) for path in OUTPUTS]
    before = [path.read_bytes() for path in paths]
    if stage == "baseline":
        (project / "models/teacher").rename(project / "away")
        (project / "data/soft_targets").rename(project / "away_too")
    run_stage(stage, "small")
    assert [path.read_bytes() for path in paths] == before


def test_the_model_kept_is_that_of_its_epoch_on_validation_and_its_predictions_are_measured(
    project,
):
    labels = open_dataset().splits["test"].labels
    for kind in ("students", "baselines"):
        history = pd.read_csv(f"metrics/history/{kind}/small.csv")
        metrics = read(f"metrics/{kind}/small.json")
        kept = history.set_index("epoch").loc[metrics["kept_epoch"]]
        assert metrics["validation_accuracy"] == pytest.approx(kept["validation_accuracy"])
        assert metrics["validation_nll"] == pytest.approx(kept["validation_nll"], rel=1e-4)
        logits = load_file(f"predictions/{kind}/small.safetensors")["test"]
        assert metrics["test_accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())


def test_depthwise_convolutions_compute_in_float32_on_a_cpu_and_nothing_else_of_them_changes():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.Conv2d(4, 2, 1), torch.nn.Flatten()
    )
    images, state = torch.randn(2, 4, 8, 8), network.state_dict()
    exact = network[0](images)
    depthwise_in_float32(network, torch.device("cpu"))
    assert list(network.state_dict()) == list(state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network[0](images), exact)  # float32 goes in and comes out
        ahead = network[0](images.bfloat16())
        assert ahead.dtype == torch.bfloat16
        assert torch.equal(ahead, network[0].cpu()(images.bfloat16().float()).bfloat16())
        assert network[1](exact).dtype == torch.bfloat16


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_networks_train_in_bfloat16_where_the_device_computes_in_it(monkeypatch, native, expected):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    layer = torch.nn.Linear(3, 2)
    with training_autocast(torch.device("cpu")):
        logits = layer(torch.ones(1, 3))
    assert str(logits.dtype) == f"torch.{expected}"
    label_loss(logits.float(), torch.tensor([1])).backward()
    assert layer.weight.grad.dtype == torch.float32


LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0], [1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])


def test_mixed_images_have_the_labels_of_both_by_their_weights():
    labels, partners = torch.tensor([2, 1, -1, -1]), torch.tensor([0, -1, 1, -1])
    weights = torch.tensor([0.3, 0.6, 0.9, 0.5])
    log_probabilities = LOGITS.log_softmax(1)
    expected = -(
        0.3 * log_probabilities[0, 2]
        + 0.7 * log_probabilities[0, 0]
        + 0.6 * log_probabilities[1, 1]
        + 0.1 * log_probabilities[2, 1]
    )
    found = label_loss(LOGITS, labels, partners, weights)
    assert found.item() == pytest.approx(expected.item() / 4)


def test_weights_of_one_are_no_mixing():
    labels, partners = torch.tensor([2, 1, -1, 0]), torch.tensor([0, -1, 1, 2])
    mixed = label_loss(LOGITS, labels, partners, torch.ones(4), label_smoothing=0.2)
    assert mixed.item() == pytest.approx(label_loss(LOGITS, labels, label_smoothing=0.2).item())


def test_the_label_loss_sums_labelled_rows_and_smoothing_gives_every_class_its_share():
    labels = torch.tensor([2, 1, -1, 0])
    targets = 0.9 * torch.nn.functional.one_hot(labels.clamp(0), 3) + 0.1 / 3
    targets[2] = 0  # no label, nothing to smooth
    expected = -(targets * LOGITS.log_softmax(1)).sum() / 4
    assert label_loss(LOGITS, labels, label_smoothing=0.1).item() == pytest.approx(expected.item())


def test_the_loss_sees_the_labels_and_the_partners_labels_of_a_mixed_batch():
    batch = Batch(
        np.array([3, 0, 2, 1]),
        torch.zeros(4, 1, 1, 1),
        partners=torch.tensor([0, 1, 1, 2]),
        weights=torch.tensor([0.3, 0.6, 0.9, 0.5]),
    )
    labels = torch.tensor([0, 1, 2, 0])
    whole = whole_batch(1, 0, batch.samples, torch.from_numpy(batch.samples), batch, labels)
    assert whole.labels.tolist() == [0, 0, 2, 1]
    assert whole.partner_labels.tolist() == [0, 1, 1, 2]
    assert whole.weights is batch.weights


@pytest.mark.parametrize(("stage", "kind"), [("student", "students"), ("baseline", "baselines")])
def test_label_smoothing_is_for_baselines_alone(project, stage, kind):
    weights = Path(f"models/{kind}/small/weights.safetensors")
    before = weights.read_bytes()
    change_params("training", label_smoothing=0.3)
    run_stage(stage, "small")
    assert (weights.read_bytes() != before) == (stage == "baseline")


def test_the_average_of_the_weights_is_what_is_measured_and_saved(project, monkeypatch):
    change_params("training", epochs=1, ema_decay=0.999)
    states, update = [], Average.update

    def record(average: Average, network: torch.nn.Module) -> None:
        states.append(copy.deepcopy(dict(network.named_parameters())))
        update(average, network)

    monkeypatch.setattr(Average, "update", record)
    run_stage("student", "small")
    metrics = read("metrics/students/small.json")
    assert metrics["last_epoch_test_nll"] == metrics["test_nll"]  # of the average, both
    averaged, description = checkpoint.load(Path("models/students/small"), produced_by="-")
    torch.manual_seed(2)
    expected = dict(build(description).named_parameters())
    for decay, state in zip((1 / 10, 2 / 11, 3 / 12), states, strict=True):
        expected = {k: decay * expected[k] + (1 - decay) * state[k] for k in state}
    for name, parameter in averaged.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6)


def no_compiler(graph, inputs):
    raise RuntimeError("there is no C compiler")


@pytest.mark.parametrize(
    ("compiler", "lines"),
    [
        ("eager", []),
        (
            no_compiler,
            [
                "  torch.compile cannot work here: not used (BackendCompilerFailed: "
                "backend='no_compiler' raised: RuntimeError: there is no C compiler)"
            ],
        ),
    ],
)
def test_a_network_trains_alike_if_it_is_compiled_and_if_it_cannot_be(
    project, monkeypatch, capsys, compiler, lines
):
    path, asked = Path("models/students/small/weights.safetensors"), []
    before = path.read_bytes()
    monkeypatch.setattr(device, "_pays_to_compile", lambda _, steps: asked.append(steps) or True)
    monkeypatch.setattr(device, "_COMPILER", compiler)
    monkeypatch.setattr(device.Compiled, "works", True)
    run_stage("student", "small")
    assert asked == [2 * 3, 2 * 3]  # method and network: epochs, batches
    assert path.read_bytes() == before
    assert [line for line in capsys.readouterr().out.splitlines() if "compile" in line] == lines


def test_long_runs_on_cuda_alone_are_compiled():
    network, enough = torch.nn.Linear(1, 1), device.COMPILED_STEPS
    assert device.compile_long_runs(network, torch.device("cpu"), 100 * enough) is network
    assert device.compile_long_runs(network, torch.device("cuda"), enough - 1) is network
    compiled = device.compile_long_runs(network, torch.device("cuda"), enough)
    assert compiled is not network
    assert all(a is b for a, b in zip(compiled.parameters(), network.parameters(), strict=True))


def test_a_stage_computes_in_ieee_float32_on_cuda_from_its_choice_of_device_on():
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        backend.allow_tf32 = True
    device.default_device()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
