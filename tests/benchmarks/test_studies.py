"""The studies of accuracy train as described, and their pages match."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import conftest
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import change_params, opened
from import_closure import ROOT
from stage_process import fork_command

from benchmarks.accuracy import (
    beyond,
    encodings,
    long_runs,
    methods,
    seeds,
    starts,
    study,
    views,
)
from benchmarks.accuracy.study import BUDGETS, LAST, Budget, Cache, Cell, Jitter, Teacher, Workshop
from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict
from pipeline.runtime.errors import UserError
from pipeline.runtime.params import read_params
from pipeline.students import loop
from soak.common import png, write_tar

STUDIES = {"methods": methods, "views": views, "encodings": encodings, "beyond": beyond}
PAGES = STUDIES | {"seeds": seeds, "starts": starts, "long_runs": long_runs}
CPU = torch.device("cpu")
RUN_STAGE = study.run_stage
TINY = {"epochs": 4, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.05}
PAIR = methods.SMALL["resnet20 > resnet8"]


@pytest.fixture(scope="module")
def workshop(finished_project: Path, tmp_path_factory: pytest.TempPathFactory):
    """The CPU budget at the size of the finished project; its stages run in this process."""
    project = tmp_path_factory.mktemp("study") / "project"
    shutil.copytree(finished_project, project)
    tiny = Budget("cpu", 3, TINY, 4, (0, 1))

    def stage(name: str, folder: Path) -> None:
        with pytest.MonkeyPatch.context() as there:
            there.chdir(folder)
            conftest.run_stage(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUDGETS, "cpu", tiny)
        patch.setitem(BUDGETS, "views", replace(tiny, name="views", precision="bfloat16"))
        patch.setattr(study, "run_stage", stage)
        patch.setattr(study, "UNLABELLED_PER_CLASS", 9)
        patch.setattr(views, "SHORT", 1)
        patch.setattr(views, "LONG", 2)
        networks = [study.Network("cifar_resnet", name) for name in ("resnet8", "resnet14")]
        small = replace(PAIR, teacher=networks[0])
        patch.setitem(methods.PAIRS, "cpu", {"resnet8 > resnet8": small})
        patch.setitem(beyond.LARGER, networks[0], Teacher(networks[1], 0))
        patch.setitem(encodings.PAIRS, "cpu", small)
        patch.setitem(beyond.PAIRS, "cpu", [small])
        patch.setattr(encodings, "ENCODINGS", [encodings.DENSE, (2, "bucket"), (2, "spread")])
        yield Workshop(project, tiny)


def workshop_of(workshop: Workshop, name: str) -> Workshop:
    return Workshop(workshop.project, BUDGETS["views" if name == "views" else "cpu"])


@pytest.mark.parametrize("name", PAGES)
def test_the_page_shows_the_tables_of_the_results(name):
    page = (ROOT / f"benchmarks/accuracy/{name}.md").read_text("utf-8")
    for table in PAGES[name].tables():
        assert table in page


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "views")) for n in STUDIES]
)
def test_every_kind_of_run_trains_and_is_not_run_again(workshop, name, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "runs.csv")
    shop = workshop_of(workshop, name)
    runs = [run for block in STUDIES[name].plan(shop.budget) for run in block if run.seed == 0]
    runs = [run for run in runs if name != "views" or run.epochs == 1]
    for run in runs:
        shop.make(run.caches)
        study.append(study.RESULTS, study.train_one(run, shop.project))
    rows = study.results()
    assert len(rows) == len(runs)
    assert rows[LAST].between(0, 1).all()
    lines = []
    study.conduct([runs], shop, 1, lines.append)  # a pool would print more
    assert lines == [f"runs.csv holds {len(runs)} of {len(runs)} runs"]
    assert len(study.results()) == len(runs)


@pytest.mark.slow
def test_a_command_trains_missing_runs_and_a_failed_run_does_not_stop_the_others(
    workshop, tmp_path, monkeypatch
):
    """In separate processes, without the patches of this one."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "runs.csv")
    good, lines = methods.plan(workshop.budget)[0][0], []
    unlabelled = beyond.run(workshop.budget, 0, beyond.WAYS["unlabelled images"], seed=0)
    bad = replace(unlabelled, distillation={"method": "dkd"}, epochs=good.epochs)
    with pytest.raises(UserError, match="1 runs of 2 failed:\n.*needs one label for each image"):
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
    monkeypatch.setattr(study, "run_stage", RUN_STAGE)
    monkeypatch.setattr("subprocess.Popen", fork_command)
    with pytest.raises(UserError, match=r"pipeline\.stages\.soft_targets` ended with 1"):
        Workshop(tmp_path / "project", workshop.budget).make([cache])


#: Of the study of views: labels alone have no logits, and of equal kinds one is enough.
VIEWS = ("4 exact", "1 clean view, inexact", "live teacher", "4 unmirrored + 4 exact")
BEYOND = ("each view once", "a larger teacher", "an ensemble of 2", "cutmix", "unlabelled images")


@pytest.mark.parametrize("name", [*VIEWS, *BEYOND])
def test_logits_are_the_teachers_for_the_pixels_that_the_student_sees_unless_inexact(
    workshop, name
):
    shop = workshop_of(workshop, "views" if name in VIEWS else "beyond")
    run = (
        views.run(name, epochs=4, seed=0)
        if name in VIEWS
        else beyond.run(shop.budget, 0, beyond.WAYS[name], seed=0)
    )
    shop.make(run.caches)
    models = [shop.root / cache.folder / "models/teacher" for cache in run.caches]
    caches = [shop.open(cache) for cache in run.caches]
    data, soft_targets = study.training_data(caches, run, CPU, models[0])
    samples = np.random.default_rng(0).permutation(len(data.dataset.splits["train"]))[:8]
    teachers = [checkpoint.load(folder, produced_by="-") for folder in models]
    differences, precision = [], shop.budget.precision
    for epoch in (1, 2, 3):
        view = data.view_of_pass(epoch)
        (batch,) = data.views.batches(view, [samples])
        logits = [predict(n, d.input, batch.pixels, precision=precision) for n, d in teachers]
        cached = torch.from_numpy(soft_targets(view, samples).logits).float()
        differences.append((cached - torch.stack(logits).mean(0)).abs().max().item())
    assert (max(differences) > 2**-6) == (run.use == "inexact")


def test_teacher_passes_are_those_of_the_cached_views_or_of_every_epoch(workshop):
    shop = workshop_of(workshop, "views")
    expected = {"labels only": 0, "1 clean view, inexact": 1, "live teacher": 2, "8 exact": 8}
    for name, passes in (expected | {"1 clean + 3 exact": 4}).items():
        run = views.run(name, epochs=2, seed=0)
        shop.make(run.caches)
        row = study.train_one(run, shop.project)
        assert row["teacher_passes"] == passes * row["student_passes"] / 2


def test_pairs_take_two_passes_of_the_student_and_the_temperature_may_fall(workshop):
    way = beyond.Way(times=2, paired=True, method=beyond.FALLING)
    run = beyond.run(workshop.budget, 0, way, seed=0)
    workshop.make(run.caches)
    store, dataset, plan = workshop.open(run.caches[0])
    assert (plan.paired, store.num_views) == (True, 4)
    row, images = study.train_one(run, workshop.project), len(dataset.splits["train"])
    assert (row["teacher_passes"], row["student_passes"]) == (4 * images, 8 * images)


@pytest.mark.parametrize("budget", ["cpu", "equal", "gpu"])
def test_every_way_takes_equally_many_teacher_passes(budget):
    for pair in range(len(beyond.PAIRS[budget])):
        passes = {}
        for name, way in beyond.ways(BUDGETS[budget], pair).items():
            run = beyond.run(BUDGETS[budget], pair, way, seed=0)
            images = [4 if cache.unlabelled else 1 for cache in run.caches]
            num_views = [cache.num_views for cache in run.caches]
            student_passes = run.epochs * images[0] * (1 + way.paired)
            passes[name] = (np.dot(num_views, images), student_passes / way.times)
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
    dense = Cache(Teacher(PAIR.teacher), 4)
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
    rows, expected = (s.decoded_at(4.0).gather(3, samples) for s in (ours, theirs))
    assert np.array_equal(rows.kept, expected.kept)
    np.testing.assert_allclose(rows.logits, expected.logits, atol=5e-3)


def test_the_gpu_budget_trains_its_teachers_and_students_on_every_image(workshop, monkeypatch):
    recipe = {"epochs": 6, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.05}
    monkeypatch.setitem(BUDGETS, "gpu", Budget("gpu", None, recipe, 2, (0,)))
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


def test_a_training_that_was_killed_resumes_with_the_same_row(workshop, monkeypatch):
    run, original, evaluated = methods.plan(workshop.budget)[0][1], loop.evaluate, []
    workshop.make(run.caches)
    expected = study.train_one(run, workshop.project)
    shutil.rmtree(workshop.states(run))

    def evaluate(*arguments):
        evaluated.append(arguments)
        if len(evaluated) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        study.train_one(run, workshop.project)
    found = study.train_one(run, workshop.project)
    assert len(evaluated) == 3 + 2  # of 4 epochs, the last two again
    assert found == expected | {"seconds": None}  # those of a part would mislead


def kill_the_study(file: Path) -> None:
    file.write_text(str(os.getpid()), encoding="utf-8")
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def test_a_killed_study_leaves_no_training_behind(tmp_path):
    code = f"""
from pathlib import Path
from benchmarks.accuracy.study import open_pool
from test_studies import kill_the_study

if __name__ == "__main__":
    open_pool(1).submit(kill_the_study, Path({str(tmp_path / "pid")!r})).result()
"""
    script = tmp_path / "study_script.py"
    script.write_text(code, encoding="utf-8")
    paths = os.pathsep.join([str(ROOT), *sys.path])
    subprocess.run([sys.executable, script], check=False, env=os.environ | {"PYTHONPATH": paths})
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "pid").read_text())).wait(60)  # raises if it goes on


def test_a_stage_of_a_study_finds_the_packages_that_its_command_found(tmp_path, monkeypatch):
    """Packages of a machine without a network lie in a folder of PYTHONPATH."""
    calls = []
    monkeypatch.setenv("PYTHONPATH", "carried")
    monkeypatch.setattr(study.subprocess, "run", lambda *_, env, **__: calls.append(env))
    RUN_STAGE("prepare", tmp_path)
    assert calls[0]["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "carried"]


def test_a_method_takes_the_weights_of_its_pair_and_the_share_of_its_warm_up():
    def params(pair: str, method: str, epochs: int = 240) -> dict:
        return methods.distillation(method, methods.TABLE[pair], epochs)

    assert params("resnet56 > resnet20", "DKD")["beta"] == 2
    assert params("resnet32x4 > resnet8x4", "DKD+LS")["beta"] == 72
    assert params("resnet56 > resnet20", "DKD")["warmup_epochs"] == 20
    assert params("resnet56 > resnet20", "DKD", 12)["warmup_epochs"] == 1
    run = beyond.run(BUDGETS["gpu"], 0, beyond.WAYS["trained twice as long"], seed=0)
    assert study.training_of(run).milestones == [300, 360, 420]


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


def test_the_noise_of_a_difference_is_that_of_students_t():
    row = pd.Series(dtype=float)
    cells = [Cell(50, 0.3, 50, 2, row), Cell(51, 0.4, 51, 2, row), Cell(9, float("nan"), 9, 1, row)]
    # Pooled variance (0.09 + 0.16) / 2 with 2 degrees of freedom; t is 4.302653 there.
    half, seeds = study.noise([*cells, None])
    assert (half, seeds) == (pytest.approx(4.302653 * 0.125**0.5), 2)
    assert study.noise(cells[2:]) is None
    # Of three seeds each: the same pooled variance with 4 degrees of freedom, where t is 2.776445.
    more = [replace(cell, seeds=3) for cell in cells[:2]]
    half = 2.776445 * (2 * 0.125 / 3) ** 0.5
    assert study.noise(more) == (pytest.approx(half), 3)
    assert f"means of three seeds below {half:.2f} points" in study.with_noise("", more)


@pytest.fixture
def starts_workshop(tmp_path, monkeypatch):
    """The quick study of starts on images of noise; its stages run in this process."""
    rng, size = np.random.default_rng(0), (16, 16, 3)
    names = [
        f"{split}/{c}/{i}.png" for split in ("train", "test") for c in "abcd" for i in range(9)
    ]
    noise = ((name, png(rng.integers(256, size=size, dtype=np.uint8))) for name in names)
    write_tar(tmp_path / "noise.tar", noise)

    def stage(name: str, folder: Path, *arguments: str) -> None:
        with pytest.MonkeyPatch.context() as there:
            there.chdir(folder)
            conftest.run_stage(name, *arguments)

    monkeypatch.setattr(starts, "run_stage", stage)
    folder = tmp_path / "work"
    shop = starts.Workshop(tmp_path / "noise.tar", folder, starts.QUICK, folder / "starts.csv")
    shop.recipe["teacher"]["minimum_accuracy"] = 1e-9  # nobody learns noise
    return shop


@pytest.mark.slow
def test_students_and_baselines_of_the_study_of_starts_share_their_first_weights(starts_workshop):
    shop, study = starts_workshop, replace(starts.QUICK, seeds=(0,), learning_rates=(0.1,))
    shop.study = study
    shop.conduct()
    before = shop.results.read_bytes()
    shop.conduct()
    assert shop.results.read_bytes() == before
    rows = shop.rows().reset_index()
    assert len(rows) == len(starts.STARTS) * (1 + len(starts.ROLES))
    compared = rows[rows["seed"] == 0]
    assert (compared.groupby("start")["first_weights"].nunique() == 1).all()
    assert compared["first_weights"].nunique() == 2


def test_the_study_of_starts_holds_out_its_classes_and_its_images(starts_workshop):
    shop, size = starts_workshop, starts.QUICK.sizes[0]
    folders = [shop.project(name, {}) for name in ("pretraining", "teacher", size.name)]
    pretraining, teacher, task = (open_dataset(folder / "data/prepared") for folder in folders)
    assert not set(pretraining.class_names) & set(task.class_names)
    assert teacher.class_names == task.class_names
    for split in ("validation", "test"):
        assert list(teacher.splits[split].sample_ids) == list(task.splits[split].sample_ids)
    few, all_of_them = (set(d.splits["train"].sample_ids) for d in (task, teacher))
    assert few <= all_of_them
    assert len(few) == size.per_class * len(task.class_names)


def test_the_gains_of_a_start_are_taken_in_pairs_of_one_seed(tmp_path):
    accuracy = {  # of seeds 0 and 1
        ("scratch", "baseline"): (0.1, 0.3),
        ("scratch", "student"): (0.2, 0.4),
        ("weights", "baseline"): (0.5, 0.6),
        ("weights", "student"): (0.8, 0.8),
    }
    for (start, role), values in accuracy.items():
        for seed, value in enumerate(values):
            key = dict(zip(starts.KEY, (500, 30, start, 0.1, seed, role), strict=True))
            study.append(tmp_path / "starts.csv", {**key, "test_accuracy": value})
    cells, differences = starts.tables(tmp_path / "starts.csv", starts.FULL)
    assert "| 500 | scratch | 20.00 ± 14.14 (2) | 30.00 ± 14.14 (2) |" in cells
    # t is 12.706205 with one degree of freedom: 25 ± 12.706205 * 7.0710678 / sqrt(2)
    assert "| teacher, from scratch | +10.00 (+10.00 to +10.00) |" in differences
    assert "| teacher, from weights | +25.00 (-38.53 to +88.53) |" in differences
    assert "| teacher, from weights less from scratch | +15.00 (-48.53 to +78.53) |" in differences


def test_the_learning_rate_of_the_study_of_starts_is_the_best_on_validation_over_both_starts():
    found = {("scratch", 0.1): 0.3, ("scratch", 0.02): 0.1, ("weights", 0.1): 0.4,
             ("weights", 0.02): 0.5}  # fmt: skip
    rows = pd.DataFrame(
        [(500, 30, *cell, 100, "baseline", value) for cell, value in found.items()],
        columns=[*starts.KEY, starts.VALIDATION],
    )
    other = rows.assign(seed=0, validation_accuracy=[0, 1, 0, 1])
    rows = pd.concat([rows, other]).set_index(starts.KEY)
    assert starts.chosen_rate(rows, starts.FULL) == 0.1


def test_the_study_of_starts_says_how_to_pack_its_archive(tmp_path):
    write_tar(tmp_path / "a.tar", iter([("train/a/1.png", b""), ("val/a/1.png", b"")]))
    with pytest.raises(UserError, match=r"has `train/`, `val/`; expected `train/CLASS/` and"):
        starts.write_archives(tmp_path / "a.tar", tmp_path, ())


@pytest.mark.parametrize("epochs", long_runs.EPOCHS)
def test_of_caches_that_give_a_long_run_a_new_view_in_each_epoch_the_smallest_is_run(epochs):
    counts = [n for n in long_runs.COUNTS if long_runs.exact(n) in long_runs.ways(epochs)]
    assert counts == list(long_runs.COUNTS[: len(counts)])
    assert all(count < epochs for count in counts[:-1])
    assert counts[-1] == long_runs.COUNTS[-1] or counts[-1] >= epochs


def test_the_page_of_long_runs_says_how_many_of_the_planned_ones_were_made():
    budget = BUDGETS[long_runs.BUDGET]
    planned = [tuple(study.key(run).values()) for block in long_runs.plan(budget) for run in block]
    made = {key for key in study.results().index if key[0] == budget.name}
    assert len(set(planned)) == len(planned)
    assert made <= set(planned)
    page = (ROOT / "benchmarks/accuracy/long_runs.md").read_text("utf-8")
    assert f"{len(made)} of {len(planned)} runs were made" in page
