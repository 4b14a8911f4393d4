"""Predictions for corrupted images, and the robust accuracy that follows from them."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import change_params, prepare, run_stage, write_images
from safetensors.numpy import load_file, save_file
from torch import nn

from pipeline.comparison.measurement import corruptions
from pipeline.comparison.measurement.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from pipeline.comparison.robustness import (
    CorruptionPredictions,
    compare_robustness,
    model_robustness,
)
from pipeline.data.prepared.dataset import open_dataset
from pipeline.data.prepared.image_decoding import clean_boxes, decode_view
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import UserError
from pipeline.stages import robustness as stage
from pipeline.stages.robustness import predict_variants
from pipeline.views.loader import batches_of

FOLDER = Path("predictions/robustness")
STUDENT = FOLDER / "students/small.safetensors"
TEACHER = FOLDER / "teacher.safetensors"
PLACES = ("teacher", "students/small", "baselines/small")
RNG = np.random.default_rng(0)


def invented(correct: np.ndarray, labels: np.ndarray) -> CorruptionPredictions:
    """Make predictions: correct where `correct` [K, S, N] is true, and all correct clean."""
    return CorruptionPredictions(labels, np.where(correct, labels, labels + 1), 32)


def comparison() -> dict:
    return json.loads(Path("metrics/comparison.json").read_text("utf-8"))


def test_accuracies_equal_hand_computed_ones():
    """2 corruptions at 1 severity, 4 images: one and three of 4 are correct."""
    labels = np.array([0, 1, 2, 3])
    corrupt = np.array([[[0, 0, 0, 0]], [[0, 1, 2, 0]]])
    model = model_robustness(CorruptionPredictions(np.array([0, 1, 2, 0]), corrupt, 32), labels)
    assert model.clean == 0.75
    assert model.table.tolist() == [[0.25], [0.75]]
    assert model.shares.tolist() == [1, 0.5, 0.5, 0]
    assert model.accuracy == 0.5
    assert model.relative == pytest.approx(2 / 3)
    assert model_robustness(CorruptionPredictions(labels + 1, corrupt, 32), labels).relative is None


def test_a_model_compared_with_itself_gains_nothing():
    labels = RNG.integers(0, 4, 300)
    model = invented(RNG.random((6, 3, 300)) < 0.7, labels)
    gain = compare_robustness(None, {"twin": (model, model)}, labels).gains["twin"]
    assert (gain.gain, gain.low, gain.high) == (0, 0, 0)


def test_the_interval_of_a_robust_gain_treats_an_image_as_one_sample():
    """An image's variants are not independent: if they counted as images, intervals would be 4
    times too narrow when all or none of an image's variants are correct."""
    labels = np.zeros(1_000, int)
    correct = np.broadcast_to(RNG.random(1_000) < 0.8, (6, 3, 1_000))
    worse = np.broadcast_to(RNG.random(1_000) < 0.7, (6, 3, 1_000))
    students = {"s": (invented(correct, labels), invented(worse, labels))}
    gain = compare_robustness(None, students, labels).gains["s"]
    differences = correct[0, 0].astype(float) - worse[0, 0]
    half = 1.96 * differences.std() / 1_000**0.5
    assert gain.gain == pytest.approx(differences.mean())
    assert gain.low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert gain.high == pytest.approx(differences.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize("place", PLACES)
def test_the_stage_writes_the_networks_predictions_for_the_corrupted_test_images(project, place):
    network, spec = checkpoint.load(Path("models") / place, produced_by="-")
    test = open_dataset().splits["test"]
    tensors = load_file(FOLDER / f"{place}.safetensors")
    assert tensors["samples"].tolist() == list(range(len(test)))
    assert tensors["decisions"].dtype == np.int32

    def classes(images: list[np.ndarray]) -> list[int]:
        logits = predict(network, spec.input, torch.from_numpy(np.stack(images)))
        return logits.argmax(1).tolist()

    expected = [
        [
            classes(
                [corrupt(image, i, corruption=c, severity=s) for i, image in enumerate(test.images)]
            )
            for s in SEVERITIES
        ]
        for c in CORRUPTIONS
    ]
    assert tensors["decisions"].tolist() == expected


class Recorder(nn.Module):
    """A network that records its inputs."""

    def __init__(self):
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.clone())
        return images.mean((2, 3))


def shown(split, samples: np.ndarray) -> np.ndarray:
    """Record a network's inputs: [18, N, C, S, S] uint8."""
    recorder, spec = Recorder(), InputSpec(3, split_side(split), [0, 0, 0], [1, 1, 1])
    predict_variants([(recorder, spec)], split, samples, torch.device("cpu"))
    batches = [torch.stack(recorder.seen[i : i + 18]) for i in range(0, len(recorder.seen), 18)]
    return (torch.cat(batches, 1) * 255).round().to(torch.uint8).numpy()


def split_side(split) -> int:
    return getattr(split, "image_size", None) or split.images.shape[-1]


def test_corruption_of_an_image_is_identical_for_any_batch_and_order(project, monkeypatch):
    test = open_dataset().splits["test"]
    all_at_once = shown(test, np.arange(len(test)))
    monkeypatch.setattr(stage, "batches_of", partial(batches_of, size=5))
    order = np.random.default_rng(0).permutation(len(test))
    assert np.array_equal(shown(test, order), all_at_once[:, order])
    assert np.array_equal(shown(test, order[:1]), all_at_once[:, order[:1]])


def test_encoded_images_are_decoded_at_the_size_of_the_views_and_then_corrupted(folder):
    write_images(folder / "images", size=48)
    test = prepare(storage="encoded", image_size=40, quality=90).splits["test"]
    samples = np.array([3, 0])
    noisy = shown(test, samples)[0]
    for row, sample in enumerate(samples):
        size = test.sizes[sample]
        (box,) = clean_boxes(size[None], 40)
        view = decode_view(test.content(sample), size, box, 40, 3)
        noise = corrupt(view, sample, corruption="noise", severity=1)
        assert np.array_equal(noisy[row], noise)


def test_accuracy_on_clean_images_is_the_test_accuracy_for_pixels_of_another_size(project):
    """The teacher's test accuracy is of prepared pixels, the students' of views."""
    change_params("views", image_size=12)
    for name, *arguments in (
        ("soft_targets",),
        ("baseline", "small"),
        ("student", "small"),
        ("robustness", "small"),
        ("compare",),
    ):
        run_stage(name, *arguments)
    section = Path("reports/index.html").read_text("utf-8").partition('id="corruption"')[2]
    clean = re.findall(r'<td data-label="clean"><span>(.+?)</span>', section)
    table = pd.read_csv("metrics/comparison.csv")
    assert clean == [f"{accuracy:.2%}" for accuracy in table["accuracy"]]
    assert load_file(TEACHER)["image_size"].tolist() == [16]
    assert load_file(STUDENT)["image_size"].tolist() == [12]
    assert "12 pixels a side, under" in section
    assert "The teacher's images have 16 pixels a side" in section


def test_predictions_for_views_of_another_size_are_refused(project):
    tensors = load_file(STUDENT)
    save_file(tensors, STUDENT, {"made_from": '{"views.image_size": 24}'})
    with_dvc = "stages: {robustness: {do: {params: [views.image_size]}}, compare: {}, teacher: {}, "
    with_dvc += "student: {do: {}}, baseline: {do: {}}}"
    Path("dvc.yaml").write_text(with_dvc)
    with pytest.raises(UserError, match=r"when `params.yaml: views.image_size` was 24; now .* 16"):
        run_stage("compare")


def test_at_most_max_images_evenly_spread_are_corrupted(project, monkeypatch):
    before = load_file(STUDENT)
    monkeypatch.setattr(corruptions, "MAX_IMAGES", 5)
    run_stage("robustness", "small")
    tensors = load_file(STUDENT)
    assert tensors["samples"].tolist() == [0, 2, 4, 7, 9]
    assert np.array_equal(tensors["decisions"], before["decisions"][..., tensors["samples"]])
    with pytest.raises(UserError, match=r"expected decisions int32 \[6, 3, 5\]"):
        run_stage("compare")


def test_a_second_run_gives_equal_bytes(project):
    before = {place: (FOLDER / f"{place}.safetensors").read_bytes() for place in PLACES}
    for models in ("--teacher", "small"):
        run_stage("robustness", models)
    assert before == {place: (FOLDER / f"{place}.safetensors").read_bytes() for place in PLACES}


def test_the_comparison_follows_from_the_predictions(project):
    labels = open_dataset().splits["test"].labels
    tensors = {place: load_file(FOLDER / f"{place}.safetensors") for place in PLACES}
    accuracy = {place: (t["decisions"] == labels).mean() for place, t in tensors.items()}
    student, teacher = comparison()["students"]["small"], comparison()["teacher"]
    assert teacher["robust_accuracy"] == pytest.approx(accuracy["teacher"], abs=1e-6)
    assert student["robust_accuracy"] == pytest.approx(accuracy["students/small"], abs=1e-6)
    gain = accuracy["students/small"] - accuracy["baselines/small"]
    assert student["robust_gain"] == pytest.approx(gain, abs=1e-6)
    assert student["robust_gain_low"] <= gain <= student["robust_gain_high"]
    table = pd.read_csv("metrics/comparison.csv")
    assert table["robust_accuracy"].tolist() == pytest.approx(list(accuracy.values()))


def test_a_baseline_with_the_students_predictions_never_differs_significantly(project, capsys):
    (FOLDER / "baselines/small.safetensors").write_bytes(STUDENT.read_bytes())
    run_stage("compare")
    student = comparison()["students"]["small"]
    assert [student[f"robust_gain{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    sentence = "Under common corruptions, the gain of small is not significant."
    assert sentence in capsys.readouterr().out
    assert sentence in Path("reports/comparison.md").read_text("utf-8")
    assert sentence in Path("reports/index.html").read_text("utf-8")


def test_an_absent_model_is_named_with_the_stage_that_writes_it(project):
    Path("models/baselines/small/network.json").unlink()
    before = STUDENT.read_bytes()
    with pytest.raises(UserError, match="models/baselines/small.* `dvc repro baseline@small`"):
        run_stage("robustness", "small")
    assert STUDENT.read_bytes() == before


@pytest.mark.parametrize("arguments", [(), ("small", "--teacher")])
def test_the_stage_takes_either_a_student_or_the_teacher(project, capsys, arguments):
    with pytest.raises(SystemExit):
        run_stage("robustness", *arguments)
    assert "expected either the name of a student or --teacher" in capsys.readouterr().err


HELD = "decisions int32 [6, 3, 12], image_size int32 [1], samples int32 [12]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {**t, "image_size": t["image_size"].astype(np.float32)},
            f"holds {HELD.replace('size int32', 'size float32')}; expected {HELD}, for",
        ),
        # only a teacher may lack predictions for corrupted images
        (lambda t: {"samples": t["samples"]}, f"holds samples int32 [12]; expected {HELD}, for"),
        (lambda t: {**t, "samples": t["samples"] + 1}, "is of other test images; expected 12 of"),
    ],
)
def test_predictions_for_other_images_or_corruptions_are_refused(project, change, message):
    save_file(change(load_file(STUDENT)), STUDENT)
    with pytest.raises(UserError, match=re.escape(f"`{STUDENT}` {message}")) as refusal:
        run_stage("compare")
    assert "dvc repro --force --single-item robustness@small" in str(refusal.value)
