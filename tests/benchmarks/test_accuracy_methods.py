"""The studies of methods, encodings and beyond train as described, and their pages match."""

import shutil
from dataclasses import replace
from pathlib import Path

import conftest
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import change_params, opened
from import_closure import ROOT

from benchmarks.accuracy import beyond, encodings, methods, study, views_project
from benchmarks.accuracy.study import BUDGETS, LAST, Budget, Cache, Cell, Run, Teacher, Workshop
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict
from pipeline.runtime.errors import UserError
from pipeline.runtime.params import read_params

STUDIES = {"methods": methods, "encodings": encodings, "beyond": beyond}
CPU = torch.device("cpu")
TINY = {"epochs": 4, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.05}


@pytest.fixture(scope="module")
def workshop(finished_project: Path, tmp_path_factory: pytest.TempPathFactory):
    """The CPU budget at the size of the finished project; its stages run in this process."""
    project = tmp_path_factory.mktemp("study") / "project"
    shutil.copytree(finished_project, project)
    tiny = Budget("cpu", True, TINY, 4, (0, 1))

    def stage(name: str, folder: Path) -> None:
        with pytest.MonkeyPatch.context() as there:
            there.chdir(folder)
            conftest.run_stage(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUDGETS, "cpu", tiny)
        patch.setattr(study, "run_stage", stage)
        patch.setattr(study, "PER_CLASS", 3)
        patch.setattr(study, "UNLABELLED_PER_CLASS", 9)
        networks = [study.Network("cifar_resnet", name) for name in ("resnet8", "resnet14")]
        small = replace(methods.SMALL["resnet20 > resnet8"], teacher=networks[0])
        patch.setitem(methods.PAIRS, "cpu", {"resnet8 > resnet8": small})
        patch.setitem(beyond.LARGER, networks[0], Teacher(networks[1], 0))
        patch.setitem(encodings.PAIRS, "cpu", small)
        patch.setitem(beyond.PAIRS, "cpu", [small])
        patch.setattr(encodings, "ENCODINGS", [encodings.DENSE, (2, "bucket"), (2, "spread")])
        yield Workshop(project, tiny)


def training_data_of(workshop: Workshop, run: Run):
    workshop.make(run.caches)
    caches = [workshop.open(cache) for cache in run.caches]
    (_, dataset, plan), stores = caches[0], [store for store, _, _ in caches]
    return study.training_data(stores, dataset, plan, run, CPU)


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_shows_the_tables_of_the_results(name):
    page = (ROOT / f"benchmarks/accuracy/{name}.md").read_text("utf-8")
    for table in STUDIES[name].tables():
        assert table in page


@pytest.mark.parametrize("name", STUDIES)
def test_every_kind_of_run_trains_and_is_not_run_again(workshop, name, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "runs.csv")
    runs = [run for block in STUDIES[name].plan(workshop.budget) for run in block if run.seed == 0]
    for run in runs:
        workshop.make(run.caches)
        study.append(study.RESULTS, study.train_one(run, workshop.project))
    rows = study.results()
    assert len(rows) == len(runs)
    assert rows[LAST].between(0, 1).all()
    lines = []
    study.conduct([runs], workshop, 1, lines.append)  # a pool would print more
    assert lines == [f"runs.csv holds {len(runs)} of {len(runs)} runs"]
    assert len(study.results()) == len(runs)


def test_a_command_trains_missing_runs_and_a_failed_run_does_not_stop_the_others(
    workshop, tmp_path, monkeypatch
):
    """In separate processes, without the patches of this one."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "runs.csv")
    good, lines = methods.plan(workshop.budget)[0][0], []
    unlabelled = beyond.run(workshop.budget, 0, beyond.WAYS["unlabelled images"], seed=0)
    bad = replace(unlabelled, distillation={"method": "dkd"}, epochs=good.epochs)
    with pytest.raises(UserError, match="1 runs of 2 failed:\n.*needs a label for each image"):
        study.conduct([[bad, good]], workshop, 1, lines.append)
    assert lines[0] == "runs.csv holds 0 of 2 runs"
    assert study.results().index.tolist() == [tuple(study.key(good).values())]


def test_an_error_names_a_missing_project_and_a_failed_stage(workshop, tmp_path, monkeypatch):
    cache = methods.plan(workshop.budget)[0][0].caches[0]
    with pytest.raises(UserError, match="nowhere` is no folder; expected a project"):
        Workshop(tmp_path / "nowhere", workshop.budget).make([cache])
    shutil.copytree(workshop.project, tmp_path / "project", symlinks=True)
    shutil.rmtree(tmp_path / "project/models/teacher")
    shutil.rmtree(tmp_path / "project/.scratch/accuracy/cpu/caches", ignore_errors=True)
    monkeypatch.setattr(study, "run_stage", views_project.run_stage)
    with pytest.raises(UserError, match=r"pipeline\.stages\.soft_targets` ended with 1"):
        Workshop(tmp_path / "project", workshop.budget).make([cache])


@pytest.mark.parametrize(
    "way",
    ["each view once", "a larger teacher", "an ensemble of 2", "cutmix", "unlabelled images"],
)
def test_cached_logits_are_the_teachers_for_the_pixels_that_the_student_sees(workshop, way):
    run = beyond.run(workshop.budget, 0, beyond.WAYS[way], seed=0)
    data, soft_targets = training_data_of(workshop, run)
    samples = np.random.default_rng(0).permutation(len(data.dataset.splits["train"]))[:8]
    teachers = [
        checkpoint.load(workshop.root / cache.folder / "models/teacher", produced_by="-")
        for cache in run.caches
    ]
    for epoch in (1, 2, 3):
        view = data.view_of_epoch(epoch)
        (batch,) = data.views.batches(view, [samples])
        expected = [predict(net, description.input, batch.pixels) for net, description in teachers]
        cached = torch.from_numpy(soft_targets(view, samples).logits).float()
        torch.testing.assert_close(cached, torch.stack(expected).mean(0), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("budget", ["cpu", "gpu"])
def test_every_way_takes_equally_many_teacher_passes(budget):
    for pair in range(len(beyond.PAIRS[budget])):
        passes = {}
        for name, way in beyond.ways(BUDGETS[budget], pair).items():
            run = beyond.run(BUDGETS[budget], pair, way, seed=0)
            images = [4 if cache.unlabelled else 1 for cache in run.caches]
            views = [cache.num_views for cache in run.caches]
            passes[name] = (np.dot(views, images), run.epochs * images[0] / way.times)
        assert set(passes.values()) == {(BUDGETS[budget].num_views, BUDGETS[budget].epochs)}


def test_unlabelled_images_differ_from_the_labelled(workshop):
    cache = beyond.run(workshop.budget, 0, beyond.WAYS["unlabelled images"], seed=0).caches[0]
    workshop.make([cache, replace(cache, unlabelled=False)])
    more = workshop.open(cache)[1].splits["train"]
    fewer = workshop.open(replace(cache, unlabelled=False))[1].splits["train"]
    assert (more.labels < 0).sum() == 27
    labelled = {image.tobytes() for image in more.images[more.labels >= 0]}
    assert labelled == {image.tobytes() for image in fewer.images}
    assert not labelled & {image.tobytes() for image in more.images[more.labels < 0]}


def test_a_sparse_cache_equals_the_store_of_the_stage(workshop, project):
    dense = Cache(Teacher(methods.SMALL["resnet20 > resnet8"].teacher), 4)
    workshop.make([replace(dense, k=2)])
    ours, dataset, _ = workshop.open(replace(dense, k=2))
    folder = workshop.root / dense.folder
    for name in ("data/prepared", "models/teacher", "data/soft_targets"):
        shutil.rmtree(project / name)
        shutil.copytree(folder / name, project / name)
    shutil.copy(folder / "params.yaml", project / "params.yaml")
    change_params("soft_targets", encoding="top_k", k=2)
    conftest.run_stage("soft_targets")
    theirs, samples = opened(), np.arange(len(dataset.splits["train"]))
    assert study.bytes_per_view(ours) == study.bytes_per_view(theirs)
    for view in range(4):
        for t in (1.0, 4.0):
            rows, expected = (
                ours.decoded_at(t).gather(view, samples),
                theirs.decoded_at(t).gather(view, samples),
            )
            assert np.array_equal(rows.kept, expected.kept)
            np.testing.assert_allclose(rows.logits, expected.logits, atol=5e-3)


def test_the_gpu_budget_trains_its_teachers_and_students_on_every_image(workshop, monkeypatch):
    recipe = {"epochs": 6, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.05}
    monkeypatch.setattr(study, "TABLES", recipe)
    monkeypatch.setitem(BUDGETS, "gpu", Budget("gpu", False, recipe, 2, (0,)))
    shop = Workshop(workshop.project, BUDGETS["gpu"])
    pair = replace(beyond.PAIRS["cpu"][0], teacher_seed=0)
    run = methods.run(BUDGETS["gpu"], pair, "KD", seed=0)
    shop.make(run.caches)
    (folder,) = (shop.root / "teachers").iterdir()
    trained = read_params(folder / "params.yaml")["teacher"]
    assert trained["training"] == {**recipe, "policy": "crop_flip", "seed": 0}
    assert trained["network"] == pair.teacher.name
    row, images = study.train_one(run, shop.project), 36
    assert (row["teacher_passes"], row["student_passes"]) == (2 * images, 6 * images)


def test_a_method_takes_the_weights_of_its_pair():
    def beta(pair: str, method: str) -> float:
        return methods.distillation(method, methods.TABLE[pair], 240)["beta"]

    assert (beta("resnet56 > resnet20", "DKD"), beta("resnet56 > resnet20", "DKD+LS")) == (2, 18)
    assert (beta("vgg13 > vgg8", "DKD"), beta("resnet32x4 > resnet8x4", "DKD+LS")) == (6, 72)


def test_warm_up_and_milestones_keep_their_share_of_the_training():
    pair = methods.TABLE["resnet56 > resnet20"]
    assert methods.distillation("DKD", pair, 240)["warmup_epochs"] == 20
    assert methods.distillation("DKD", pair, 12)["warmup_epochs"] == 1
    run = beyond.run(BUDGETS["gpu"], 0, beyond.WAYS["trained twice as long"], seed=0)
    assert study.training_of(run).milestones == [300, 360, 420]


def test_the_noise_of_a_difference_is_that_of_students_t():
    row = pd.Series(dtype=float)
    cells = [Cell(50, 0.3, 50, 2, row), Cell(51, 0.4, 51, 2, row), Cell(9, float("nan"), 9, 1, row)]
    # Pooled variance (0.09 + 0.16) / 2 with 2 degrees of freedom; t is 4.302653 there.
    assert study.noise([*cells, None]) == pytest.approx(4.302653 * 0.125**0.5)
    assert study.noise(cells[2:]) is None
