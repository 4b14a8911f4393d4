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


def test_the_comparison_is_the_arithmetic_of_its_parts(project):
    comparison = read("metrics/comparison.json")
    teacher, student = comparison["teacher"], comparison["students"]["small"]
    measures = {
        "test_accuracy",
        "test_top5_accuracy",
        "test_nll",
        "parameters",
        "macs",
        "size_bytes",
    }
    assert set(teacher) == set(student["distilled"]) == set(student["baseline"]) == measures
    distilled, baseline = student["distilled"], student["baseline"]
    assert student["gain"] == distilled["test_accuracy"] - baseline["test_accuracy"]
    assert student["retention"] == distilled["test_accuracy"] / teacher["test_accuracy"]
    assert student["compression"] == teacher["parameters"] / distilled["parameters"]
    assert student["macs_ratio"] == teacher["macs"] / distilled["macs"]
    decisions = [
        load_file(f"predictions/{name}.safetensors")["test"].argmax(1)
        for name in ("teacher", "students/small")
    ]
    assert student["agreement"] == pytest.approx((decisions[0] == decisions[1]).mean())
    size = Path("models/students/small/weights.safetensors").stat().st_size
    assert distilled["size_bytes"] == size


def test_the_csv_says_the_same_as_the_json(project):
    comparison, table = read("metrics/comparison.json"), pd.read_csv("metrics/comparison.csv")
    assert list(table["role"]) == ["teacher", "distilled", "baseline"]
    row = table[(table["model"] == "small") & (table["role"] == "distilled")].iloc[0]
    for key, value in comparison["students"]["small"]["distilled"].items():
        assert row[key] == pytest.approx(value)
    for key in ("gain", "retention", "agreement", "compression", "macs_ratio"):
        assert row[key] == pytest.approx(comparison["students"]["small"][key])


def test_the_comparison_is_printed_as_a_table(project, capsys):
    run_stage("compare")
    printed = capsys.readouterr().out
    assert "teacher: test accuracy" in printed
    assert "small" in printed.splitlines()[-1]
    run_stage("compare", "--show")
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("metrics/students/small.json", "student@small"),
        ("metrics/teacher.json", "teacher"),
        ("predictions/students/small.safetensors", "student@small"),
        ("metrics/history/baselines/small.csv", "baseline@small"),
    ],
)
def test_an_absent_part_of_the_comparison_is_named_with_the_stage_that_makes_it(
    project, path, stage
):
    Path(path).unlink()
    with pytest.raises(UserError) as refusal:
        run_stage("compare")
    assert path in str(refusal.value)
    assert stage in str(refusal.value)


def test_results_of_a_student_that_is_no_longer_named_are_left_out(project):
    Path("metrics/students/old.json").write_text("{}")
    run_stage("compare")
    assert list(read("metrics/comparison.json")["students"]) == ["small"]


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
