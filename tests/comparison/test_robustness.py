"""Predictions for corrupted images, and the robust accuracy that follows from them."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import change_params, prepare, run_stage, write_images
from safetensors.numpy import load_file, save_file
from scipy import stats

from pipeline.comparison.measurement import corruptions
from pipeline.comparison.measurement.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from pipeline.comparison.robustness import (
    CorruptionPredictions,
    compare_robustness,
    model_robustness,
)
from pipeline.data.prepared.dataset import open_dataset
from pipeline.data.prepared.image_decoding import clean_boxes, decode_view
from pipeline.data.sources.params import DatasetParams
from pipeline.export.running.reading import Reading
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import ExportedFile, ExportOutputs, ModelOutputs
from pipeline.runtime.params import load_section
from pipeline.stages import robustness as stage
from pipeline.stages.export import reading_of
from pipeline.stages.robustness import predict_variants
from pipeline.views.loader import batches_of

FILES = {
    role: ExportedFile(role, None if role == "teacher" else "small")
    for role in ("teacher", "distilled", "baseline")
}
STUDENT = ExportOutputs("small").corrupted_predictions
TEACHER = ExportOutputs().corrupted_predictions
RNG = np.random.default_rng(0)


def of_file(clean: np.ndarray, corrupted: np.ndarray) -> CorruptionPredictions:
    return CorruptionPredictions(clean, corrupted, 32, role="distilled", precision="float32")


def invented(correct: np.ndarray, labels: np.ndarray) -> CorruptionPredictions:
    """Make predictions: correct where `correct` [K, S, N] is true, and all correct clean."""
    return of_file(labels, np.where(correct, labels, labels + 1))


def classes_of(role: str) -> np.ndarray:
    """The predicted classes of a file of the project: [6, 2, 12]."""
    return load_file(TEACHER if role == "teacher" else STUDENT)[f"{role}.float32"]


def comparison() -> dict:
    return json.loads(Path("metrics/comparison.json").read_text("utf-8"))


def test_accuracies_equal_hand_computed_ones():
    """2 corruptions at 1 severity, 4 images: one and three of 4 are correct."""
    labels = np.array([0, 1, 2, 3])
    corrupt = np.array([[[0, 0, 0, 0]], [[0, 1, 2, 0]]])
    model = model_robustness(of_file(np.array([0, 1, 2, 0]), corrupt), labels)
    assert model.clean == 0.75
    assert model.table.tolist() == [[0.25], [0.75]]
    assert model.shares.tolist() == [1, 0.5, 0.5, 0]
    assert model.accuracy == 0.5
    assert model.relative == pytest.approx(2 / 3)
    assert model_robustness(of_file(labels + 1, corrupt), labels).relative is None


def test_a_model_compared_with_itself_gains_nothing():
    labels = RNG.integers(0, 4, 300)
    model = invented(RNG.random((6, 2, 300)) < 0.7, labels)
    gain = compare_robustness(None, {"twin": (model, model)}, labels).gains["twin"]
    assert (gain.gain, gain.low, gain.high) == (0, 0, 0)


def test_the_interval_of_a_robust_gain_treats_an_image_as_one_sample():
    """An image's variants are not independent: if they counted as images, intervals would be 4
    times too narrow when all or none of an image's variants are correct."""
    labels = np.zeros(1_000, int)
    correct = np.broadcast_to(RNG.random(1_000) < 0.8, (6, 2, 1_000))
    worse = np.broadcast_to(RNG.random(1_000) < 0.7, (6, 2, 1_000))
    students = {"s": (invented(correct, labels), invented(worse, labels))}
    gain = compare_robustness(None, students, labels).gains["s"]
    differences = correct[0, 0].astype(float) - worse[0, 0]
    half = 1.96 * differences.std() / 1_000**0.5
    assert gain.gain == pytest.approx(differences.mean())
    assert gain.low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert gain.high == pytest.approx(differences.mean() + half, abs=0.1 * half)


def test_a_robust_gain_of_several_seeds_is_the_mean_over_pairs_of_equal_seeds():
    """The main files are of seeds 0 and 1. Each image has the same share of 100 variants correct,
    so that the interval is Student's t of the gains 0.10 and 0.12."""
    labels = np.zeros(20, int)
    files = [("distilled", 0, 90), ("baseline", 1, 83), ("distilled", 1, 95), ("baseline", 0, 80)]
    predictions = []
    for role, seed, right in files:
        correct = np.broadcast_to(np.arange(100).reshape(10, 10, 1) < right, (10, 10, 20))
        predictions.append(replace(invented(correct, labels), role=role, seed=seed))
    gain = compare_robustness(None, {"s": predictions}, labels).gains["s"]
    assert gain.gain == pytest.approx(0.11)
    assert (gain.low, gain.high) == pytest.approx(stats.t.interval(0.95, 1, 0.11, 0.01))


@pytest.mark.parametrize(("images", "significant"), [(1, False), (4, False), (7, True)])
def test_a_robust_gain_of_few_images_is_not_significant(images, significant):
    labels = np.zeros(500, int)
    better = np.ones((6, 2, 500), bool)
    worse = better & (np.arange(500) >= images)
    gain = compare_robustness(
        None, {"s": (invented(better, labels), invented(worse, labels))}, labels
    )
    exact = 2 * 0.5**images
    assert gain.gains["s"].p_value == pytest.approx(exact, rel=0.3)
    assert gain.gains["s"].significant == significant


@pytest.mark.parametrize("role", FILES)
def test_a_file_predicts_the_corrupted_test_images_as_its_network_does_in_pytorch(project, role):
    model = ModelOutputs(role, FILES[role].name).model
    network, spec = checkpoint.load(model, produced_by="-")
    test = open_dataset().splits["test"]
    tensors = load_file(TEACHER if role == "teacher" else STUDENT)
    assert tensors["samples"].tolist() == list(range(len(test)))
    assert classes_of(role).dtype == np.int32

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
    assert classes_of(role).tolist() == expected


class Recorder:
    """A file that records its images."""

    def __init__(self, reading: Reading):
        self.metadata = SimpleNamespace(reading=reading)
        self.seen: list[np.ndarray] = []

    def logits(self, images: np.ndarray) -> np.ndarray:
        self.seen.append(images.copy())
        return images.mean((2, 3))


def shown(split, samples: np.ndarray) -> np.ndarray:
    """Record a file's images: [variants, N, C, S, S] uint8."""
    spec = InputSpec(3, 16, [0] * 3, [1] * 3)
    recorder = Recorder(reading_of(load_section(DatasetParams, "dataset"), spec))
    predict_variants([recorder], split, samples)
    variants = len(CORRUPTIONS) * len(SEVERITIES)
    starts = range(0, len(recorder.seen), variants)
    return np.concatenate([np.stack(recorder.seen[i : i + variants]) for i in starts], 1)


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
        noise = corrupt(view, sample, corruption="noise", severity=SEVERITIES[0])
        assert np.array_equal(noisy[row], noise)


def test_accuracy_on_clean_images_is_the_test_accuracy_for_pixels_of_another_size(project):
    """The teacher's test accuracy is of prepared pixels, the students' of views."""
    change_params("views", image_size=12)
    for name, *arguments in (
        ("soft_targets",),
        ("baseline", "small"),
        ("student", "small"),
        ("export", "small"),
    ):
        run_stage(name, *arguments)
    with pytest.raises(UserError, match=f"`{STUDENT}` was made from other files than those in mod"):
        run_stage("compare")
    run_stage("robustness", "small")
    run_stage("compare")
    section = Path("reports/index.html").read_text("utf-8").partition('id="corruption"')[2]
    clean = re.findall(r'<td data-label="clean"><span>(.+?)</span>', section)
    table = pd.read_csv("reports/comparison.csv")
    assert clean == [f"{accuracy:.2%}" for accuracy in table["accuracy"]]
    assert load_file(TEACHER)["image_size"].tolist() == [16]
    assert load_file(STUDENT)["image_size"].tolist() == [12]
    assert "12 pixels a side, under" in section
    assert "The teacher's images have 16 pixels a side" in section


def test_some_images_evenly_spread_are_corrupted(project, monkeypatch):
    before = classes_of("distilled")
    monkeypatch.setattr(corruptions, "FEWEST", 5)
    run_stage("robustness", "small")
    tensors = load_file(STUDENT)
    assert tensors["samples"].tolist() == [0, 2, 4, 7, 9]
    assert np.array_equal(classes_of("distilled"), before[..., tensors["samples"]])
    with pytest.raises(UserError, match=r"expected .*teacher.float32 int32 \[6, 2, 5\]"):
        run_stage("compare")


def test_a_second_run_gives_equal_bytes(project):
    before = [path.read_bytes() for path in (TEACHER, STUDENT)]
    for models in ("--teacher", "small"):
        run_stage("robustness", models)
    assert [path.read_bytes() for path in (TEACHER, STUDENT)] == before


def test_the_comparison_follows_from_the_predictions(project):
    labels = open_dataset().splits["test"].labels
    accuracy = {role: (classes_of(role) == labels).mean() for role in FILES}
    student, teacher = comparison()["students"]["small"], comparison()["teacher"]
    assert teacher["robust_accuracy"] == pytest.approx(accuracy["teacher"], abs=1e-6)
    assert student["robust_accuracy"] == pytest.approx(accuracy["distilled"], abs=1e-6)
    gain = accuracy["distilled"] - accuracy["baseline"]
    assert student["robust_gain"] == pytest.approx(gain, abs=1e-6)
    assert student["robust_gain_low"] <= gain <= student["robust_gain_high"]
    table = pd.read_csv("reports/comparison.csv")
    assert table["robust_accuracy"].tolist() == pytest.approx(list(accuracy.values()))


def test_a_baseline_with_the_students_predictions_never_differs_significantly(project, capsys):
    tensors = load_file(STUDENT)
    save_file(tensors | {"baseline.float32": tensors["distilled.float32"]}, STUDENT)
    run_stage("compare")
    student = comparison()["students"]["small"]
    assert [student[f"robust_gain{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    sentence = "Under common corruptions, the gain of small is not significant."
    assert sentence in capsys.readouterr().out
    assert sentence in Path("reports/comparison.md").read_text("utf-8")
    assert sentence in Path("reports/index.html").read_text("utf-8")


@pytest.mark.parametrize("suffix", [".onnx", ".json"])
def test_an_absent_file_or_card_is_named_with_the_stage_that_writes_it(project, suffix):
    path = FILES["baseline"].path.with_suffix(suffix)
    path.unlink()
    before = STUDENT.read_bytes()
    with pytest.raises(UserError, match=rf"{path}.* `dvc repro export@\w+`"):
        run_stage("robustness", "small")
    assert STUDENT.read_bytes() == before


@pytest.mark.parametrize("arguments", [(), ("small", "--teacher")])
def test_the_stage_takes_either_a_student_or_the_teacher(project, capsys, arguments):
    with pytest.raises(SystemExit):
        run_stage("robustness", *arguments)
    assert "expected either the name of a student or --teacher" in capsys.readouterr().err


HELD = ", ".join(f"{role}.float32 int32 [6, 2, 12]" for role in ("baseline", "distilled"))
HELD += ", image_size int32 [1], samples int32 [12]"


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
