"""Files are timed in turn, on real forward passes; measured times change no other output.

No test here asserts a measured time, or a ratio of measured times.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from conftest import PARAMS, run_stage, write_params

from pipeline.comparison.measurement import latency
from pipeline.comparison.measurement.latency import (
    SPEED_FILE,
    Ratio,
    Speeds,
    faster_or_slower,
    file_speed,
    median_interval,
    time_interleaved,
)
from pipeline.comparison.report.costs import machine_label, speed_of
from pipeline.data.prepared.dataset import open_dataset
from pipeline.data.prepared.image_decoding import available_cores
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, write_json
from pipeline.runtime.outputs import TEACHER, ExportedFile, ModelOutputs
from pipeline.stages import speed

#: Of the images that the files of teacher and student take.
SHAPES = {None: (3, 20, 20), "small": (3, 16, 16)}
ONE_THREAD, ALL_CORES = "onnxruntime_1_thread", "onnxruntime_all_cores"


def test_the_interval_of_a_median_ends_at_the_order_statistics_of_the_binomial_table():
    assert median_interval(np.arange(20, 0, -1)) == (10.5, 6, 15)  # sign test: 5 of 20, p = 0.041
    assert median_interval(range(1, 7)) == (3.5, 1, 6)  # 2 / 64 = 0.031 outside
    assert median_interval([3, 1, 2]) == (2, 1, 3)
    assert median_interval([7]) == (7, 7, 7)


def test_a_ratio_is_said_as_faster_or_slower_and_never_as_a_share():
    said = {
        4.4: "4.4 x faster",
        0.8: "1.25 x slower",
        1 / 4.4: "4.4 x slower",
        1.0: "as fast",
        1.004: "as fast",
        1 / 1.004: "as fast",
        1.006: "1.01 x faster",
        1 / 1.006: "1.01 x slower",
        1.994: "1.99 x faster",
        1.996: "2.0 x faster",
        9.96: "10.0 x faster",
        11.7: "11.7 x faster",  # "12", beside an interval of 11.2 to 11.8, would look wrong
        99.4: "99.4 x faster",
        1234.0: "1,234 x faster",
    }
    assert {ratio: faster_or_slower(ratio) for ratio in said} == said


@pytest.mark.parametrize(
    ("ratio", "text", "beside_the_teacher"),
    [
        (
            (4.4, 4.306, 4.5),
            "4.4 x faster (4.31 to 4.50)",
            "4.4 x faster than the teacher (4.31 to 4.50)",
        ),
        (
            (0.8, 0.75, 0.85),
            "1.25 x slower (1.18 to 1.33)",
            "1.25 x slower than the teacher (1.18 to 1.33)",
        ),
        ((1.0, 1.0, 1.0), "as fast (1.00 to 1.00)", "as fast as the teacher (1.00 to 1.00)"),
        ((1.0, 0.999, 1.001), "as fast (1.00 to 1.00)", "as fast as the teacher (1.00 to 1.00)"),
        (
            (1.03, 0.8, 1.1),
            "1.03 x faster (1.25 x slower to 1.10 x faster)",
            "1.03 x faster than the teacher (1.25 x slower to 1.10 x faster)",
        ),
    ],
)
def test_an_interval_on_both_sides_of_1_is_said_with_both_words(ratio, text, beside_the_teacher):
    found = Ratio(**dict(zip(("median", "low", "high"), ratio, strict=True)))
    assert (str(found), found.than_the_teacher) == (text, beside_the_teacher)


def test_the_figures_follow_from_the_times():
    latencies = np.full((6, 2), 0.004)
    latencies[0, 0] = 0.008  # one of 12 calls
    batches = np.array([0.1, 0.2, 0.3, 0.1, 0.2, 0.3])
    slower = 0.004 * np.arange(1, 7)[:, None].repeat(2, 1)  # 1, 2, ... 6 times, but for one call
    figures = file_speed(latencies, batches, 64, (slower, batches / 2))
    assert figures.latency_ms == 4
    assert figures.latency_p95_ms == float(f"{4 + 4 * (0.95 * 11 - 10):.4g}")  # the last but one
    assert figures.images_per_second == 320
    # 4 / 6 in the first round
    assert figures.speedup == Ratio(median=3.5, low=0.6667, high=6.0)
    assert figures.batch_speedup == Ratio(median=0.5, low=0.5, high=0.5)
    alone = file_speed(latencies, batches, 64)
    assert (alone.speedup, alone.batch_speedup) == (None, None)


def test_every_network_is_timed_in_every_round_and_each_round_starts_with_another():
    calls = []
    tasks = [lambda name=name: calls.append(name) for name in "abc"]
    times = time_interleaved(tasks, rounds=20, calls=2, min_rounds=20, max_seconds=0)
    assert times.shape == (3, 20, 2)
    assert (times >= 0).all()
    order = "".join(calls)
    assert order.startswith("abc" + "aaabbbccc" + "bbbcccaaa" + "cccaaabbb")
    assert len(order) == 3 + 3 * 3 * 20
    calls.clear()
    few = time_interleaved(tasks, rounds=20, calls=1, min_rounds=3, max_seconds=0)
    assert few.shape == (3, 3, 1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    unhurried = time_interleaved(tasks, rounds=20, calls=1, min_rounds=3, max_seconds=1e9)
    assert unhurried.shape == (3, 20, 1)


def test_a_latency_is_of_100_pairs_and_of_enough_rounds_for_an_interval(full_rounds):
    assert full_rounds[0]["rounds"] >= 100
    for arguments in full_rounds:
        rounds = arguments["min_rounds"]
        assert 2 / 2**rounds <= 0.05 < 2 / 2 ** (rounds - 1)  # outside all values; of one fewer


def test_the_timed_forward_passes_give_the_networks_logits(project):
    images = np.random.default_rng(0).integers(256, size=(5, 3, 16, 16), dtype=np.uint8)
    network, spec = checkpoint.load(ModelOutputs("distilled", "small").model, produced_by="-")
    expected = predict(network, spec.input, torch.from_numpy(images))
    teacher, student = speed.open_in_pytorch(["small"], SHAPES, torch.device("cpu"))
    assert {each.name: each.image_shape for each in (teacher, student)} == SHAPES
    assert torch.equal(student.forward(images), expected)
    teacher, student = speed.open_files(speed.files_to_time(["small"]), 1, speed.CPU)
    assert (teacher.name, student.name, student.image_shape) == (None, "small", (3, 16, 16))
    np.testing.assert_allclose(student.forward(images), expected, atol=1e-5)
    assert not np.allclose(teacher.forward(images), expected, atol=1e-5)


def test_pytorch_on_a_device_is_timed_as_the_files_are(project):
    networks = speed.open_in_pytorch(["small"], SHAPES, torch.device("cpu"))
    figures = speed.time_networks(networks, engine="PyTorch", device="a GPU", threads=None)
    assert figures.find("small").speedup.low <= figures.find("small").speedup.high
    assert figures.teacher.speedup is None


def test_the_teacher_and_every_students_files_have_figures_in_every_setting(finished_project):
    content = json.loads((finished_project / SPEED_FILE).read_text("utf-8"))
    speeds, cores = Speeds.model_validate(content), available_cores()
    assert speeds.machine == latency.this_machine()
    threads = {name: measured.threads for name, measured in speeds.settings.items()}
    expected = {ONE_THREAD: 1, ALL_CORES: cores} if cores > 1 else {ONE_THREAD: 1}
    assert {name: count for name, count in threads.items() if count} == expected
    assert ("pytorch_cuda" in threads) == torch.cuda.is_available()
    for measured in speeds.settings.values():
        assert measured.rounds == latency.SINGLE_IMAGE["rounds"]
        assert [label for label, _ in measured.files] == ["teacher", "small"]
        assert measured.teacher.speedup is None
        for ratio in (measured.find("small").speedup, measured.find("small").batch_speedup):
            assert ratio.low <= ratio.median <= ratio.high
        for _, figures in measured.files:
            assert figures.latency_ms <= figures.latency_p95_ms
    assert speeds.settings[ONE_THREAD].engine.startswith("onnxruntime ")
    for name in ("latency_ms", "images_per_second"):
        figure = content[ONE_THREAD]["students"]["small"]["float32"][name]
        assert figure == float(f"{figure:.4g}")


def test_exactly_the_students_of_the_parameters_are_timed_with_their_int8_files(project, capsys):
    students = PARAMS["students"]
    write_params(project, PARAMS | {"students": students | {"other": students["small"]}})
    small = ExportedFile("distilled", "small").path
    int8 = ExportedFile("distilled", "small", "int8").path
    int8.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(small, int8)  # `speed` runs what lies there
    shutil.copy(small, ExportedFile("distilled", "other").path)
    run_stage("speed")
    speeds = Speeds.model_validate_json(SPEED_FILE.read_bytes()).settings
    for measured in (speeds[ONE_THREAD], speeds.get(ALL_CORES, speeds[ONE_THREAD])):
        assert [label for label, _ in measured.files] == [
            "teacher",
            "small",
            "small int8",
            "other",
        ]
        assert measured.teacher.speedup is None
        assert measured.find("other").speedup is not None
    text = speed_of(speeds, "small", "int8")
    assert re.fullmatch(r".* (faster than|slower than|fast as) the teacher \(.* to .*\)", text)
    assert f"  small int8: {speeds[ONE_THREAD].find('small', 'int8').latency_ms:.3g} ms" in (
        out := capsys.readouterr().out
    )
    assert text in out
    assert speed_of(speeds, "other", "int8") == "not measured"


def test_an_absent_file_of_a_student_is_refused_with_the_command_that_writes_it(project):
    ExportedFile("distilled", "small").path.unlink()
    with pytest.raises(
        UserError, match="`models/exported/small.onnx` cannot be read .*dvc repro export"
    ):
        run_stage("speed")


def test_without_a_teachers_file_there_are_times_without_ratios_and_the_reason(project, capsys):
    source = checkpoint.LogitSource(
        family="logits",
        network="mine",
        class_names=open_dataset().class_names,
        path="mine.npz",
        contents_sha256=64 * "0",
    )
    checkpoint.save_source(TEACHER.model, source)
    for stage, *arguments in (
        *(("export", "--teacher"), ("speed",), ("robustness", "--teacher"), ("compare",)),
    ):
        run_stage(stage, *arguments)
    reason = "imported logits, which have no network"
    assert reason in capsys.readouterr().out
    measured = Speeds.model_validate_json(SPEED_FILE.read_bytes()).settings
    for of_setting in measured.values():
        assert of_setting.teacher is None
        assert of_setting.find("small").speedup is None
    assert re.fullmatch(r"[\d.]+ ms", speed_of(measured, "small"))
    figures = read_json("metrics/comparison.json", produced_by="-")
    assert "robust_accuracy" not in figures["teacher"]
    assert "robust_accuracy" in figures["students"]["small"]
    robust = pd.read_csv("reports/comparison.csv")["robust_accuracy"]
    assert robust.isna().tolist() == [True, False, False]
    page = Path("reports/index.html").read_text("utf-8")
    drawing = page.partition('aria-label="Accuracy against latency in one thread"')[2]
    assert 'class="teacher"' not in drawing.partition("</svg>")[0]
    assert "time in the teacher" not in page
    for text in report_texts():
        assert f"There is no ratio to the teacher, which was not timed: it is {reason}." in text


TIMED = {"index.html", "comparison.md"}  # of reports/


def timeless() -> dict[Path, bytes]:
    files = [*Path("metrics").glob("*.*"), *Path("reports").iterdir()]
    return {path: path.read_bytes() for path in files if path.name not in {*TIMED, SPEED_FILE.name}}


def test_measured_times_change_the_report_and_nothing_else_of_the_comparison(project, capsys):
    run_stage("compare")
    before, printed = timeless(), capsys.readouterr().out
    names = ("comparison.json", "comparison.csv", "training_curves.csv", "class_accuracy.csv")
    assert {path.name for path in before} >= set(names)
    content = json.loads(SPEED_FILE.read_text("utf-8"))
    for setting in (ONE_THREAD, ALL_CORES):
        if measured := content.get(setting):
            measured |= {"device": "a machine of another kind", "threads": 77}
            for figures in (measured["teacher"], measured["students"]["small"]["float32"]):
                figures["latency_ms"] *= 3.25
    write_json(SPEED_FILE, content)
    run_stage("compare")
    assert timeless() == before
    assert capsys.readouterr().out == printed
    for name in TIMED:
        assert b"a machine of another kind, 77 threads" in (Path("reports") / name).read_bytes()


def report_texts() -> list[str]:
    pages = [Path("reports/comparison.md"), Path("reports/index.html")]
    return [page.read_text("utf-8").replace("&#39;", "'").replace("\n", " ") for page in pages]


def test_the_report_names_the_machine_that_was_timed(project):
    timed = latency.this_machine()
    expected = f"All times were measured on {machine_label(timed)}."
    assert timed.onnxruntime == onnxruntime.__version__
    for text in report_texts():
        assert expected in text
        assert "elsewhere" not in text


@pytest.mark.parametrize(
    "other",
    [{"cpu": "AMD EPYC 9999"}, {"cores": 999}, {"system": "Darwin arm64", "onnxruntime": "1.0"}],
)
def test_times_of_another_machine_are_not_shown_as_measured_where_the_report_is_written(
    project, other
):
    """A fresh clone has such a file from Git, and DVC does not run `speed`."""
    content = json.loads(SPEED_FILE.read_text("utf-8"))
    content["machine"] |= other
    write_json(SPEED_FILE, content)
    run_stage("compare")
    timed = Speeds.model_validate(content).machine
    here = machine_label(latency.this_machine())
    for text in report_texts():
        assert f"measured elsewhere, on {machine_label(timed)}; this report was written" in text
        assert f"on {here}. To measure there, run `{latency.MEASURE_AGAIN}` and" in text


def test_times_of_another_onnxruntime_are_of_this_machine(project):
    content = json.loads(SPEED_FILE.read_text("utf-8"))
    content["machine"]["onnxruntime"] = "1.0"
    write_json(SPEED_FILE, content)
    run_stage("compare")
    timed, now = Speeds.model_validate(content).machine, onnxruntime.__version__
    for text in report_texts():
        expected = (
            f"All times were measured on {machine_label(timed)}. Now onnxruntime is {now}; to"
        )
        assert expected in text
        assert "elsewhere" not in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(2500.0, "2,500"), (999.6, "1,000"), (431.2, "431"), (4.312, "4.31"), (0.4, "0.400")],
)
def test_large_numbers_have_no_exponent(number, text):
    assert latency.three_digits(number) == text
    assert latency.rate(number) == (f"{number:,.0f}" if number > 10 else text)


def test_the_comparison_counts_the_passes_of_the_store_and_of_the_histories(project):
    index = read_json("data/soft_targets/store.json", produced_by="-")
    cache = read_json("metrics/comparison.json", produced_by="-")["cache"]
    train, validation, test = (index["splits"][n] for n in ("train", "validation", "test"))
    epochs = len(Path("metrics/history/students/small.csv").read_text("utf-8").splitlines()) - 1
    made = PARAMS["views"]["count"] * train + validation + test
    assert cache["teacher_passes"] == made
    assert cache["passes_saved"] == epochs * train - made
    stored = sum(path.stat().st_size for path in Path("data/soft_targets").glob("train_*.h5"))
    per_row = stored / (PARAMS["views"]["count"] * train)
    assert cache["store_bytes"] == pytest.approx(made * per_row, rel=1e-3)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda of: of[ONE_THREAD]["students"].pop("small"), "has no figures of small"),
        (lambda of: of["machine"].pop("cores"), "speed.json: machine.cores` is missing"),
        (lambda of: of.pop(ONE_THREAD), "speed.json: onnxruntime_1_thread` is missing"),
        (
            lambda of: of[ONE_THREAD]["students"]["small"]["float32"]["speedup"].pop("low"),
            "speedup.low` is missing",
        ),
    ],
)
def test_a_damaged_speed_file_is_refused(project, edit, message):
    content = json.loads(SPEED_FILE.read_text("utf-8"))
    edit(content)
    write_json(SPEED_FILE, content)
    with pytest.raises(UserError, match=message) as refusal:
        run_stage("compare")
    assert re.search("[Rr]un `dvc repro (--force --single-item )?speed`", str(refusal.value))
