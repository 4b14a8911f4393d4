"""The study of cached views trains as described."""

from pathlib import Path

import numpy as np
import pytest
import torch
from import_closure import ROOT

from benchmarks.accuracy import views
from benchmarks.accuracy.views import BEYOND, CACHED, CURVE, PRECISION, Jitter, Study
from benchmarks.accuracy.views_page import results, table
from benchmarks.accuracy.views_project import make_projects
from pipeline.models.evaluation import predict

WAYS = CURVE | BEYOND


@pytest.fixture(scope="module")
def study(finished_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    workspace = tmp_path_factory.mktemp("study")
    make_projects(finished_project, workspace, CACHED, PRECISION)
    return Study(workspace)


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.cached or way.live])
def test_logits_are_for_the_pixels_that_the_student_sees_unless_the_way_is_inexact(study, name):
    data, soft_targets = study.training_data(WAYS[name], seed=0)
    split = study.dataset.splits["train"]
    samples = np.random.default_rng(0).permutation(len(split))[:16]
    differences = []
    for epoch in (1, 2, 3, 4):
        view = data.view_of_epoch(epoch)
        (batch,) = data.views.batches(view, [samples])
        live = predict(study.teacher, study.description.input, batch.pixels, precision=PRECISION)
        cached = torch.from_numpy(soft_targets(view, samples).logits).float()
        differences.append((cached - live).abs().max().item())
    tolerance = 2**-6  # bfloat16, in batches of other sizes
    assert (max(differences) > tolerance) == WAYS[name].inexact


@pytest.mark.parametrize("name", WAYS)
def test_teacher_passes_are_those_of_the_cached_views_or_of_every_epoch(study, name):
    data, soft_targets = study.training_data(WAYS[name], seed=0)
    size = len(study.dataset.splits["train"])
    way, views = WAYS[name], {data.view_of_epoch(epoch) for epoch in range(1, 21)}
    expected = 0 if soft_targets is None else 1 if way.inexact else len(views)
    assert study.passes(way, epochs=20) == expected * size


def test_jitter_mirrors_and_shifts_in_training_alone():
    torch.manual_seed(0)
    jitter, x = Jitter(torch.nn.Identity(), pixels=1), torch.rand(64, 3, 8, 8)
    assert torch.equal(jitter.eval()(x), x)
    seen = jitter.train()(x)
    candidates = [
        torch.nn.functional.pad(image, [1] * 4, mode="replicate")[..., t : t + 8, s : s + 8]
        for image in (x, x.flip(3))
        for t in range(3)
        for s in range(3)
    ]
    matches = torch.stack([(seen == c).all(dim=(1, 2, 3)) for c in candidates])  # [18, B]
    assert matches.any(0).all()
    assert matches.any(1).sum() > 12


def test_the_page_shows_the_table_of_the_results():
    page = (ROOT / "benchmarks/accuracy/views.md").read_text("utf-8")
    assert table(results()) in page


def test_a_run_in_the_results_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(views, "RESULTS", tmp_path / "views.csv")
    monkeypatch.setattr(views, "PLAN", [("labels only", 10, 0)])
    views.append(
        views.RESULTS,
        {"way": "labels only", "epochs": 10, "seed": 0, "last_epoch_test_accuracy": 0.5},
    )
    lines = []
    views.run_plan(tmp_path / "no project", 1, lines.append)
    assert lines == ["views.csv holds 1 of 1 runs"]
