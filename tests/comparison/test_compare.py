"""The comparison follows from the predictions, and only significant differences count as such."""

import json
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import run_stage
from safetensors.numpy import load_file, save_file

from pipeline.comparison.compare import (
    Comparison,
    Predictions,
    compare,
    is_significant,
    pareto_front,
)
from pipeline.comparison.figures import headline_figures
from pipeline.comparison.report.summary import (
    gain_sentence,
    headline_sentences,
    recommendation_sentence,
)
from pipeline.comparison.robustness import CorruptionPredictions, compare_robustness
from pipeline.comparison.statistics import holm, mcnemar
from pipeline.data.prepared.dataset import open_dataset
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_json

CLASSES = 4
RNG = np.random.default_rng(0)
LABELS = {"validation": RNG.integers(0, CLASSES, 100), "test": RNG.integers(0, CLASSES, 400)}


def read(path: str) -> dict:
    return json.loads(Path(path).read_text("utf-8"))


def invented(
    name: str, role: str, accuracy: float, seed: int, parameters: int = 100
) -> Predictions:
    """Make logits of this accuracy; the seed chooses which images are wrong."""
    rng = np.random.default_rng(seed)

    def logits(labels: np.ndarray) -> np.ndarray:
        wrong = rng.permutation(len(labels)) >= round(accuracy * len(labels))
        scores = rng.normal(0, 0.5, (len(labels), CLASSES)).astype(np.float32)
        scores[np.arange(len(labels)), (labels + wrong) % CLASSES] += 5
        return scores

    return Predictions(
        name=name,
        role=role,
        validation=logits(LABELS["validation"]),
        test=logits(LABELS["test"]),
        parameters=parameters,
        macs=10 * parameters,
        size_bytes=4 * parameters,
    )


TEACHER = invented("teacher", "teacher", 0.95, 1, parameters=1000)
NAMES = ["ant", "bee", "cat", "dog"]


def compared(**students: tuple[Predictions, Predictions]) -> Comparison:
    labels = LABELS["test"]
    corrupted = CorruptionPredictions(labels, np.broadcast_to(labels, (6, 3, len(labels))))
    robustness = compare_robustness(corrupted, dict.fromkeys(students, (corrupted,) * 2), labels)
    return compare(TEACHER, students, LABELS, NAMES, robustness)


def gains_in_words(comparison: Comparison) -> str:
    return headline_sentences(headline_figures(comparison, None))[0]


def test_a_model_compared_with_itself_gains_nothing_and_agrees_everywhere():
    twin = replace(TEACHER, name="twin", role="distilled")
    comparison = compared(twin=(twin, replace(twin, role="baseline")))
    gain = comparison.gains["twin"]
    assert (gain.gain, gain.low, gain.high, gain.p_value) == (0, 0, 0, 1)
    assert not gain.significant
    assert (gain.first.agreement, gain.first.kl) == (1, 0)
    assert "the gain of twin is not significant" in gains_in_words(comparison)


def test_a_large_gain_or_loss_is_reported_as_one():
    good, bad = (invented("s", "distilled", a, i) for i, a in enumerate((0.9, 0.6)))
    comparison = compared(
        up=(replace(good, name="up"), replace(bad, name="up", role="baseline")),
        down=(replace(bad, name="down"), replace(good, name="down", role="baseline")),
    )
    up, down = comparison.gains.values()
    assert up.gain == pytest.approx(0.3)
    assert up.low < 0.3 < up.high
    assert up.p_value < 1e-6
    assert up.significant
    assert down.gain == pytest.approx(-0.3)
    assert "raised the accuracy of up by 30.00 points" in gains_in_words(comparison)
    assert "lowered the accuracy of down by 30.00 points" in gains_in_words(comparison)


def test_a_gain_whose_interval_holds_0_is_not_significant():
    one, other = invented("s", "distilled", 0.90, 2), invented("s", "baseline", 0.89, 3)
    comparison = compared(s=(one, other))
    assert comparison.gains["s"].low < 0 < comparison.gains["s"].high
    assert "the gain of s is not significant" in gains_in_words(comparison)


def test_a_gain_is_significant_only_by_both_interval_and_test():
    assert not is_significant(-0.01, 0.02, 0.01)
    assert not is_significant(0, 0.02, 0.01)
    assert not is_significant(0.001, 0.02, 0.125)
    assert is_significant(0.001, 0.02, 0.01)
    assert is_significant(-0.02, -0.001, 0.01)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        (
            dict.fromkeys("ab", (0.01, -0.01, 0.03, 0.4)),
            "On 1 test image, no gain is significant.",
        ),
        (
            {"a": (0.04, 0.01, 0.07, 0.01)} | dict.fromkeys("bc", (0, -0.01, 0.01, 1)),
            "On 1 test image, distillation raised the accuracy of a by 4.00 points (1.00 to 7.00); "
            "the gains of b and c are not significant.",
        ),
    ],
)
def test_the_summary_describes_the_gains(gains, expected):
    assert gain_sentence(gains, 1) == expected


def test_the_smallest_network_that_is_not_significantly_worse_than_the_best_is_recommended():
    best = invented("big", "distilled", 0.92, 4, parameters=500)
    close = invented("small", "distilled", 0.91, 5, parameters=50)
    worse = invented("tiny", "distilled", 0.5, 6, parameters=5)
    comparison = compared(
        **{m.name: (m, replace(worse, name=m.name, role="baseline")) for m in (best, close)},
        tiny=(worse, replace(worse, role="baseline")),
    )
    assert comparison.recommendation.best.name == "big"
    assert comparison.recommendation.chosen.name == "small"
    assert comparison.recommendation.chosen.role == "distilled"
    assert "To ship: small, distilled: 91.00%" in recommendation_sentence(comparison)


def test_p_values_of_pairs_of_students_are_adjusted_for_their_number():
    models = [
        invented(name, "distilled", a, i)
        for i, (name, a) in enumerate((("a", 0.90), ("b", 0.90), ("c", 0.70)))
    ]
    comparison = compared(**{m.name: (m, replace(m, role="baseline")) for m in models})
    pairs = {(p.first.name, p.second.name): p for p in comparison.pairs}
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [p.significant for p in pairs.values()] == [False, True, True]
    raw = [mcnemar(pair.first.correct, pair.second.correct) for pair in pairs.values()]
    adjusted = [pair.p_value for pair in pairs.values()]
    assert adjusted == pytest.approx(holm(raw), rel=1e-9, abs=0)
    assert all(p > 1.9 * alone for p, alone in zip(adjusted[1:], raw[1:], strict=True))


def test_the_pareto_front_holds_the_models_that_no_other_matches():
    accuracies = {"a": (0.7, 10), "b": (0.6, 20), "c": (0.8, 30), "d": (0.8, 40), "e": (0.9, 50)}
    models = [
        invented(name, "distilled", accuracy, i, parameters=size)
        for i, (name, (accuracy, size)) in enumerate(accuracies.items())
    ]
    comparison = compared(**{m.name: (m, replace(m, role="baseline")) for m in models})
    distilled = [gain.first for gain in comparison.gains.values()]
    assert [m.name for m in pareto_front(distilled, attrgetter("parameters"))] == ["a", "c", "e"]


def test_the_json_follows_from_the_predictions(project):
    comparison = read("metrics/comparison.json")
    labels = open_dataset().splits["test"].labels
    decisions = {
        name: load_file(f"predictions/{name}.safetensors")["test"].argmax(1)
        for name in ("teacher", "students/small", "baselines/small")
    }
    accuracy = {name: (chosen == labels).mean() for name, chosen in decisions.items()}
    student = comparison["students"]["small"]
    assert comparison["test_images"] == len(labels)
    for name, path in (
        ("teacher", "metrics/teacher.json"),
        ("students/small", "metrics/students/small.json"),
        ("baselines/small", "metrics/baselines/small.json"),
    ):
        assert read(path)["test_accuracy"] == pytest.approx(accuracy[name])
    assert student["accuracy"] == pytest.approx(accuracy["students/small"], abs=1e-6)
    assert student["baseline"] == pytest.approx(accuracy["baselines/small"], abs=1e-6)
    gain = accuracy["students/small"] - accuracy["baselines/small"]
    assert student["gain"] == pytest.approx(gain, abs=1e-6)
    assert student["gain_low"] <= student["gain"] <= student["gain_high"]
    agreement = (decisions["teacher"] == decisions["students/small"]).mean()
    assert student["agreement"] == pytest.approx(agreement, abs=1e-6)


def test_the_csv_has_the_metrics_of_every_model_as_its_stage_measured_them(project):
    table = pd.read_csv("metrics/comparison.csv")
    assert list(table["role"]) == ["teacher", "distilled", "baseline"]
    files = ["metrics/teacher.json", "metrics/students/small.json", "metrics/baselines/small.json"]
    for (_, row), path in zip(table.iterrows(), files, strict=True):
        measured = read(path)
        for column, key in (
            ("accuracy", "test_accuracy"),
            ("top5", "test_top5_accuracy"),
            ("nll", "test_nll"),
            ("parameters", "parameters"),
            ("macs", "macs"),
            ("size_bytes", "size_bytes"),
        ):
            assert row[column] == pytest.approx(measured[key]), (path, column)
    size = Path("models/students/small/weights.safetensors").stat().st_size
    assert table["size_bytes"][1] == size


def test_class_accuracies_average_to_the_accuracy(project):
    table = pd.read_csv("reports/class_accuracy.csv")
    assert list(table["class"]) == ["ant", "bee", "cat"]
    assert list(table.columns[2:]) == ["teacher", "distilled/small", "baseline/small"]
    mean = (table["distilled/small"] * table["test_images"]).sum() / table["test_images"].sum()
    assert mean == pytest.approx(read("metrics/students/small.json")["test_accuracy"])


def test_the_comparison_is_printed_as_a_table_with_interval_and_verdict(project, capsys):
    run_stage("compare")
    printed = capsys.readouterr().out
    assert "teacher: test accuracy" in printed
    assert "95% interval" in printed
    assert printed.isascii()  # for any terminal
    head, row = printed.splitlines()[1:3]
    assert head.split()[0] == "student"
    assert row.split()[0] == "small"
    assert any(word in row for word in ("not significant", "gain", "loss"))
    run_stage("compare", "--show")
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("metrics/students/small.json", "student@small"),
        ("predictions/baselines/small.safetensors", "baseline@small"),
        ("predictions/robustness/students/small.safetensors", "robustness@small"),
        ("predictions/robustness/teacher.safetensors", "robustness_teacher"),
        ("metrics/history/baselines/small.csv", "baseline@small"),
        ("data/prepared/dataset.json", "prepare"),
        ("data/soft_targets/store.json", "soft_targets"),
        ("metrics/speed.json", "speed"),
    ],
)
def test_an_absent_or_damaged_input_is_named_with_the_stage_that_writes_it(project, path, stage):
    before = Path("reports/index.html").read_bytes()
    for damage in (Path.unlink, Path.touch):
        damage(Path(path))
        with pytest.raises(UserError) as refusal:
            run_stage("compare")
        assert path in str(refusal.value)
        assert stage in str(refusal.value)
    assert Path("reports/index.html").read_bytes() == before


def test_a_damaged_comparison_is_not_shown(project):
    write_json("metrics/comparison.json", read("metrics/comparison.json") | {"test_images": "all"})
    with pytest.raises(UserError, match="comparison.json: test_images` is 'all'; expected a valid"):
        run_stage("compare", "--show")


PREDICTIONS = Path("predictions/students/small.safetensors")


def test_predictions_for_other_images_are_refused(project):
    logits = load_file(PREDICTIONS)
    save_file(logits | {"test": logits["test"][1:]}, PREDICTIONS)
    with pytest.raises(
        UserError, match=r"test float32 \[11, 3\].*; expected test float32 \[12, 3\]"
    ):
        run_stage("compare")


def test_a_store_of_other_images_is_refused(project):
    index = read("data/soft_targets/store.json")
    write_json("data/soft_targets/store.json", index | {"dataset_fingerprint": "0" * 64})
    with pytest.raises(UserError, match=r"for dataset 0{12}…, but data/prepared is \w{12}…"):
        run_stage("compare")
    del index["teacher_fingerprint"]
    write_json("data/soft_targets/store.json", index)
    with pytest.raises(UserError, match="store.json: teacher_fingerprint` is missing"):
        run_stage("compare")


def test_non_finite_logits_are_refused(project):
    logits = load_file(PREDICTIONS)
    logits["test"][3, 1] = np.nan
    save_file(logits, PREDICTIONS)
    with pytest.raises(UserError, match="logits for test that are not finite"):
        run_stage("compare")


def test_a_teacher_that_is_never_correct_is_refused_with_a_hint(project):
    path = Path("predictions/teacher.safetensors")
    logits = load_file(path)
    labels = open_dataset().splits["test"].labels
    logits["test"][:] = 0
    logits["test"][np.arange(len(labels)), (labels + 1) % 3] = 1
    save_file(logits, path)
    with pytest.raises(UserError, match="the order of the classes"):
        run_stage("compare")


def test_results_of_a_removed_student_are_left_out(project):
    Path("metrics/students/old.json").write_text("{}")
    run_stage("compare")
    assert list(read("metrics/comparison.json")["students"]) == ["small"]


def test_equal_inputs_give_equal_bytes(project):
    outputs = [*Path("reports").iterdir(), *Path("metrics").glob("*.*")]
    before = {path: path.read_bytes() for path in outputs}
    run_stage("compare")
    assert {path: path.read_bytes() for path in outputs} == before
    assert {path.name for path in Path("reports").iterdir()} == {
        "class_accuracy.csv",
        "comparison.md",
        "index.html",
    }
