"""Students of pairs of views: what they see, which rows teach them, and their baselines."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import (
    OUTPUTS,
    change_params,
    forget_trainings,
    opened,
    run_stage,
    run_stage_interrupted,
    take_as_prepared,
    write_params,
)
from encoded_photographs import RESIZED

from pipeline.commands.check import problems
from pipeline.compute import device
from pipeline.data.prepared.dataset import open_dataset
from pipeline.distillation import losses
from pipeline.distillation.objective import paired_loss
from pipeline.distillation.params import METHODS, DistillationParams
from pipeline.runtime.errors import UserError
from pipeline.students import loop
from pipeline.students.label_loss import label_loss
from pipeline.students.loop import OneByOne, TrainingBatch
from pipeline.views.loader import open_views
from pipeline.views.policy import parse_policy

CPU = torch.device("cpu")
STRONG = {"weak": "none", "strong": {"operations": 2, "magnitude": 10}}
TEXT = "weak=crop_flip;strong=crop_flip+rand_augment(2,10)"


def distil(**distillation: object) -> None:
    """Set the section, whole."""
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["distillation"] = distillation
    write_params(Path(), params)


@pytest.fixture
def paired(project):
    """The project, with two pairs of views in its store, and trainings of one epoch."""
    change_params("views", rand_augment=STRONG, count=2)
    change_params("training", epochs=1)
    run_stage("soft_targets")


@pytest.fixture
def steps(monkeypatch) -> list[tuple]:
    """What each training step sees, and its loss."""
    seen, original = [], loop.train_step

    def train_step(forward, spec, local, batch, *arguments):
        loss = original(forward, spec, local, batch, *arguments)
        seen.append((local, batch, float(loss)))
        return loss

    monkeypatch.setattr(loop, "train_step", train_step)
    return seen


def train_loss(kind: str = "students") -> float:
    return float(pd.read_csv(f"metrics/history/{kind}/small.csv")["train_loss"][0])


def pixels_of(pair: int, samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    views = open_views(open_dataset().splits["train"], parse_policy(TEXT), 7, CPU)
    (batch,) = views.batches(pair, [samples])
    return batch.pixels, batch.strong_pixels


def test_a_student_sees_both_views_or_the_strong_one_as_the_teacher_saw_them(paired, steps):
    for paired_views in ("both", "weak_to_strong"):
        steps.clear()
        distil(method="kd", paired_views=paired_views)
        run_stage("student", "small")
        assert len(np.unique(np.concatenate([batch.samples for _, batch, _ in steps]))) == 36
        for local, batch, _ in steps:
            weak, strong = pixels_of(batch.view, batch.samples)
            if paired_views == "both":
                assert torch.equal(local.pixels, weak)
                assert torch.equal(local.strong_pixels, strong)
            else:
                assert torch.equal(local.pixels, strong)
                assert local.strong_pixels is None


def test_a_student_of_pairs_trains_by_each_form_and_each_is_a_loss_of_its_own(paired):
    found = []
    for distillation in (
        {"method": "kd"},
        {"method": "kd", "paired_views": "weak_to_strong"},
        {"method": "mlkd"},
        {"method": "crld"},
        {"method": "mlkd", "standardize": True},
    ):
        distil(**distillation)
        assert problems() == []
        run_stage("student", "small")
        found.append(train_loss())
    assert np.isfinite(found).all()
    assert len(set(found)) == len(found)


def rows(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((6, 4)).astype(np.float32)


def loss_of(params: DistillationParams, logits: torch.Tensor) -> float:
    """Of rows(v) for view v of the store."""
    labels = torch.tensor([0, 1, 2, 3, -1 if not params.needs_labels else 0, 1])
    batch = TrainingBatch(1, 3, np.arange(6), labels)
    loss = paired_loss(params, lambda view, _: (rows(view), None), CPU)
    return loss(logits, batch).item()


def test_every_method_learns_from_pairs():
    logits = torch.from_numpy(np.stack([rows(100), rows(101)]))
    found = []
    for method, model in METHODS.items():
        found.append(loss_of(model(method=method), logits))
        if not model.joins_views:
            crossed = model(method=method, paired_views="weak_to_strong")
            found.append(loss_of(crossed, logits[1]))
    assert np.isfinite(found).all()
    assert len(set(found)) == len(found) == 2 * len(METHODS) - 2


@pytest.mark.parametrize("method", [name for name, model in METHODS.items() if model.joins_views])
def test_a_method_that_joins_views_can_be_compiled(method, monkeypatch):
    logits = torch.from_numpy(rows(100)).requires_grad_(), torch.from_numpy(rows(101))
    params = METHODS[method](method=method)
    expected = loss_of(params, logits)
    monkeypatch.setattr(device, "_pays_to_compile", lambda *_: True)
    monkeypatch.setattr(device, "_COMPILER", "eager")
    assert loss_of(params, logits) == pytest.approx(expected, rel=1e-6)
    assert device.Compiled.works


@pytest.mark.parametrize("method", ["kd", "dkd", "ttm"])
def test_each_view_has_its_own_row_or_the_strong_one_has_the_weak_views(method):
    weak, strong = (torch.from_numpy(rows(seed)) for seed in (100, 101))
    labels = torch.tensor([0, 1, 2, 3, -1 if method != "dkd" else 0, 1])
    params = METHODS[method](method=method, **({"warmup_epochs": 0} if method == "dkd" else {}))
    arguments = params.model_dump(
        include={"temperature", "alpha", "beta", "gamma"} & set(type(params).model_fields)
    )
    extra = {"labels": labels} if params.needs_labels else {}

    def alone(student: torch.Tensor, view: int) -> float:
        teacher = torch.from_numpy(rows(view))
        soft = getattr(losses, method)(student, teacher, **extra, **arguments)
        soft_weight = getattr(params, "soft_label_weight", 1.0)
        return (params.hard_label_weight * label_loss(student, labels) + soft_weight * soft).item()

    both = loss_of(params, torch.stack([weak, strong]))
    assert both == pytest.approx((alone(weak, 6) + alone(strong, 7)) / 2, rel=1e-6)
    crossed = params.model_copy(update={"paired_views": "weak_to_strong"})
    assert loss_of(crossed, strong) == pytest.approx(alone(strong, 6), rel=1e-6)


def test_both_views_are_two_forward_passes_with_statistics_of_their_own():
    network = torch.nn.BatchNorm1d(3)
    twice = torch.nn.BatchNorm1d(3)
    weak, strong = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    found = OneByOne(network)(weak, 4 * strong + 1)
    expected = twice(weak), twice(4 * strong + 1)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(network.running_mean, twice.running_mean)


def test_a_baseline_of_pairs_sees_fresh_weak_and_strong_views_and_no_row(paired, steps):
    Path("data/soft_targets").rename("away")
    change_params("training", epochs=3)  # more than there are cached pairs
    run_stage("baseline", "small")
    assert {batch.view for _, batch, _ in steps} == {0, 1, 2}
    for local, batch, _ in steps:
        weak, strong = pixels_of(batch.view, batch.samples)
        assert torch.equal(local.pixels, weak)
        assert torch.equal(local.strong_pixels, strong)


def test_unlabelled_images_teach_a_student_of_pairs_and_its_baseline_passes_more_often(
    paired, steps
):
    path = Path("data/prepared/train_labels.npy")
    labels = np.load(path)
    labels[::3] = -1
    np.save(path, labels)
    take_as_prepared()
    run_stage("soft_targets")
    distil(method="mlkd")
    run_stage("student", "small")
    taught = list(steps)
    steps.clear()
    run_stage("baseline", "small")
    assert len(steps) == len(taught)
    joined = [(local, batch) for local, batch, _ in steps if batch.view is None]
    assert joined  # a batch that ends a pass and begins the next
    for local, batch in joined:
        pairs = [pixels_of(pair, batch.samples) for pair in range(2)]
        for row in range(len(batch.samples)):
            assert any(
                torch.equal(local.pixels[row], weak[row])
                and torch.equal(local.strong_pixels[row], strong[row])
                for weak, strong in pairs
            )


@pytest.mark.parametrize(
    ("distillation", "message"),
    [
        (
            {"method": "kd", "paired_views": "weak_to_strong"},
            "student `small`: method `kd` has `paired_views: weak_to_strong`, but in params.yaml "
            "`views` are no pairs. Give `views.policy` or `views.rand_augment` two values",
        ),
        (
            {"method": "mlkd", "paired_views": "weak_to_strong"},
            "distillation.paired_views` is 'weak_to_strong'; expected 'both'",
        ),
        (
            {"method": "kd", "paired_views": "strong"},
            "distillation.paired_views` is 'strong'; expected 'both' or 'weak_to_strong'",
        ),
    ],
)
def test_what_a_student_cannot_see_is_refused_by_the_check_and_by_its_stage(
    project, distillation, message
):
    distil(**distillation)
    assert any(message in problem for problem in problems())
    with pytest.raises(UserError, match="paired_views") as raised:
        run_stage("student", "small")
    assert message in str(raised.value)


def test_pairs_of_top_k_rows_teach_the_methods_that_take_them(paired):
    change_params("soft_targets", encoding="top_k", k=1)
    run_stage("soft_targets")
    opened()
    found = []
    for paired_views in ("both", "weak_to_strong"):
        distil(method="kd", tail="bucket", paired_views=paired_views)
        assert problems() == []
        run_stage("student", "small")
        found.append(train_loss())
    assert np.isfinite(found).all()
    distil(method="mlkd")
    with pytest.raises(UserError, match="needs every logit, but `soft_targets.encoding` is top_k"):
        run_stage("student", "small")


def test_pairs_of_encoded_images_teach_a_student(encoded_project, steps):
    views = RESIZED | {"rand_augment": STRONG, "count": 1}
    change_params("views", **views)
    change_params("training", epochs=1)
    run_stage("soft_targets")
    distil(method="mlkd", standardize=True)
    run_stage("student", "small")
    assert all(local.strong_pixels.shape == local.pixels.shape for local, _, _ in steps)
    assert np.isfinite([loss for *_, loss in steps]).all()


def test_int8_training_continues_on_the_pairs(paired, steps):
    change_params("export", precision="int8", int8_training={"epochs": 1})
    distil(method="mlkd")
    run_stage("student", "small")
    steps.clear()
    run_stage("int8_training", "small")
    assert steps
    for local, batch, _ in steps:
        assert torch.equal(local.strong_pixels, pixels_of(batch.view, batch.samples)[1])


@pytest.mark.parametrize(("stage", "kind"), [("student", "students"), ("baseline", "baselines")])
def test_a_killed_training_on_pairs_resumes_to_the_bytes_of_an_uninterrupted_run(
    paired, monkeypatch, capsys, stage, kind
):
    change_params("training", epochs=2)
    distil(method="mlkd")
    paths = [Path(path.format(kind=kind)) for path in OUTPUTS]
    run_stage(stage, "small")
    before = [path.read_bytes() for path in paths]
    forget_trainings()
    run_stage_interrupted(stage, "small")
    run_stage(stage, "small")
    assert "resumes after epoch 1 of 2" in capsys.readouterr().out
    assert [path.read_bytes() for path in paths] == before
