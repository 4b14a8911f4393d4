"""The comparison follows from the predictions, and only significant differences count as such."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy
from conftest import PARAMS, run_stage, write_params
from import_closure import ROOT
from safetensors.numpy import load_file, save_file

from pipeline.comparison import metrics
from pipeline.comparison.compare import Comparison, Predictions, compare
from pipeline.comparison.figures import Figures, headline_figures
from pipeline.comparison.measurement.statistics import Gain, holm, mcnemar
from pipeline.comparison.report.charts import pareto_front
from pipeline.comparison.report.decision_card import decision_card
from pipeline.comparison.report.drawings import calibration
from pipeline.comparison.report.int8_table import int8_table
from pipeline.comparison.report.numbers import points
from pipeline.comparison.report.start_texts import scratch_sentence, start_sentences
from pipeline.comparison.report.summary import (
    budget_sentences,
    describe_gains,
    gain_sentences,
    pair_sentences,
    teacher_sentences,
)
from pipeline.comparison.robustness import CorruptionPredictions, compare_robustness
from pipeline.data.prepared.dataset import open_dataset
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_json
from pipeline.runtime.outputs import ExportedFile, ExportOutputs, ModelOutputs, Start

CLASSES = 4
RNG = np.random.default_rng(0)
LABELS = {"validation": RNG.integers(0, CLASSES, 100), "test": RNG.integers(0, CLASSES, 400)}


FILES = [ExportedFile("teacher"), *(ExportedFile(r, "small") for r in ("distilled", "baseline"))]
TEACHERS, STUDENTS = ExportOutputs().predictions, ExportOutputs("small").predictions


def read(path: str | Path) -> dict:
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

    costs = {"parameters": parameters, "macs": 10 * parameters, "size_bytes": 4 * parameters}
    return Predictions(
        name=name,
        role=role,
        path=f"{name}.onnx",
        **{split: logits(labels) for split, labels in LABELS.items()},
        **costs,
    )


TEACHER = invented("teacher", "teacher", 0.95, 1, parameters=1000)
NAMES = ["ant", "bee", "cat", "dog"]


def compared(**students: tuple[Predictions, Predictions]) -> Comparison:
    labels = LABELS["test"]
    predicted = np.broadcast_to(labels, (6, 3, len(labels)))
    corrupted = CorruptionPredictions(labels, predicted, 16, "distilled", "float32")
    of_students = {name: (corrupted,) * len(models) for name, models in students.items()}
    robustness = compare_robustness(corrupted, of_students, labels)
    return compare(TEACHER, students, LABELS, NAMES, robustness)


def paired(distilled: Predictions, baseline: Predictions, name: str) -> tuple[Predictions, ...]:
    return replace(distilled, name=name), replace(baseline, name=name, role="baseline")


def figures_of(comparison: Comparison, **steps: tuple[int | None, int | None]) -> Figures:
    return headline_figures(comparison, None, dict.fromkeys(comparison.gains, (9, 9)) | steps)


def gains_in_words(comparison: Comparison) -> str:
    return gain_sentences(figures_of(comparison))[0]


def test_a_model_compared_with_itself_gains_nothing_and_agrees_everywhere():
    twin = replace(TEACHER, role="distilled")
    comparison = compared(twin=paired(twin, twin, "twin"))
    gain = comparison.gains["twin"]
    assert (gain.gain, gain.low, gain.high, gain.p_value) == (0, 0, 0, 1)
    assert not gain.significant
    assert (gain.first.agreement, gain.first.kl) == (1, 0)
    low, high = comparison.intervals["twin"].agreement
    assert (low, high) == pytest.approx((0.025 ** (1 / 400), 1))  # Clopper and Pearson's
    assert "the gain of twin is not significant" in gains_in_words(comparison)


def test_the_intervals_of_accuracy_and_agreement_are_those_of_shares_of_the_test_images():
    good, perfect = invented("s", "distilled", 0.7, 0), invented("s", "baseline", 1.0, 2)
    comparison = compared(s=paired(good, perfect, "s"))
    first, second = comparison.students["s"]
    found = {
        0.7: (first.low, first.high),
        first.agreement: comparison.intervals["s"].agreement,
    }
    for share, ends in found.items():
        half = 1.96 * (share * (1 - share) / 400) ** 0.5
        assert ends == pytest.approx((share - half, share + half), abs=0.1 * half)
    exact = scipy.stats.binomtest(400, 400).proportion_ci(0.95, method="exact")
    assert (second.low, second.high) == pytest.approx(tuple(exact))


def test_the_interval_of_a_calibration_error_is_as_wide_as_that_of_resampled_images():
    model, labels, rng = (
        invented("s", "distilled", 0.7, 0),
        LABELS["test"],
        np.random.default_rng(9),
    )
    drawn = (rng.integers(0, len(labels), len(labels)) for _ in range(1000))
    errors = [metrics.calibration_error(model.test[rows], labels[rows]) for rows in drawn]
    half = np.diff(np.quantile(errors, [0.025, 0.975]))[0] / 2
    error = metrics.calibration_error(model.test, labels)
    found = compared(s=paired(model, model, "s")).intervals["s"].ece
    assert found == pytest.approx((error - half, error + half), abs=0.1 * half)


def test_an_int8_file_that_loses_accuracy_has_a_loss_beside_its_float32_file():
    float32, baseline = (invented("s", r, 0.9, i) for i, r in enumerate(("distilled", "baseline")))
    int8 = replace(invented("s", "distilled", 0.8, 2), precision="int8", size_bytes=100)
    comparison = compared(s=(float32, baseline, int8))
    (loss,) = comparison.int8
    assert (loss.first.precision, loss.second.precision) == ("int8", "float32")
    assert loss.gain == pytest.approx(-0.1)
    assert loss.low < -0.1 < loss.high < 0
    (row,) = int8_table(comparison, {}).to_dict("records")
    assert (row["bytes"], row["smaller"]) == ("100", "4.00 x")
    assert row["against float32"] == points(-0.1)
    assert row["95% interval"] == f"{points(loss.low)} to {points(loss.high)}"
    assert row["aims missed"] == "loses more than 0.3 points"


def test_a_large_gain_or_loss_is_reported_as_one():
    good, bad = (invented("s", "distilled", a, i) for i, a in enumerate((0.9, 0.6)))
    comparison = compared(up=paired(good, bad, "up"), down=paired(bad, good, "down"))
    up, down = comparison.gains.values()
    assert up.gain == pytest.approx(0.3)
    assert up.low < 0.3 < up.high
    assert up.p_value < 1e-6
    assert down.gain == pytest.approx(-0.3)
    words = gains_in_words(comparison)
    assert re.search(r"distilled up \(by 30\.00 points, .*\) is more accurate than its base", words)
    assert re.search(
        r"distilled down \(by 30\.00 points, .*\) is less accurate than its base", words
    )


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ((0.01, -0.01, 0.02, 0.01), "not significant"),
        ((0.01, 0, 0.02, 0.01), "not significant"),
        ((0.01, 0.001, 0.02, 0.125), "not significant"),
        ((0.01, 0.001, 0.02, 0.01), "gain"),
        ((-0.01, -0.02, -0.001, 0.01), "loss"),
    ],
)
def test_a_gain_is_significant_only_by_both_interval_and_test(figures, verdict):
    gain, low, high, p_value = figures
    assert Gain(gain=gain, low=low, high=high, p_value=p_value).verdict == verdict


def test_the_summary_describes_the_gains():
    up = Gain(gain=0.04, low=0.01, high=0.07)
    down = Gain(gain=-0.02, low=-0.03, high=-0.01)
    zero = Gain(gain=0, low=-0.01, high=0.01)
    assert describe_gains({"a": up, "b": down, "c": zero, "d": zero}) == (
        "distilled a (by 4.00 points, 1.00 to 7.00) is more accurate than its baseline; "
        "distilled b (by 2.00 points, 1.00 to 3.00) is less accurate than its baseline; "
        "the gains of c and d are not significant"
    )
    assert "1.00 to 7.00) are more accurate than their baselines" in describe_gains(
        {"a": up, "b": up}
    )
    assert describe_gains({"a": zero, "b": zero}) == "no gain is significant"
    assert describe_gains({"a": zero}) == "the gain of a is not significant"


def test_pairs_of_students_are_counted_in_words_that_fit():
    models = {
        n: invented(n, "distilled", a, i)
        for i, (n, a) in enumerate({"a": 0.9, "b": 0.9, "c": 0.6}.items())
    }

    def words(*names: str) -> list[str]:
        return pair_sentences(compared(**{n: paired(models[n], models[n], n) for n in names}))

    assert words("a") == []
    assert words("a", "b") == [
        "The two distilled students do not differ significantly on these images."
    ]
    assert words("a", "c") == ["The two distilled students differ significantly on these images."]
    assert words("a", "b", "c") == [
        "Of 3 pairs of distilled students, 2 differ significantly on these images."
    ]


def test_unequal_budgets_of_student_and_baseline_are_warned_of_and_equal_ones_are_not_mentioned():
    model = invented("s", "distilled", 0.9, 0)
    comparison = compared(**{name: paired(model, model, name) for name in "ab"})
    for equal in ((9, 9), (None, None), (None, 9), (9, None)):
        figures = figures_of(comparison, a=equal)
        assert budget_sentences(figures) == []
        assert "optimiser_steps" not in figures.model_dump(exclude_unset=True)["students"]["a"]
    one = figures_of(comparison, a=(1000, 1))
    assert budget_sentences(one) == [
        "Warning: a made 1,000 optimiser steps distilled and 1 as a baseline. Its gain is not the "
        "effect of the teacher alone."
    ]
    assert gain_sentences(one)[-1].startswith("Warning: a made")
    both = figures_of(comparison, a=(1000, 100), b=(1, 2))
    assert (
        "b made 1 optimiser step distilled and 2 as a baseline. Their" in budget_sentences(both)[0]
    )


def test_of_several_seeds_each_figure_beside_an_interval_is_their_mean():
    def training(role: str, accuracy: float, seed: int) -> Predictions:
        model = invented("s", role, accuracy, seed)
        start = Start(text=SCRATCH, sha256=str(seed), seed=seed)
        return replace(model, start=start, seed=seed or None)

    main, *others = (
        (training("distilled", accuracy, seed), training("baseline", accuracy - 0.1, seed))
        for seed, accuracy in enumerate((0.95, 0.7, 0.8))
    )
    perfect = invented("s", "distilled", 1.0, 9).validation
    others[0] = (replace(others[0][0], validation=perfect), others[0][1])  # no temperature fits
    comparison = compared(s=(*main, *(model for pair in others for model in pair)))
    pairs = comparison.pairs_by_seed("s")
    assert [distilled.ece_scaled is None for distilled, _ in pairs].count(True) == 1
    ece, agreement = (np.mean([getattr(d, of) for d, _ in pairs]) for of in ("ece", "agreement"))
    of_baseline = np.mean([baseline.agreement for _, baseline in pairs])
    figures = figures_of(comparison).students["s"]
    assert (figures.ece, figures.agreement) == pytest.approx((ece, agreement), abs=1e-6)
    assert figures.ece_low < ece < figures.ece_high
    assert figures.ece_scaled is None
    text = " ".join(teacher_sentences(comparison))
    assert f"on {agreement:.2%} of the images, with its baseline on {of_baseline:.2%}." in text
    assert f"the distilled student {ece:.2%}," in text
    assert (
        f"(distilled, mean of 3 seeds {ece:.2%}, 95% interval: " in calibration(comparison)[1].note
    )


def test_seeds_that_do_not_vary_on_a_few_images_make_no_gain_significant():
    """With two test images that every distilled file has wrong and every baseline right."""

    def training(role: str, right: float, seed: int) -> Predictions:
        model = invented("s", role, right, seed)
        start = Start(text=SCRATCH, sha256=str(seed), seed=seed)
        few = {"validation": model.validation[:2], "test": model.test[:2]}
        return replace(model, start=start, seed=seed or None, **few)

    files = [
        training(role, right, seed)
        for seed in (0, 1)
        for role, right in (("distilled", 0.0), ("baseline", 1.0))
    ]
    few = {split: labels[:2] for split, labels in LABELS.items()}
    teacher = replace(TEACHER, validation=TEACHER.validation[:2], test=TEACHER.test[:2])
    corrupted = CorruptionPredictions(few["test"], np.ones((6, 3, 2)), 16, "distilled", "float32")
    robustness = compare_robustness(corrupted, {"s": [corrupted] * 4}, few["test"])
    gain = compare(teacher, {"s": files}, few, NAMES, robustness).gains["s"]
    assert gain.gain == -1
    assert gain.p_value == mcnemar(np.array([False, False]), np.array([True, True])) == 0.5
    assert not gain.significant


def test_seeds_that_agree_with_their_baselines_have_no_gain_whichever_file_is_the_main_one():
    """The main files of a student and its baseline can be of different seeds."""

    def training(role: str, seed: int, *, is_main: bool) -> Predictions:
        model = replace(invented("s", "distilled", (0.9, 0.7)[seed], seed), role=role)
        start = Start(text=SCRATCH, sha256=str(seed), seed=seed)
        return replace(model, start=start, seed=None if is_main else seed)

    files = (
        *(training("distilled", 0, is_main=True), training("baseline", 1, is_main=True)),
        *(training("distilled", 1, is_main=False), training("baseline", 0, is_main=False)),
    )
    gain = compared(s=files).gains["s"]
    assert (gain.gain, gain.low, gain.high, gain.p_value) == (0, 0, 0, 1)


PUBLISHED, FILE = "published weights, new last layer", "models/imported/r20.pth, 12 of 20 layers"
SCRATCH = "from scratch"


def started(**starts: tuple[str, str] | tuple[None, None]) -> Figures:
    """Compare students that are alike but for what they and their baselines started from: `a=(TEXT,
    TEXT)`. A text that ends with `!` has other bytes than without it."""
    model, students = invented("s", "distilled", 0.9, 0), {}
    for name, texts in starts.items():
        both = [t and Start(text=t.removesuffix("!"), sha256=t) for t in texts]
        models = paired(model, model, name)
        students[name] = [replace(m, start=s) for m, s in zip(models, both, strict=True)]
    return figures_of(compared(**students))


def test_students_from_scratch_and_unrecorded_starts_are_not_warned_of():
    scratch = started(a=(SCRATCH, SCRATCH), b=(f"{SCRATCH}!", f"{SCRATCH}!"))
    assert start_sentences(scratch) == []
    assert scratch_sentence(scratch) == ["Every student started from scratch."]
    assert "Start" not in dict(decision_card(scratch, {}).remarks)
    assert scratch.model_dump(exclude_unset=True)["students"]["a"]["start"] == SCRATCH
    assert scratch_sentence(started(a=(SCRATCH, SCRATCH))) == ["a started from scratch."]
    unknown = started(a=(None, None), b=(SCRATCH, None), c=(None, SCRATCH))
    assert start_sentences(unknown) + scratch_sentence(unknown) == []
    written = unknown.model_dump(exclude_unset=True)
    assert "different_starts" not in written
    assert "start" not in written["students"]["a"] | written["decision"]
    assert "baseline_start" not in written["students"]["b"] | written["students"]["c"]


def test_the_start_of_students_of_one_kind_is_said_without_a_warning():
    one = started(a=(PUBLISHED, PUBLISHED), b=(PUBLISHED, PUBLISHED))
    assert start_sentences(one) == [f"Every student started from {PUBLISHED}."]
    assert dict(decision_card(one, {}).remarks)["Start"] == f"{PUBLISHED}."
    assert scratch_sentence(one) == []
    other = "published weights, pretrained last layer"
    two = started(a=(PUBLISHED, PUBLISHED), b=(other, other), c=(PUBLISHED, PUBLISHED))
    assert start_sentences(two) == [f"a and c started from {PUBLISHED}; b started from {other}."]
    assert start_sentences(started(a=(FILE, FILE), b=(None, None))) == [f"a started from {FILE}."]


def test_a_student_and_its_baseline_that_started_differently_are_warned_of_with_the_command():
    one = started(a=(PUBLISHED, SCRATCH), b=(PUBLISHED, PUBLISHED))
    assert start_sentences(one) == [
        f"Warning: a started from {PUBLISHED}, but its baseline from scratch. Its gain is not the "
        "effect of the teacher alone. Run `dvc repro --force --single-item baseline@a student@a`, "
        "which trains them again, then `dvc repro`.",
        f"Every student started from {PUBLISHED}.",
    ]
    written = one.model_dump(exclude_unset=True)["students"]
    assert written["a"]["baseline_start"] == SCRATCH
    assert "baseline_start" not in written["b"]
    assert start_sentences(started(a=(SCRATCH, f"{SCRATCH}!"), b=(SCRATCH, PUBLISHED))) == [
        "Warning: a and its baseline started from scratch, but not with the same values; b started "
        f"from scratch, but its baseline from {PUBLISHED}. Their gains are not the effect of the "
        "teacher alone. Run `dvc repro --force --single-item baseline@a student@a baseline@b "
        "student@b`, which trains them again, then `dvc repro`."
    ]


def test_students_that_started_from_different_kinds_of_weights_are_warned_of_in_one_line():
    texts = {"a": PUBLISHED, "b": SCRATCH, "c": FILE, "d": SCRATCH, "e": None}
    figures = started(**{name: (text, text) for name, text in texts.items()})
    assert start_sentences(figures) == [
        f"Warning: a started from {PUBLISHED}; b and d started from scratch; c started from "
        f"{FILE}. Where two students started differently, their difference is not the effect of "
        "their networks alone. To compare networks, set the same kind of `weights` in each "
        "`students.NAME.network` of params.yaml, then run `dvc repro`."
    ]
    assert scratch_sentence(figures) == []
    kinds = {"published": ["a"], "scratch": ["b", "d"], "file": ["c"]}
    assert figures.model_dump(exclude_unset=True)["different_starts"] == kinds


def test_p_values_of_pairs_of_students_are_adjusted_for_their_number():
    accuracies = {"a": 0.90, "b": 0.90, "c": 0.70}
    models = [invented(*(n, "distilled", a, i)) for i, (n, a) in enumerate(accuracies.items())]
    comparison = compared(**{m.name: paired(m, m, m.name) for m in models})
    pairs = {(p.first.name, p.second.name): p for p in comparison.pairs}
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [p.significant for p in pairs.values()] == [False, True, True]
    raw = [mcnemar(pair.first.correct, pair.second.correct) for pair in pairs.values()]
    adjusted = [pair.p_value for pair in pairs.values()]
    assert adjusted == pytest.approx(holm(raw), rel=1e-9, abs=0)
    assert all(p > 1.9 * alone for p, alone in zip(adjusted[1:], raw[1:], strict=True))


def test_the_pareto_front_holds_the_models_that_no_other_matches():
    costs_and_shares = [(50, 0.9), (20, 0.6), (10, 0.7), (40, 0.8), (30, 0.8)]
    assert pareto_front(costs_and_shares) == [(10, 0.7), (30, 0.8), (50, 0.9)]


def test_the_json_and_the_csv_follow_from_the_predictions(project):
    comparison, table = read("metrics/comparison.json"), pd.read_csv("reports/comparison.csv")
    labels = open_dataset().splits["test"].labels
    assert comparison["test_images"] == len(labels)
    assert list(table["role"]) == ["teacher", "distilled", "baseline"]
    decisions, accuracy = {}, {}
    for (_, row), file in zip(table.iterrows(), FILES, strict=True):
        logits = load_file(ExportOutputs(file.name).predictions)[f"{file.key}.test"]
        decisions[file.role] = logits.argmax(1)
        accuracy[file.role] = (decisions[file.role] == labels).mean()
        measured = read(ModelOutputs(file.role, file.name).metrics)  # by the stage, in PyTorch
        assert row["accuracy"] == accuracy[file.role] == measured["test_accuracy"]
        assert row["top5"] == measured["test_top5_accuracy"]
        assert row["nll"] == pytest.approx(measured["test_nll"], rel=1e-4)
        assert (row["parameters"], row["macs"]) == (measured["parameters"], measured["macs"])
        assert (row["precision"], row["path"]) == ("float32", str(file.path))
        assert row["size_bytes"] == file.path.stat().st_size
    classes = pd.read_csv("reports/class_accuracy.csv")
    assert list(classes["class"]) == ["ant", "bee", "cat"]
    correct = classes["distilled/small"] * classes["test_images"]
    assert correct.sum() / len(labels) == pytest.approx(accuracy["distilled"])
    student = comparison["students"]["small"]
    gain = accuracy["distilled"] - accuracy["baseline"]
    agreement = (decisions["teacher"] == decisions["distilled"]).mean()
    for key, expected in {
        "accuracy": accuracy["distilled"],
        "baseline": accuracy["baseline"],
        "gain": gain,
        "agreement": agreement,
    }.items():
        assert student[key] == pytest.approx(expected, abs=1e-6), key
    assert student["gain_low"] <= student["gain"] <= student["gain_high"]


def test_the_comparison_is_printed_as_a_table_with_interval_and_verdict(project, capsys):
    run_stage("compare")
    printed = capsys.readouterr().out
    assert printed.isascii()  # for any terminal
    card, teacher, table = printed.partition("teacher: test accuracy")
    assert card.startswith("To ship: models/exported/")
    _, head, row = (teacher + table).splitlines()[:3]
    assert "95% interval" in head
    assert re.match(" *small .*(not significant|gain|loss)", row)
    run_stage("compare", "--show")
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("metrics/students/small.json", "student@small"),
        ("predictions/exported/students/small.safetensors", "export@small"),
        ("predictions/exported/teacher.safetensors", "export_teacher"),
        ("models/exported/baselines/small.json", "export@small"),
        ("models/exported/teacher/teacher.json", "export_teacher"),
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


def test_a_student_that_was_removed_is_not_shown_and_a_new_one_is_named(project, capsys):
    figures = read("metrics/comparison.json")
    figures["students"]["old"] = figures["students"]["small"]
    write_json("metrics/comparison.json", figures)
    students = PARAMS["students"] | {"new": PARAMS["students"]["small"]}
    write_params(project, PARAMS | {"students": students})
    run_stage("compare", "--show")
    printed = capsys.readouterr().out
    assert "old" not in printed
    assert "teacher passes" not in printed  # they are counted of both students
    assert "To ship: not decided, because the last comparison has students that par" in printed
    assert "not compared yet: new. Run `dvc repro`." in printed
    write_params(project, PARAMS | {"students": {"new": PARAMS["students"]["small"]}})
    with pytest.raises(UserError, match=r"compares small, old; expected new, the students of par"):
        run_stage("compare", "--show")


def test_a_damaged_comparison_is_not_shown(project):
    write_json("metrics/comparison.json", read("metrics/comparison.json") | {"test_images": "all"})
    with pytest.raises(UserError, match="comparison.json: test_images` is 'all'; expected a valid"):
        run_stage("compare", "--show")


def test_predictions_that_are_not_finite_or_for_other_images_are_refused(project):
    logits, key = load_file(STUDENTS), "distilled.float32.test"
    save_file(logits | {key: logits[key][1:]}, STUDENTS)
    expected = rf"{key} float32 \[11, 3\].*; expected .*{key} float32 \[12, 3\]"
    with pytest.raises(UserError, match=expected):
        run_stage("compare")
    logits[key][3, 1] = np.nan
    save_file(logits, STUDENTS)
    with pytest.raises(UserError, match=f"logits for {key} that are not finite"):
        run_stage("compare")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.role)
def test_a_file_of_a_network_that_was_trained_with_other_parameters_is_refused(project, file):
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    key = "teacher" if file.role == "teacher" else "training"
    card, stage = read(file.card), ModelOutputs(file.role, file.name).stage
    values = PARAMS[key]
    write_json(file.card, card | {"training": {key: values}})
    run_stage("compare")
    changed = values | {"network": "resnet14"} if file.role == "teacher" else values | {"epochs": 9}
    write_json(file.card, card | {"training": {key: changed}})
    with pytest.raises(UserError, match=rf"`{file.card}` was made when `params.yaml: {key}`") as no:
        run_stage("compare")
    assert f"Run `dvc repro --force --single-item {stage}`, then `dvc repro`" in str(no.value)


def test_a_store_of_other_images_is_refused(project):
    index = read("data/soft_targets/store.json")
    write_json("data/soft_targets/store.json", index | {"dataset_fingerprint": "0" * 64})
    with pytest.raises(UserError, match=r"for dataset 0{12}…, but data/prepared is \w{12}…"):
        run_stage("compare")
    del index["teacher_fingerprint"]
    write_json("data/soft_targets/store.json", index)
    with pytest.raises(UserError, match="store.json: teacher_fingerprint` is missing"):
        run_stage("compare")


def test_a_teacher_that_is_never_correct_is_refused_with_a_hint(project):
    logits = load_file(TEACHERS)
    labels = open_dataset().splits["test"].labels
    test = logits["teacher.float32.test"]
    test[:] = 0
    test[np.arange(len(labels)), (labels + 1) % 3] = 1
    save_file(logits, TEACHERS)
    with pytest.raises(UserError, match="the order of the classes"):
        run_stage("compare")


def test_equal_inputs_give_equal_bytes_and_results_of_a_removed_student_are_left_out(
    project, capsys
):
    outputs = [*Path("reports").iterdir(), *Path("metrics").glob("*.*")]
    before = {path: path.read_bytes() for path in outputs}
    Path("metrics/students/old.json").write_text("{}")
    capsys.readouterr()
    run_stage("compare")
    assert {path: path.read_bytes() for path in outputs} == before
    line = "left out, because params.yaml no longer defines them: old. "
    assert line in capsys.readouterr().out
    tables = {f"{name}.csv" for name in ("class_accuracy", "comparison", "confusion")}
    reports = {*tables, "training_curves.csv", "comparison.md", "index.html"}
    assert {path.name for path in Path("reports").iterdir()} == reports


def test_the_kept_epoch_is_drawn_where_the_training_kept_it(project):
    """Not at the first best accuracy of the history, which training need not have kept."""
    path = Path("metrics/history/students/small.csv")
    history = pd.read_csv(path).assign(validation_accuracy=[0.75, 0.5], kept=[False, True])
    history.to_csv(path, index=False)
    metrics = Path("metrics/students/small.json")
    write_json(metrics, read(str(metrics)) | {"kept_epoch": 2})
    run_stage("compare")
    page = Path("reports/index.html").read_text("utf-8")
    (chart,) = re.findall(r'aria-label="Validation accuracy of small".*?</svg>', page, re.DOTALL)
    assert re.findall(r"<title>(distilled.*?)</title>", chart) == ["distilled, epoch 2: 50%"]
    baseline = read("metrics/baselines/small.json")["kept_epoch"]
    assert f"Kept epoch: distilled 2 of 2, baseline {baseline} of 2" in page
    curves = pd.read_csv("reports/training_curves.csv")
    kept = curves[curves["kept"]].set_index("role")["epoch"]
    assert kept.to_dict() == {"distilled": 2, "baseline": baseline, "teacher": 6}


def test_a_kept_epoch_that_is_not_the_historys_is_refused(project):
    write_json(
        "metrics/students/small.json", read("metrics/students/small.json") | {"kept_epoch": 9}
    )
    with pytest.raises(UserError, match=r"small.csv` says that epoch \d was kept, but .* epoch 9;"):
        run_stage("compare")


def test_unequal_budgets_and_starts_are_warned_of_in_console_and_report(project, capsys):
    for kind, steps in (("students", 40), ("baselines", 4)):
        path = f"metrics/{kind}/small.json"
        write_json(path, read(path) | {"optimiser_steps": steps})
    for file, text in zip(FILES[1:], (PUBLISHED, "from scratch"), strict=True):
        write_json(file.card, read(file.card) | {"start": {"text": text, "sha256": file.role}})
    capsys.readouterr()
    run_stage("compare")
    run_stage("compare", "--show")
    text = capsys.readouterr().out
    for warning in (
        "Warning: small made 40 optimiser steps distilled and 4 as a baseline.",
        f"Warning: small started from {PUBLISHED}, but its baseline from scratch. Its gain is not",
    ):
        assert text.count(warning) == 2
        for name in ("index.html", "comparison.md"):
            assert warning in (Path("reports") / name).read_text("utf-8")
    student = read("metrics/comparison.json")["students"]["small"]
    assert (student["start"], student["baseline_start"]) == (PUBLISHED, "from scratch")
