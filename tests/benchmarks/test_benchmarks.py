"""The benchmarks run and write their rows. Measured values are never asserted."""

import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from import_closure import ROOT
from PIL import Image

from benchmarks import encodings, epoch, harness, kept_epoch, loops, many_files, parts
from benchmarks.harness import alternate, median, memory_bytes
from benchmarks.loops import RESNET20, Loop
from pipeline.distillation.losses import kd
from pipeline.runtime.errors import UserError
from pipeline.store.format.encodings import decode, encode
from pipeline.students.loop import TrainingBatch, evaluate, fit
from pipeline.students.params import TrainingParams
from soak.common import png, write_tar

CPU = torch.device("cpu")


def rows_of(name: str, monkeypatch, *arguments: object) -> list[dict]:
    """Run a benchmark's command; return the rows that it writes."""
    module, file = importlib.import_module(f"benchmarks.{name}"), Path("rows.json").resolve()
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--json", str(file)])
    module.main()
    return json.loads(file.read_text("utf-8"))


def test_a_median_has_the_order_statistics_around_it_as_its_interval():
    values = [*range(100, 0, -1)]
    # P(40 <= Binomial(100, 1/2) <= 60) is 0.965; without either end, 0.943.
    assert median(values) == harness.Interval(50.5, 40.0, 61.0)
    assert median([3.0, 1.0]) == harness.Interval(2.0, 1.0, 3.0)
    assert str(median([2.0])) == "2 (2 to 2)"


def test_the_interval_holds_the_median_of_the_distribution_19_times_in_20():
    rng = np.random.default_rng(0)
    found = [median(rng.exponential(size=40)) for _ in range(2000)]
    held = np.mean([interval.low <= np.log(2) <= interval.high for interval in found])
    assert 0.95 <= held <= 0.98  # order statistics are never tighter than asked for


def test_every_side_runs_once_a_round_and_each_is_first_in_turn(monkeypatch):
    clock, calls = iter(range(1000)), []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    sides = {
        "slow": lambda turn: calls.append(("slow", turn, next(clock))),
        "fast": lambda turn: calls.append(("fast", turn)),
    }
    times = alternate(sides, 3, warm_up=1)
    assert [call[:2] for call in calls[2:]] == [
        *(("slow", 0), ("fast", 0), ("fast", 1), ("slow", 1), ("slow", 2), ("fast", 2))
    ]
    assert median(times["slow"] / times["fast"]) == harness.Interval(2.0, 2.0, 2.0)


def test_memory_is_this_process_s():
    before, block = memory_bytes("VmRSS"), np.ones(2**23)
    assert memory_bytes("VmHWM") >= memory_bytes("VmRSS") > before + block.nbytes / 2


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem
)
def test_every_benchmark_can_be_imported(path):
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_reading_runs(folder, monkeypatch):
    rows = rows_of("reading", monkeypatch, "--samples", 600, "--files", 20, "--pairs", 3)
    assert rows[0][""] == "NumPy, an array in memory"
    assert len(rows[0]["speed-up of ours"]) == 3
    assert rows[-1]["ours, rows/s"] > 0


def test_engines_run(project, monkeypatch):
    arguments = ("--rounds", 2, "--engines", "PyTorch", "OpenVINO")
    rows = rows_of("engines", monkeypatch, *arguments)
    sides = {row["1 image, 1 thread"]: row for row in rows if "1 image, 1 thread" in row}
    assert {f"{e}: {n}" for e in ("onnxruntime", "PyTorch") for n in ("teacher", "small")} <= set(
        sides
    )
    assert len(sides["PyTorch: small"]["than the teacher"]) == 3
    assert len(sides["PyTorch: small"]["than the float32 file in onnxruntime"]) == 3
    with_openvino = {row.get("not measured") for row in rows} | {*sides}
    assert {"OpenVINO", "OpenVINO: small"} & with_openvino


def test_encodings_run(project, monkeypatch):
    first = {next(iter(row.values())) for row in rows_of("encodings", monkeypatch, "--rows", 60)}
    assert {"dense", "top_k 10, spread", "top_k 10, bucket", "TinyViT 10"} < first


def test_decoding_runs(folder, monkeypatch):
    write_images(folder / "photographs", per_class=4)
    rows = rows_of("decoding", monkeypatch, folder / "photographs", "--pairs", 2)
    assert [row["kept as"] for row in rows] == ["original"] * 2 + ["quality 90, 256"] * 2


def test_decoding_workers_run(folder, monkeypatch):
    arguments = ("--images", 70, "--pairs", 1, "--workers", 1)
    rows = rows_of("decoding_workers", monkeypatch, *arguments)
    assert [(row["view"], row["batches"]) for row in rows] == [(32, 2), (224, 2)]


def test_int8_runs(exported, monkeypatch, tmp_path):
    monkeypatch.chdir(shutil.copytree(exported, tmp_path / "copy"))
    rows = rows_of("int8", monkeypatch, ".", "--rounds", 2, "--calibration", 8)
    assert [row[""] for row in rows] == ["small, 7 bits", "small, 8 bits"]
    assert rows[0]["x smaller"] > 2.5


@pytest.mark.parametrize("k", [1, 10])
def test_the_benchmarks_kl_equals_that_of_the_losses(k):
    logits, labels = encodings.synthetic(32, 100)
    found = encodings.of_top_k(logits, labels, k)
    for t in encodings.TEMPERATURES:
        decoded, kept = decode(encode(logits, labels, "top_k", k), labels, 100, temperature=t)
        stored, teacher = (torch.from_numpy(np.float64(x)) for x in (decoded, logits))
        for tail, mask in (("spread", None), ("bucket", torch.from_numpy(kept))):
            loss = kd(stored, teacher, temperature=t, kept=mask)
            assert found[tail][t][0] == pytest.approx(loss.item() / t**2, rel=1e-6, abs=1e-12)


def test_a_loop_takes_the_requested_number_of_steps():
    asked = []

    def soft_targets(view, samples):
        asked.append(len(samples))
        return np.zeros((len(samples), 3), np.float16), None

    dataset = loops.noise(40, 16, 3)
    setup = loops.cached(loops.training_views(dataset, CPU), soft_targets, CPU)
    loop = Loop("cifar_resnet", "resnet8", dataset, setup, 16, CPU)
    for steps in (1, 3, 2):
        loop.run(steps)
    assert asked == [16, 16, 8] * 2


def test_a_live_teacher_gives_the_logits_of_the_views_of_its_step():
    dataset = loops.noise(32, 16, 3)
    teacher = loops.Teacher("cifar_resnet", "resnet8", dataset, CPU)
    live = loops.LiveTeacher(loops.training_views(dataset, CPU), teacher)
    for batch in live.batches(loops.VIEW, [np.arange(16), np.arange(16, 32)]):
        assert torch.equal(live.logits(), teacher.logits(batch.pixels))


def test_the_losses_of_cached_and_of_live_logits_are_equal():
    dataset = loops.noise(32, 16, 3)
    views = loops.training_views(dataset, CPU)
    online = loops.online(views, loops.Teacher("cifar_resnet", "resnet8", dataset, CPU))
    (of_views,) = online.views.batches(loops.VIEW, [np.arange(32)])
    rows = online.views.logits()
    cached = loops.cached(views, lambda *_: (rows.numpy(), None), CPU)
    labels = torch.from_numpy(dataset.splits["train"].labels)
    batch = TrainingBatch(1, loops.VIEW, of_views.samples, labels)
    logits = torch.randn(rows.shape)
    assert online.loss(logits, batch) == cached.loss(logits, batch)


@pytest.mark.slow
def test_step_runs_without_photographs(folder, monkeypatch):
    none = ("--photographs", "none.tar")
    rows = rows_of("step", monkeypatch, "--pairs", 2, "--steps", 1, "--samples", 256, *none)
    (case,) = {next(iter(row)) for row in rows}
    assert case == RESNET20.name
    assert {"teacher", "online", "cached over supervised"} < {row[case] for row in rows}


def test_photographs_may_have_any_size_and_mode(tmp_path):
    for name, mode, size in (("a.jpg", "L", (40, 30)), ("b.png", "RGBA", (20, 50))):
        Image.new(mode, size).save(tmp_path / name)
    dataset = loops.photographs(tmp_path, 5, 24, 1000)
    assert dataset.splits["train"].images.shape == (5, 3, 24, 24)


@pytest.mark.slow
def test_many_files_runs(folder, monkeypatch):
    monkeypatch.setattr(many_files, "CLASSES", 3)
    rows = rows_of("many_files", monkeypatch, "--counts", 60, 90)
    assert [row["images"] for row in rows if "images" in row] == [
        *("tar, 60", "tar, 90", "tar, growth", "folder, 60", "folder, 90", "folder, growth")
    ]
    assert all(row["bytes of index"] > 40 for row in rows if row.get("images", "")[-1:] == "0")


def cifar(count: int) -> Path:
    """Write an archive like CIFAR-100's in the current folder."""
    images = (png(np.full((32, 32, 3), number, np.uint8)) for number in range(count))
    names = (f"train/{number % 4}/{number:05d}.png" for number in range(count))
    write_tar(Path("cifar.tar"), zip(names, images, strict=True))
    return Path("cifar.tar")


def test_epoch_runs(folder, monkeypatch):
    pytest.importorskip("torchdistill", reason="torchdistill is not installed")
    options = ("--pairs", 1, "--steps", 2, "--workers", 0)
    rows = rows_of("epoch", monkeypatch, cifar(128), *options)
    assert rows[-1]["speed-up of ours over"] == "the same, by our rule"


def test_epoch_gives_both_sides_the_same_images(folder):
    dataset = epoch.cifar100(cifar(140), 132)
    images, split = epoch.PilImages(dataset, np.asarray), dataset.splits["train"]
    assert len(images) == len(split) == 132
    for index in (0, 65):
        pixels, label = images[index]
        assert np.array_equal(pixels.transpose(2, 0, 1), split.images[index])
        assert label == split.labels[index] == index % 4


def test_epoch_names_a_missing_package_or_archive(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdistill", None)
    with pytest.raises(UserError, match=r"torchdistill cannot be imported .*pip install"):
        epoch.torchdistill_slices(loops.noise(4, 32, 3), 1, 0, CPU)
    with pytest.raises(UserError, match=r"has 3 images below train/<class>/; expected CIFAR-100"):
        epoch.cifar100(cifar(3), 100)


def test_the_parts_of_a_step_are_measured():
    case = replace(RESNET20, student="resnet8", batch_size=16)
    dataset = loops.noise(40, 16, 12)
    encoded = [png(image.transpose(1, 2, 0)) for image in dataset.splits["train"].images]
    *rows, last = parts.measure_parts(case, dataset, encoded, 2)
    names = {row[case.name] for row in rows}
    assert {"view", "target, dense", "target, top_k", "forward", "backward"} < names
    assert last["bottleneck"] in names


@pytest.mark.slow
def test_a_cold_start_is_measured_part_by_part(project):
    found = parts.cold_start(project)
    assert found.pop("peak memory, MiB") > 64
    whole = found.pop("in all, s")
    assert {"import torch, s", "verify the store, s", "first step, s"} < found.keys()
    assert sum(found.values()) == pytest.approx(whole, abs=0.02)


@pytest.mark.slow
def test_kept_epochs_are_those_that_a_training_keeps():
    images, labels = kept_epoch.digits()
    dataset = kept_epoch.split_images(images[:400], labels[:400], 80, 160, seed=3)
    assert [len(split) for split in dataset.splits.values()] == [80, 160, 160]
    recipe = kept_epoch.TRAINING | {"epochs": 6, "batch_size": 32, "schedule": "constant"}
    params = TrainingParams(**recipe | {"learning_rate": 0.02}, seed=3)
    found = kept_epoch.train(dataset, params)
    for rule in kept_epoch.RULES:  # 5, 4 and 6 where this was written
        network, spec = loops.build_on_device("cifar_resnet", "resnet8", dataset, CPU, seed=3)
        data = kept_epoch.training_data(dataset, params)
        by_rule = params.model_copy(update={"keep": rule})
        trained = fit(network, spec, data, kept_epoch.loss, by_rule, CPU)
        network.load_state_dict(trained.kept_state)
        _, metrics = evaluate(network, spec, dataset.splits["test"], CPU)
        assert found[rule] == (trained.kept_epoch, metrics["test_accuracy"])


@pytest.mark.slow
def test_parts_runs(folder, monkeypatch):
    write_images(folder / "photographs", per_class=7, size=280)
    options = ("--pairs", 1, "--starts", 1, "--samples", 300, "--photographs", "photographs")
    rows = rows_of("parts", monkeypatch, *options)
    assert sum("in all, s" in row.values() for row in rows) == 2


def test_near_copies_are_found_among_photographs(monkeypatch, folder):
    write_images(folder / "images", per_class=20, size=48)
    measured, search = rows_of(
        *("near_copies", monkeypatch, "images"),
        *("--images", 30, "--rounds", 1, "--counts", 50),
    )
    assert measured.keys() == {"images", "told", "found", "cost"}
    assert search["training images"] == "50"
