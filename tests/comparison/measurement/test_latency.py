"""Networks are timed in turn, on real forward passes; measured times change no other output.

No test here asserts a measured time, or a ratio of measured times.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PARAMS, run_stage, write_params

from pipeline.comparison.measurement import latency
from pipeline.comparison.measurement.latency import (
    SPEED_FILE,
    Speeds,
    median_interval,
    network_speed,
    time_interleaved,
)
from pipeline.comparison.report.costs import machine_label
from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, write_json
from pipeline.runtime.outputs import TEACHER, ModelOutputs
from pipeline.stages import speed


def test_the_interval_of_a_median_ends_at_the_order_statistics_of_the_binomial_table():
    assert median_interval(np.arange(20, 0, -1)) == (10.5, 6, 15)  # sign test: 5 of 20, p = 0.041
    assert median_interval(range(1, 7)) == (3.5, 1, 6)  # 2 / 64 = 0.031 outside
    assert median_interval([3, 1, 2]) == (2, 1, 3)
    assert median_interval([7]) == (7, 7, 7)


def test_the_figures_follow_from_the_times():
    latencies = np.full((6, 2), 0.004)
    latencies[0, 0] = 0.008  # one of 12 calls
    batches = np.array([0.1, 0.2, 0.3])
    slower = 0.004 * np.arange(1, 7)[:, None].repeat(2, 1)  # 1, 2, ... 6 times, but for one call
    figures = network_speed(latencies, batches, 64, slower)
    assert figures.latency_ms == 4
    assert figures.latency_p95_ms == float(f"{4 + 4 * (0.95 * 11 - 10):.4g}")  # the last but one
    assert figures.images_per_second == 320
    assert (figures.speedup_low, figures.speedup_high) == (0.6667, 6)  # 4 / 6 in the first round
    assert figures.speedup == 3.5
    assert network_speed(latencies, batches, 64).speedup is None


def test_every_network_is_timed_in_every_round_and_each_round_starts_with_another():
    calls = []
    tasks = [lambda name=name: calls.append(name) for name in "abc"]
    rounds = latency.ROUNDS
    times = time_interleaved(tasks, calls=2, min_rounds=rounds, max_seconds=0)
    assert times.shape == (3, rounds, 2)
    assert (times >= 0).all()
    order = "".join(calls)
    assert order.startswith("abc" + "aaabbbccc" + "bbbcccaaa" + "cccaaabbb")
    assert len(order) == 3 + 3 * 3 * rounds
    calls.clear()
    few = time_interleaved(tasks, calls=1, min_rounds=3, max_seconds=0)
    assert few.shape == (3, 3, 1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    unhurried = time_interleaved(tasks, calls=1, min_rounds=3, max_seconds=1e9)
    assert unhurried.shape == (3, rounds, 1)


def test_a_latency_is_of_100_calls_and_of_enough_rounds_for_an_interval():
    assert latency.ROUNDS * latency.CALLS >= 100
    rounds = latency.SINGLE_IMAGE["min_rounds"]
    assert 2 / 2**rounds <= 0.05 < 2 / 2 ** (rounds - 1)  # outside all values; of one round fewer


def test_the_timed_forward_pass_gives_the_networks_logits(project):
    timed = speed.load_network(ModelOutputs("distilled", "small"))
    views = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(timed.forward(views), predict(timed.network, timed.spec, views))


def test_the_teacher_and_every_student_have_figures_on_every_device(finished_project):
    content = json.loads((finished_project / SPEED_FILE).read_text("utf-8"))
    assert list(content) == [device.type for device in speed.devices()]
    for device in Speeds.model_validate(content).devices.values():
        assert device.batch_size == latency.BATCH_SIZE
        assert device.torch == torch.__version__
        assert list(device.students) == ["small"]
        student = device.students["small"]
        assert device.teacher.speedup is None
        assert student.speedup_low <= student.speedup <= student.speedup_high
        for figures in (device.teacher, student):
            assert figures.latency_ms <= figures.latency_p95_ms
    assert content["cpu"]["threads"] == torch.get_num_threads()
    for figure in content["cpu"]["students"]["small"].values():
        assert figure == float(f"{figure:.4g}")


def test_exactly_the_students_of_the_parameters_are_timed(project, capsys):
    students = PARAMS["students"]
    write_params(project, PARAMS | {"students": students | {"teacher": students["small"]}})
    shutil.copytree("models/students/small", "models/students/teacher")  # a student of that name
    run_stage("speed")
    speeds = json.loads(SPEED_FILE.read_text("utf-8"))["cpu"]
    assert list(speeds["students"]) == ["small", "teacher"]
    assert "speedup" in speeds["students"]["teacher"]
    assert "speedup" not in speeds["teacher"]
    assert "small: " in capsys.readouterr().out


def test_a_teacher_of_imported_logits_has_no_speed_and_no_robustness(project):
    source = checkpoint.LogitSource(
        family="logits",
        network="mine",
        class_names=open_dataset().class_names,
        path="mine.npz",
        contents_sha256=64 * "0",
    )
    checkpoint.save_source(TEACHER.model, source)
    for stage, *arguments in (("speed",), ("robustness", "--teacher"), ("compare",)):
        run_stage(stage, *arguments)
    speeds = read_json(SPEED_FILE, produced_by="-")["cpu"]
    assert "teacher" not in speeds
    assert "speedup" not in speeds["students"]["small"]
    figures = read_json("metrics/comparison.json", produced_by="-")
    assert "robust_accuracy" not in figures["teacher"]
    assert "robust_accuracy" in figures["students"]["small"]
    robust = pd.read_csv("metrics/comparison.csv")["robust_accuracy"]
    assert robust.isna().tolist() == [True, False, False]
    page = Path("reports/index.html").read_text("utf-8")
    drawing = page.partition('aria-label="Accuracy against latency on the CPU"')[2]
    assert 'class="teacher"' not in drawing.partition("</svg>")[0]
    assert "time in the teacher" not in page


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
    for device in content.values():
        device |= {"name": "a machine of another kind", "cores": 78, "threads": 77}
        for figures in (device["teacher"], *device["students"].values()):
            figures |= {name: 3.25 * value for name, value in figures.items()}
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
    assert timed.torch == torch.__version__.partition("+")[0]
    for text in report_texts():
        assert expected in text
        assert "elsewhere" not in text


@pytest.mark.parametrize(
    "other",
    [{"name": "AMD EPYC 9999"}, {"cores": 999}, {"system": "Darwin arm64"}, {"torch": "1.0"}],
)
def test_times_of_another_machine_are_not_shown_as_measured_where_the_report_is_written(
    project, other
):
    """A fresh clone has such a file from Git, and DVC does not run `speed`."""
    content = json.loads(SPEED_FILE.read_text("utf-8"))
    content["cpu"] |= other
    write_json(SPEED_FILE, content)
    run_stage("compare")
    timed = Speeds.model_validate(content).machine
    here = machine_label(latency.this_machine())
    for text in report_texts():
        assert f"measured elsewhere, on {machine_label(timed)}; this report was written" in text
        assert f"on {here}. To measure there, run `{latency.MEASURE_AGAIN}` and" in text


def test_an_onnx_teacher_is_said_to_be_timed_in_onnxruntime(project):
    content = json.loads(SPEED_FILE.read_text("utf-8"))
    content["cpu"]["teacher"] |= {"runtime": "onnxruntime"}
    write_json(SPEED_FILE, content)
    run_stage("compare")
    for text in report_texts():
        assert "teacher (onnxruntime) " in text


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
        (lambda cpu: cpu["students"].pop("small"), "has no figures of small"),
        (lambda cpu: cpu.pop("torch"), "speed.json: cpu.torch` is missing"),
        (lambda cpu: cpu.pop("system"), "speed.json: cpu.system` is missing"),
        (lambda cpu: cpu.pop("cores"), "cpu.cores is missing"),
        (lambda cpu: cpu["students"]["small"].pop("speedup_low"), "belong together"),
    ],
)
def test_a_damaged_speed_file_is_refused(project, edit, message):
    content = json.loads(SPEED_FILE.read_text("utf-8"))
    edit(content["cpu"])
    write_json(SPEED_FILE, content)
    with pytest.raises(UserError, match=message) as refusal:
        run_stage("compare")
    assert re.search("[Rr]un `dvc repro (--force --single-item )?speed`", str(refusal.value))
