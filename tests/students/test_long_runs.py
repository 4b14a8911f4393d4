"""Long runs: memory and files stay as they were, and a loss that is no number ends a training."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, change_params, run_stage

from benchmarks.harness import memory_bytes
from pipeline.runtime.errors import UserError
from pipeline.students import loop
from pipeline.teacher import accuracy_gate
from pipeline.teacher import loop as teacher_loop
from pipeline.training.divergence import LossMonitor


def watched(device: str = "cpu", **changes: object) -> LossMonitor:
    settings = {
        "steps": 60,
        "device": torch.device(device),
        "is_main": True,
        "state_dir": Path(".scratch/training/x"),
        "hint": "Lower it.",
    }
    return LossMonitor("the loss", 3, lambda step: step / 1000, **settings | changes)


def test_a_loss_that_is_no_number_is_told_with_its_step_its_rate_and_what_is_kept():
    losses = watched()
    for _ in range(6):
        losses.add(torch.tensor(1.0), 4)
    with pytest.raises(UserError) as raised:
        losses.add(torch.tensor(float("nan")), 4)
    assert str(raised.value) == (
        "the loss is nan at step 7 of 60 in epoch 3, at learning rate 0.126; expected a finite "
        "number. The last good state, after epoch 2, is in `.scratch/training/x`. Lower it."
    )


def test_where_looks_are_rare_the_first_bad_step_is_named_and_no_look_is_left_out():
    losses = watched()
    losses._check_every = 50  # as on a device that computes on its own
    for step in range(49):
        losses.add(torch.tensor(float("inf") if step >= 11 else 1.0), 4)
    with pytest.raises(UserError, match="inf at step 12 of 60 in epoch 3"):
        losses.add(torch.tensor(float("nan")), 4)
    losses = watched()
    losses._check_every = 50
    losses.add(torch.tensor(float("nan")), 4)
    with pytest.raises(UserError, match="nan at step 1 of 60 in epoch 3"):
        losses.mean(4)


def test_the_mean_of_an_epoch_is_that_of_its_samples():
    losses = watched()
    for loss, count in ((1.0, 4), (2.0, 4), (6.0, 2)):
        losses.add(torch.tensor(loss), count)
    assert losses.mean(10) == pytest.approx(2.4)


@pytest.mark.parametrize("kind", ["student", "baseline"])
def test_a_training_ends_at_the_step_whose_loss_is_no_number(project, monkeypatch, kind):
    change_params("training", epochs=4, learning_rate=0.05)
    steps = []
    original = loop.train_step

    def train_step(forward, spec, local, batch, *arguments):
        steps.append(batch.epoch)
        loss = original(forward, spec, local, batch, *arguments)
        return loss * float("nan") if (batch.epoch, steps.count(3)) == (3, 2) else loss

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(UserError) as raised:
        run_stage(kind, "small")
    assert steps.count(3) == 2  # of 3: it did not go on to the epoch's end
    folder = Path(f".scratch/training/{kind}s/small")
    assert "training loss is nan at step 2 of 3 in epoch 3, at learning rate" in str(raised.value)
    assert f"The last good state, after epoch 2, is in `{folder}`" in str(raised.value)
    assert list(folder.glob("*.state"))


def test_weights_that_the_last_step_of_an_epoch_spoils_are_not_kept_as_a_good_state(
    project, monkeypatch
):
    change_params("training", epochs=3)
    original = loop.train_step

    def train_step(forward, spec, local, batch, *arguments):
        loss = original(forward, spec, local, batch, *arguments)
        if batch.epoch == 2:
            with torch.no_grad():
                next(forward.parameters()).fill_(float("nan"))
        return torch.zeros_like(loss)

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(UserError, match=r"nan on validation at step 3 of 3 in epoch 2"):
        run_stage("student", "small")


def test_a_teacher_ends_at_the_step_whose_loss_is_no_number(project, monkeypatch):
    calls = []
    original = teacher_loop.F.cross_entropy

    def cross_entropy(*arguments, **options):
        calls.append(1)
        loss = original(*arguments, **options)
        return loss * float("nan") if len(calls) == 2 else loss

    monkeypatch.setattr(teacher_loop.F, "cross_entropy", cross_entropy)
    with pytest.raises(UserError, match="teacher's training loss is nan at step 2 of 5"):
        run_stage("teacher")
    assert len(calls) == 2


def open_files() -> set[str]:
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # of this listing itself
            found.add(os.readlink(link))
    return {name for name in found if name.startswith("/") and not name.startswith("/dev")}


def children() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text("utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == str(os.getpid()):
            found.append(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="there is no /proc here")
@pytest.mark.parametrize("storage", ["pixels", "encoded"])
def test_every_stage_releases_its_files_and_workers(project, monkeypatch, storage):
    monkeypatch.setattr(accuracy_gate, "check", lambda *_, **__: None)
    change_params("dataset", storage=storage)
    change_params("training", epochs=1)
    change_params("teacher", training=PARAMS["teacher"]["training"] | {"epochs": 1})
    stages = [("prepare",), ("teacher",), ("soft_targets",), ("baseline", "small")]
    for stage in [*stages, ("student", "small"), ("compare",)]:
        run_stage(*stage)  # what is loaded once is loaded now
        before, workers = open_files(), children()
        run_stage(*stage)
        assert open_files() <= before, stage
        assert set(children()) <= set(workers), stage  # one of the first run may end late


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="there is no /proc here")
def test_memory_is_flat_over_epochs(project, monkeypatch):
    change_params("training", epochs=40)
    held = []
    original = loop.evaluate

    def evaluate(*arguments):
        held.append(memory_bytes("VmRSS"))
        return original(*arguments)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    run_stage("student", "small")
    assert len(held) == 40
    assert held[39] - held[9] < 8 * 2**20, [value // 2**20 for value in held]
