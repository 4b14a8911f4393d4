"""A student trained from the store sees what it would see with the live teacher."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import run_stage, write_params

from pipeline.data.prepared.dataset import open_dataset
from pipeline.distillation.losses import kd
from pipeline.models import checkpoint, evaluation
from pipeline.models.spec import build
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.params import load_section
from pipeline.store.reading.store import open_store, view_of_epoch
from pipeline.students.label_loss import label_loss
from pipeline.views.geometry import apply_views, plan_views
from pipeline.views.loader import open_views
from pipeline.views.params import ViewsParams

PLAIN, MIXUP, CUTMIX = (
    {"policy": "crop_flip"},
    {
        "policy": "random_resized_crop",
        "rand_augment": {"operations": 2, "magnitude": 9},
        "mix": {"method": "mixup", "alpha": 0.4},
    },
    {"policy": "crop", "mix": {"method": "cutmix", "alpha": 1.0}},
)


@pytest.mark.parametrize(
    ("views", "teachers_batch", "students_batch"),
    [(PLAIN, 13, 16), (PLAIN, 1, 7), (PLAIN, 256, 36), (MIXUP, 13, 16), (CUTMIX, 256, 7)],
)
def test_a_student_sees_the_pixels_that_the_teacher_saw(
    project, monkeypatch, views, teachers_batch, students_batch
):
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["views"] |= views
    params["soft_targets"]["batch_size"] = teachers_batch
    params["training"] |= {"batch_size": students_batch, "epochs": 3}  # as many as views
    write_params(Path(), params)
    teacher_saw, student_saw = [], []

    def watched_predict(network, spec, views, **options):
        teacher_saw.extend(view.tobytes() for view in views.numpy())
        return evaluation.predict(network, spec, views, **options)

    def watched_views(*arguments):
        def batches(view, order):
            for batch in open_views(*arguments).batches(view, order):
                student_saw.extend(pixels.tobytes() for pixels in batch.pixels.numpy())
                yield batch

        return SimpleNamespace(batches=batches)

    monkeypatch.setattr("pipeline.store.writing.teacher_logits.predict", watched_predict)
    run_stage("soft_targets")
    monkeypatch.setattr("pipeline.stages.student.open_views", watched_views)
    run_stage("student", "small")
    training_views = teacher_saw[: 3 * 36]  # validation and test follow
    assert len(student_saw) == 3 * 36
    assert sorted(student_saw) == sorted(training_views)
    assert student_saw != training_views  # in another order


def test_a_step_from_the_store_equals_a_step_with_the_live_teacher(project):
    dataset, views = open_dataset(), load_section(ViewsParams, "views")
    store = open_store(dataset, views, checkpoint.fingerprint(TEACHER.model, produced_by="-"))
    teacher, description = checkpoint.load(TEACHER.model, produced_by="-")
    samples = np.random.default_rng(1).permutation(36)[:16]
    view = view_of_epoch(1, store.num_views, seed=2)
    split = dataset.splits["train"]
    (plan,) = plan_views(
        views.view_policy, views.seed, view, [samples], views.image_size, torch.device("cpu")
    )
    pixels = apply_views(torch.from_numpy(split.images[samples]), plan)
    live = evaluation.predict(teacher, description.input, pixels).clone()
    cached = torch.from_numpy(store.gather(view, samples).logits).float()

    def step(teacher_logits: torch.Tensor) -> tuple[float, torch.Tensor]:
        torch.manual_seed(0)
        student = build(description).train()
        logits = student(description.input.apply(pixels))
        loss = 0.9 * kd(logits, teacher_logits, temperature=4.0)
        loss += 0.1 * label_loss(logits, torch.from_numpy(split.labels[samples]))
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])

    (online_loss, online_gradient), (offline_loss, offline_gradient) = step(live), step(cached)
    float16 = 2**-11  # relative rounding of a logit
    scale = live.abs().max().item()
    assert offline_loss == pytest.approx(online_loss, abs=float16 * scale)
    difference = (offline_gradient - online_gradient).norm() / online_gradient.norm()
    assert 0 < difference < 4 * float16 * max(scale, 1)
