"""The loop that students and baselines share, and their comparison."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import run_stage, write_params
from safetensors.numpy import load_file

from pipeline.dataset import open_dataset
from pipeline.device import training_autocast
from pipeline.errors import UserError
from pipeline.stages.teacher import cosine_with_warmup
from pipeline.training import batches, label_loss, learning_rate_factor

OUTPUTS = [
    "models/{kind}/small/weights.safetensors",
    "models/{kind}/small/network.json",
    "predictions/{kind}/small.safetensors",
    "metrics/{kind}/small.json",
    "metrics/history/{kind}/small.csv",
]


def read(path: str) -> dict:
    return json.loads(Path(path).read_text("utf-8"))


@pytest.mark.parametrize("factor", [learning_rate_factor, cosine_with_warmup])
def test_the_learning_rate_rises_linearly_and_falls_as_a_half_cosine(factor):
    factors = [factor(step, 110, 10) for step in range(110)]
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10)
    assert factors[10] == pytest.approx(1)
    assert factors[60] == pytest.approx(0.5)
    assert 0 < factors[109] < 0.001


def test_batches_hold_every_sample_once_and_never_one_alone():
    for count in (2, 16, 17, 33, 48):
        parts = batches(np.arange(count), 16)
        assert np.array_equal(np.concatenate(parts), np.arange(count))
        assert all(2 <= len(part) <= 17 for part in parts)


@pytest.mark.parametrize(("stage", "kind"), [("student", "students"), ("baseline", "baselines")])
def test_a_repeated_run_writes_the_same_bytes(project, stage, kind):
    paths = [Path(path.format(kind=kind)) for path in OUTPUTS]
    before = [path.read_bytes() for path in paths]
    run_stage(stage, "small")
    assert [path.read_bytes() for path in paths] == before


def test_a_baseline_needs_neither_the_teacher_nor_its_store(project):
    (project / "models/teacher").rename(project / "away")
    (project / "data/soft_targets").rename(project / "away_too")
    before = Path("metrics/baselines/small.json").read_bytes()
    run_stage("baseline", "small")
    assert Path("metrics/baselines/small.json").read_bytes() == before


def test_the_model_kept_is_the_best_on_validation(project):
    history = pd.read_csv("metrics/history/students/small.csv")
    metrics = read("metrics/students/small.json")
    ranked = history.sort_values(["validation_accuracy", "validation_nll"], ascending=[False, True])
    assert metrics["best_epoch"] == ranked.iloc[0]["epoch"]
    assert metrics["validation_accuracy"] == pytest.approx(ranked.iloc[0]["validation_accuracy"])
    assert metrics["validation_nll"] == pytest.approx(ranked.iloc[0]["validation_nll"], rel=1e-4)


def test_the_metrics_are_those_of_the_predictions(project):
    labels = open_dataset().splits["test"].labels
    for kind in ("students", "baselines"):
        logits = load_file(f"predictions/{kind}/small.safetensors")["test"]
        accuracy = read(f"metrics/{kind}/small.json")["test_accuracy"]
        assert accuracy == pytest.approx((logits.argmax(1) == labels).mean())


def test_a_training_that_diverges_is_told_and_writes_nothing(project):
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["training"]["learning_rate"] = 1e30
    write_params(Path(), params)
    before = Path("metrics/baselines/small.json").read_bytes()
    with pytest.raises(UserError, match=r"training loss is (nan|inf) .* lower `learning_rate`"):
        run_stage("baseline", "small")
    assert Path("metrics/baselines/small.json").read_bytes() == before


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
