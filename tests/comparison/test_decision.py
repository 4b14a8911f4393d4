"""The comparison chooses the file to ship by its rule, on constructed cases.

A network is wrong on the first `wrong` of 400 images. So two networks differ on the images that one
of them gets wrong alone: five such images are not significant, six are.
"""

import html
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import run_stage
from import_closure import ROOT

from pipeline.comparison import decision as decision_rule
from pipeline.comparison.compare import ModelMetrics
from pipeline.comparison.decision import Decision, decide
from pipeline.comparison.figures import (
    Figures,
    StudentFigures,
    TeacherFigures,
    decision_figures,
)
from pipeline.comparison.measurement import statistics
from pipeline.comparison.measurement.latency import EngineSpeed, FileSpeed, Ratio
from pipeline.comparison.measurement.statistics import Gain, PairedDifference
from pipeline.comparison.report.decision_card import DecisionCard, decision_card
from pipeline.comparison.report.markdown import decision_text
from pipeline.runtime.outputs import ExportedFile

IMAGES = 400


def model(
    name: str,
    role: str,
    wrong: int,
    size: int = 1000,
    precision: str = "float32",
    *,
    shift: int = 0,
    has_file: bool = True,
) -> ModelMetrics:
    """A network that is wrong on `wrong` images, from image `shift`."""
    correct = np.ones(IMAGES, bool)
    correct[shift : shift + wrong] = False
    accuracy = float(correct.mean())
    known = {"name": name, "role": role, "precision": precision, "correct": correct}
    known |= {"accuracy": accuracy, "low": accuracy - 0.02, "high": min(1, accuracy + 0.02)}
    if has_file:
        known |= {"path": str(ExportedFile(role, name, precision).path), "size_bytes": size}
    return ModelMetrics(**dict.fromkeys(f.name for f in fields(ModelMetrics)) | known)


def pair(name: str, distilled: int, baseline: int, size: int = 1000, *args) -> list[ModelMetrics]:
    return [
        model(name, role, wrong, size, *args)
        for role, wrong in (("distilled", distilled), ("baseline", baseline))
    ]


TEACHER = model("teacher", "teacher", 0, 50_000)


def decided(*models: ModelMetrics, teacher: ModelMetrics = TEACHER) -> Decision | None:
    everyone = [teacher, *models]
    means = statistics.bootstrap_means(np.stack([m.correct for m in everyone], 1), resamples=500)

    def difference(i: int, j: int) -> PairedDifference[ModelMetrics]:
        first, second = everyone[i], everyone[j]
        low, high = statistics.interval(means[:, i] - means[:, j])
        gain = (int(first.correct.sum()) - int(second.correct.sum())) / IMAGES
        p_value = statistics.mcnemar(first.correct, second.correct)
        return PairedDifference(
            gain=gain, low=float(low), high=float(high), p_value=p_value, first=first, second=second
        )

    return decide(everyone, difference)


def key(file: ModelMetrics | PairedDifference[ModelMetrics] | None) -> str | None:
    """`small, distilled, int8`"""
    if isinstance(file, PairedDifference):
        file = file.first
    return file and f"{file.name}, {file.role}, {file.precision}"


def card_of(decision: Decision | None, teacher: ModelMetrics = TEACHER) -> DecisionCard:
    return decision_card(figures_of(decision, teacher), {})


def figures_of(decision: Decision | None, teacher: ModelMetrics = TEACHER) -> Figures:
    of_teacher = dict.fromkeys(TeacherFigures.model_fields, 0) | {"accuracy": teacher.accuracy}
    return Figures(
        test_images=IMAGES,
        decision=decision and decision_figures(decision),
        teacher=TeacherFigures(**of_teacher | {"ece_scaled": None, "robust_accuracy": 0.5}),
        students={} if decision is None else {decision.file.name: student_figures(decision.gain)},
    )


def student_figures(gain: Gain | None) -> StudentFigures:
    """Figures of a student that has this gain."""
    required = (name for name, of in StudentFigures.model_fields.items() if of.is_required())
    known = (
        {} if gain is None else {"gain": gain.gain, "gain_low": gain.low, "gain_high": gain.high}
    )
    return StudentFigures(**dict.fromkeys(required, 0) | known)


def text_of(decision: Decision | None) -> str:
    return "\n".join(card_of(decision).lines).replace("\N{MINUS SIGN}", "-")


def test_a_file_that_is_the_most_accurate_and_the_smallest_is_chosen():
    decision = decided(*pair("big", 30, 40, 5000), *pair("small", 2, 20, 1000))
    assert key(decision.file) == "small, distilled, float32"
    assert (decision.reason, decision.training) == ("most_accurate_and_smallest", "better")
    assert key(decision.runner_up) == "big, distilled, float32"
    text = text_of(decision)
    assert "most accurate file of the students and baselines, and none is smaller by m" in text
    assert "Warning" not in text


def test_the_smallest_file_is_not_chosen_if_it_is_significantly_less_accurate():
    decision = decided(*pair("big", 2, 20, 5000), *pair("small", 8, 20, 1000))
    assert key(decision.file) == "big, distilled, float32"
    assert decision.reason == "most_accurate"
    assert "Every one that is smaller by more than 1 % is significantly less accurate." in text_of(
        decision
    )


def test_the_smallest_file_is_chosen_if_it_is_not_significantly_less_accurate():
    decision = decided(*pair("big", 2, 20, 5000), *pair("small", 7, 20, 1000))
    assert key(decision.file) == "small, distilled, float32"
    assert decision.reason == "smallest_not_worse"
    assert (key(decision.to_best.second), decision.to_best.gain) == (
        "big, distilled, float32",
        -0.0125,
    )
    assert (
        "It is the smallest file that is not significantly less accurate than the best one (big, "
        "distilled, float32, 99.50%). The difference is -1.25 points (" in text_of(decision)
    )


@pytest.mark.parametrize(("distilled", "baseline"), [(4, 4), (5, 4), (4, 5), (5, 0)])
def test_of_trainings_that_cannot_be_told_apart_the_distilled_one_is_chosen(distilled, baseline):
    for sizes in ((1000, 1000), (1003, 1000), (1000, 1003)):  # names in the metadata
        decision = decided(
            model("s", "distilled", distilled, sizes[0]), model("s", "baseline", baseline, sizes[1])
        )
        assert key(decision.file) == "s, distilled, float32"
        assert decision.training == "indistinguishable"
        assert "does not differ significantly from its baseline, so" in text_of(decision)


def test_a_significantly_better_baseline_is_chosen_and_the_card_warns():
    decision = decided(*pair("s", 20, 4))
    assert key(decision.file) == "s, baseline, float32"
    assert decision.training == "better"
    figures = decision_figures(decision)
    assert figures.path == "models/exported/baselines/s.onnx"
    assert (figures.baseline_better, figures.gain.difference) == (True, -0.04)
    assert (
        "Warning: Distillation made s significantly less accurate. Trained without the teacher, it "
        "is better by 4.00 points (" in text_of(decision)
    )


def test_the_card_blames_distillation_only_if_the_seeds_do():
    figures = figures_of(decided(*pair("s", 20, 4)))
    over_seeds = student_figures(Gain(gain=0.03, low=-0.02, high=0.08))
    card = decision_card(figures.model_copy(update={"students": {"s": over_seeds}}), {})
    assert [text for title, text in card.remarks if title == "Warning"] == [
        "The distilled file is significantly less accurate than its baseline: by 4.00 points (2.25 "
        "to 6.13)."
    ]


def test_a_gain_over_a_baseline_without_quantisation_aware_training_is_warned_of():
    files = [*pair("a", 4, 40), *pair("a", 4, 40, 400, "int8")]
    assert "trained on" not in text_of(decided(*files))
    trained = replace(files[2], int8_trained=True)
    decision = decided(*files[:2], trained, files[3])
    assert key(decision.file) == "a, distilled, int8"
    assert figures_of(decision).decision.unequal_training
    assert (
        "The distilled int8 file had quantisation-aware training (`export.int8_training`), and its "
        "baseline had none: their difference is not the effect of the teacher alone."
    ) in text_of(decision)


def test_of_two_eligible_trainings_the_significantly_better_one_is_chosen():
    best = model("big", "distilled", 4, 5000, shift=100)
    decision = decided(best, *pair("small", 11, 5))
    assert (key(decision.file), decision.training) == ("small, baseline, float32", "better")
    decision = decided(best, *pair("small", 5, 11))
    assert (key(decision.file), decision.training) == ("small, distilled, float32", "better")


def test_a_training_that_alone_is_not_significantly_below_the_best_is_chosen():
    """Though its twin is not significantly worse than it."""
    best = pair("big", 0, 30, 5000)
    decision = decided(*best, *pair("small", 7, 5))
    assert (key(decision.file), decision.training) == ("small, baseline, float32", "other_worse")
    assert "The distilled student is significantly less accurate than" in text_of(decision)
    decision = decided(*best, *pair("small", 5, 7))
    assert (key(decision.file), decision.training) == ("small, distilled, float32", "other_worse")
    assert "Its baseline is significantly less accurate than the best" in text_of(decision)


def test_an_int8_file_is_chosen_if_it_is_not_significantly_less_accurate():
    decision = decided(*pair("s", 2, 4, 4000), *pair("s", 5, 9, 1000, "int8"))
    assert key(decision.file) == "s, distilled, int8"
    assert key(decision.runner_up) == "s, distilled, float32"
    assert key(decision.gain) == "s, distilled, int8"  # minus the int8 file of the baseline
    assert key(decision.gain.second) == "s, baseline, int8"
    assert card_of(decision).name == "s, distilled, int8"


def test_what_has_no_file_is_not_chosen_however_accurate_and_small():
    float32 = pair("s", 4, 9, 4000)
    refused = [model("s", r, 0, 1000, "int8", has_file=False) for r in ("distilled", "baseline")]
    for models in (float32, [*float32, *refused]):  # with and without its measured accuracy
        decision = decided(*models)
        assert key(decision.file) == key(decision.to_best.second) == "s, distilled, float32"
        assert decision.runner_up is None
    only_baseline = model("s", "baseline", 4, 1000, "int8")
    for models in ([only_baseline], [refused[0], only_baseline]):
        decision = decided(*float32, *models)
        assert (key(decision.file), decision.training) == ("s, baseline, int8", "other_has_no_file")
        assert "The distilled student has no int8 file." in text_of(decision)


def test_where_nothing_has_a_file_the_card_says_so():
    models = [model("s", role, 4, has_file=False) for role in ("distilled", "baseline")]
    decision = decided(*models)
    assert decision is None
    card = card_of(decision)
    assert card.file == "no file"
    assert card.lines == [
        "Why: No student and no baseline has a file. The cards in models/exported say why."
    ]
    assert decision_text(card).startswith("**To ship: no file**\n\n- Why: No student")


def test_a_file_below_the_teacher_is_warned_of_with_the_numbers():
    for wrong, warned in ((6, True), (5, False)):
        decision = decided(*pair("s", wrong, 40))
        assert decision_figures(decision).below_teacher == warned
        text = text_of(decision)
        assert ("Warning" in text) == warned
        assert "no network" not in text.lower()
        assert f"Against the teacher's 100.00%: -{wrong / 4:.2f} points (" in text
        if warned:
            assert (
                "Warning: This file is significantly less accurate than the teacher: 98.50% "
                "instead of 100.00%. It loses 1.50 points (" in text
            )


def test_a_file_above_the_teacher_is_not_warned_of():
    teacher = model("teacher", "teacher", 40, 50_000)
    decision = decided(*pair("s", 2, 40), teacher=teacher)
    assert not decision_figures(decision).below_teacher
    assert decision.to_teacher.verdict == "gain"


def test_one_network_has_no_runner_up_and_the_card_says_so():
    decision = decided(*pair("s", 2, 9))
    assert (decision.runner_up, decision.trade_off) == (None, None)
    assert "Runner-up: none. No other network has a file." in text_of(decision)


def test_the_runner_up_follows_from_the_same_rule_without_the_chosen_network():
    models = [*pair("a", 2, 9, 9000), *pair("b", 4, 9, 3000), *pair("c", 5, 9, 1000)]
    decision = decided(*models)
    assert key(decision.file) == "c, distilled, float32"
    assert key(decision.runner_up) == "b, distilled, float32"
    assert decision.runner_up.gain == 0.0025  # minus the chosen file
    assert (
        "Runner-up: b, distilled, float32 (models/exported/b.onnx): 99.00%, 3,000 bytes. Its "
        "difference from the file to ship is +0.25 points (" in text_of(decision)
    )


def test_of_files_of_nearly_the_same_size_the_more_accurate_is_chosen():
    """The length of a name in the metadata does not decide between two trainings of one network."""
    for sizes in ((1000, 1000), (1009, 1000), (1000, 1009)):
        decision = decided(*pair("x", 5, 9, sizes[0]), *pair("y", 3, 9, sizes[1]))
        assert key(decision.file) == "y, distilled, float32"
    decision = decided(*pair("x", 5, 9, 1000), *pair("y", 3, 9, 1011))
    assert key(decision.file) == "x, distilled, float32"
    x = [model("x", "distilled", 5, 1000), model("x", "baseline", 9, 1030)]
    decision = decided(*x, *pair("y", 3, 9, 1015))  # the larger of two files is a network's size
    assert key(decision.file) == "y, distilled, float32"
    decision = decided(*pair("x", 3, 9), *pair("y", 3, 9))  # a tie: the first of params.yaml
    assert key(decision.file) == "x, distilled, float32"


def test_of_equally_accurate_files_the_best_is_the_smaller():
    decision = decided(*pair("x", 3, 9, 5000), *pair("y", 3, 9, 1000))
    assert key(decision.file) == key(decision.to_best.second) == "y, distilled, float32"
    assert decision.reason == "most_accurate_and_smallest"


def test_a_much_smaller_file_that_loses_little_is_shown_as_a_trade_off():
    big = pair("big", 0, 20, 4000)
    decision = decided(*big, *pair("small", 11, 6, 1000), *pair("tiny", 7, 20, 500))
    assert key(decision.file) == "big, distilled, float32"
    assert key(decision.trade_off) == "small, baseline, float32"  # loses least
    gain = decision.trade_off
    low, high = -100 * gain.high, -100 * gain.low
    assert (
        "Trade-off: small, baseline, float32 (models/exported/baselines/small.onnx) is 4.0 x "
        f"smaller and loses 1.50 points ({low:.2f} to {high:.2f}). It is significantly less "
        "accurate than the best file." in text_of(decision)
    )


@pytest.mark.parametrize(
    ("wrong", "size", "shown"),
    [(6, 3000, True), (6, 3001, False), (8, 3000, True), (9, 3000, False)],
)
def test_a_trade_off_saves_a_quarter_of_the_bytes_and_loses_at_most_two_points(wrong, size, shown):
    decision = decided(*pair("big", 0, 20, 4000), *pair("small", wrong, 20, size))
    assert key(decision.file) == "big, distilled, float32"
    assert (decision.trade_off is not None) == shown
    assert ("Trade-off" in text_of(decision)) == shown


def test_a_trade_off_that_loses_nothing_against_the_chosen_file_is_said_to_lose_nothing():
    """The chosen file is as likely as not the best one; the smaller one surely is not."""
    decision = decided(
        model("big", "distilled", 5, 9000, shift=100),
        model("chosen", "distilled", 12, 4000),
        model("small", "distilled", 11, 1000, shift=100),
    )
    assert key(decision.file) == "chosen, distilled, float32"
    assert "4.0 x smaller and loses nothing: +0.25 points (" in text_of(decision)


def test_the_latency_is_that_of_the_chosen_file_against_the_teachers():
    def timed(*ratio: float) -> FileSpeed:
        speedup = Ratio(median=ratio[0], low=ratio[1], high=ratio[2]) if ratio else None
        figures = {"latency_ms": 1.5, "latency_p95_ms": 2.0, "images_per_second": 900.0}
        return FileSpeed(**figures, speedup=speedup)

    students = {
        "a": {"float32": timed(2.2, 2.0, 2.4), "int8": timed(4.4, 4.1, 4.6)},
        "b": {"int8": timed(0.8, 0.75, 0.82)},
        "c": {"int8": timed()},  # the teacher has no file
        "d": {"float32": timed(2.2, 2.0, 2.4)},
    }
    one_thread = EngineSpeed(
        engine="onnxruntime 1", device="CPU", threads=1, rounds=9, batch_size=64, students=students
    )
    texts = [
        decision_card(
            figures_of(decided(*pair(name, 2, 9, 1000, "int8"))),
            {"onnxruntime_1_thread": one_thread},
        ).figures["Latency"]
        for name in students
    ]
    assert texts == [
        "4.4 x faster than the teacher (4.10 to 4.60), one image, 1 thread",
        "1.25 x slower than the teacher (1.22 to 1.33), one image, 1 thread",
        "1.50 ms, one image, 1 thread",
        "not measured: only distilled files are timed, and d has none in int8",
    ]


def words(text: str) -> list[str]:
    """Without punctuation and markup."""
    return re.findall(r"[\w.%,/+]+", html.unescape(re.sub(r"<[^>]+>", " ", text)).replace(":", " "))


def test_console_markdown_and_page_show_the_same_card(finished_project, monkeypatch, capsys):
    monkeypatch.chdir(finished_project)
    run_stage("compare", "--show")
    printed = capsys.readouterr().out.partition("teacher: test accuracy")[0]
    assert printed.startswith("To ship: models/exported/")
    markdown = Path("reports/comparison.md").read_text("utf-8")
    shown = markdown.removeprefix("## Comparison").partition("All students:")[0]
    page = Path("reports/index.html").read_text("utf-8")
    card = page.partition('<section class="card decision"')[2].partition("</section>")[0]
    assert "<h1" in page.partition(card)[0]
    assert "<section" not in page.partition('<section class="card decision"')[0]  # it is the first
    assert words(shown) == words(printed) == words(card.partition(">")[2])
    titles = ("Size", "Latency", "Accuracy", "Against the teacher", "Why", "Runner-up")
    assert all(f"  {title}" in printed for title in titles)


def test_the_card_follows_from_the_json_which_has_no_time(finished_project):
    figures = json.loads((finished_project / "metrics/comparison.json").read_text("utf-8"))
    decision = figures["decision"]
    assert decision["path"] in (
        "models/exported/small.onnx",
        "models/exported/baselines/small.onnx",
    )
    assert decision["bytes"] == (finished_project / decision["path"]).stat().st_size
    assert (
        decision["teacher_bytes"]
        == (finished_project / ExportedFile("teacher").path).stat().st_size
    )
    assert decision["to_teacher"]["difference"] == pytest.approx(
        decision["accuracy"] - figures["teacher"]["accuracy"], abs=2e-6
    )
    assert not re.search("latency|speed|seconds|_ms", json.dumps(decision))


def test_the_page_on_comparing_states_the_rule_in_one_sentence():
    text = " ".join((ROOT / "docs/comparing.md").read_text("utf-8").split())
    rule = decision_rule.__doc__.split("\n\n")[1]
    assert " ".join(rule.split()).lower() in text.lower()
