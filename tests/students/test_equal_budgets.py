"""A student and its baseline take equally many optimiser steps."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    OUTPUTS,
    PARAMS,
    forget_trainings,
    run_stage,
    run_stage_interrupted,
    write_params,
)
from PIL import Image

from pipeline.compute import device
from pipeline.compute.distributed import SINGLE_PROCESS, ProcessGroup
from pipeline.data.prepared.dataset import Split
from pipeline.runtime.derived_random import permutation
from pipeline.students import loop
from pipeline.students.passes import draw_batches, epoch_order
from pipeline.training.optimisation import batches
from pipeline.views.loader import Views
from pipeline.views.policy import ViewPolicy

UNLABELLED, BATCH, EPOCHS = 324, 32, 2


@pytest.fixture(scope="module")
def unlabelled_project(finished_project, tmp_path_factory) -> Path:
    """36 labelled training images and nine times as many without a label; the baseline is
    trained."""
    root = tmp_path_factory.mktemp("unlabelled") / "project"
    shutil.copytree(finished_project, root)
    (root / "images/unlabeled").mkdir()
    for index in range(UNLABELLED):
        pixels = np.random.default_rng([7, index]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/unlabeled/{index:03d}.png")
    training, views = {"batch_size": BATCH, "epochs": EPOCHS}, {"count": 1}
    params = PARAMS | {
        "training": PARAMS["training"] | training,
        "views": PARAMS["views"] | views,
    }
    write_params(root, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage in ("prepare", "teacher", "soft_targets"):
            run_stage(stage)
        run_stage("baseline", "small")
    return root


def metrics_of(root: Path, kind: str) -> dict:
    return json.loads((root / f"metrics/{kind}/small.json").read_text("utf-8"))


def test_with_nine_times_as_many_unlabelled_images_student_and_baseline_take_equal_steps(
    unlabelled_project, monkeypatch
):
    monkeypatch.chdir(unlabelled_project)
    forget_trainings()
    original, seen, unlabelled = loop.train_step, [], []

    def train_step(forward, spec, local, batch, loss, optimisation, *rest):
        rate = optimisation.optimizer.param_groups[0]["lr"]
        seen.append((batch.epoch, len(batch.samples), rate))
        unlabelled.append(int((batch.labels < 0).sum()))
        return original(forward, spec, local, batch, loss, optimisation, *rest)

    monkeypatch.setattr(loop, "train_step", train_step)
    asked = []  # the steps that decide whether a network, or a method, is compiled
    monkeypatch.setattr(device, "_pays_to_compile", lambda _, steps: asked.append(steps))
    run_stage("student", "small")
    of_student, shown = list(seen), sum(unlabelled)
    assert [epoch for epoch, _, _ in of_student] == [1] * 12 + [2] * 12  # 360 images, 32 a batch
    assert shown == EPOCHS * UNLABELLED
    seen.clear()
    unlabelled.clear()
    run_stage("baseline", "small")
    assert seen == of_student
    assert sum(unlabelled) == 0
    assert asked == [12 * EPOCHS] * 3  # the student's method, both networks
    for kind in ("students", "baselines"):
        assert metrics_of(unlabelled_project, kind)["optimiser_steps"] == 12 * EPOCHS


def test_a_baseline_of_several_passes_resumes_to_the_bytes_of_an_uninterrupted_run(
    unlabelled_project, monkeypatch, capsys
):
    monkeypatch.chdir(unlabelled_project)
    forget_trainings()
    paths = [Path(path.format(kind="baselines")) for path in OUTPUTS]
    before = [path.read_bytes() for path in paths]
    run_stage_interrupted("baseline", "small")
    run_stage("baseline", "small")
    output = capsys.readouterr().out
    assert "shows each of 36 labelled images 10 times" in output
    assert "resumes after epoch 1 of 2" in output
    assert [path.read_bytes() for path in paths] == before
    history = pd.read_csv(paths[-1])
    assert history["view"].tolist() == [0, 10]  # the first view of each epoch


def test_without_unlabelled_images_an_epoch_is_one_pass_in_the_order_it_has_always_had():
    samples = np.arange(100, 137)
    for epoch in (1, 2, 9):
        order, passes = epoch_order(samples, len(samples), 5, epoch)
        assert np.array_equal(order, samples[permutation(37, 5, epoch)])
        assert (passes == epoch).all()


@pytest.mark.parametrize(("count", "length"), [(18, 180), (7, 40), (10, 11), (3, 64)])
def test_passes_show_every_sample_once_and_go_on_over_the_ends_of_epochs(count, length):
    samples = np.arange(0, 5 * count, 5)
    drawn = [epoch_order(samples, length, 3, epoch) for epoch in range(1, 6)]
    assert {len(order) for order, _ in drawn} == {length}
    order, passes = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    whole = len(order) // count
    assert np.array_equal(passes[: whole * count], np.repeat(np.arange(1, whole + 1), count))
    each = order[: whole * count].reshape(whole, count)
    assert (np.sort(each, axis=1) == samples).all()
    assert len(np.unique(each, axis=0)) > 1  # in another order


@pytest.mark.parametrize("mix", [None, ("mixup", 0.4)])
def test_every_image_of_a_step_is_in_the_view_of_its_pass_for_any_number_of_processes(mix):
    images = np.random.default_rng(0).integers(0, 256, (30, 3, 16, 16), dtype=np.uint8)
    split = Split(np.zeros(30, np.int64), Path(), "train", images)
    policy = ViewPolicy("crop_flip", mix=mix)
    views = Views(split, policy, 7, torch.device("cpu"))
    order, passes = epoch_order(np.arange(0, 30, 3), 35, 2, 1)  # 10 samples, 3 and a half times
    steps = list(zip(batches(order, 17), batches(passes, 17), strict=True))
    assert [len(samples) for samples, _ in steps] == [17, 18]

    def drawn(group: ProcessGroup) -> list:
        return list(draw_batches(views, lambda number: number - 1, steps, group))

    for (samples, numbers), batch in zip(steps, drawn(SINGLE_PROCESS), strict=True):
        assert np.array_equal(batch.samples, samples)
        for row, (sample, number) in enumerate(zip(samples, numbers, strict=True)):
            (alone,) = views.batches(number - 1, [np.array([sample])])
            assert torch.equal(batch.pixels[row], alone.pixels[0])
            if mix is not None:
                assert batch.partners[row] == alone.partners[0]
                assert batch.weights[row] == alone.weights[0]
    for size in (3, 20):  # of 20, three have no row
        shares = [drawn(ProcessGroup(rank, size)) for rank in range(size)]
        for of_step, whole in zip(zip(*shares, strict=True), drawn(SINGLE_PROCESS), strict=True):
            assert torch.equal(torch.cat([share.pixels for share in of_step]), whole.pixels)
            if mix is not None:
                assert torch.equal(torch.cat([s.weights for s in of_step]), whole.weights)
