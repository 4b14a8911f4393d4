"""The benchmarks run, and their last line is JSON. Measured values are never asserted."""

import importlib
import io
import json
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_images
from import_closure import ROOT
from PIL import Image

from benchmarks import encodings, epoch, loops, many_files, parts
from benchmarks.loops import RESNET20, Loop
from pipeline.distillation.losses import kd
from pipeline.runtime.errors import UserError
from pipeline.store.format.encodings import decode, encode


def summary(name: str, monkeypatch, capsys, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    importlib.import_module(f"benchmarks.{name}").main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_reading_runs(monkeypatch, capsys):
    arguments = ("--samples", "600", "--files", "20", "--pairs", "3")
    found = summary("reading", monkeypatch, capsys, *arguments)
    assert {"numpy_in_memory", "h5py", "top_k_rows_per_second"} < found.keys()


def test_encodings_run(project, monkeypatch, capsys):
    found = summary("encodings", monkeypatch, capsys, "--rows", "60")
    assert "dense" in found["store"]
    assert {"top_k 10, spread", "top_k 10, bucket", "TinyViT 10"} < found["synthetic"].keys()


def test_decoding_runs(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "photographs", per_class=4)
    found = summary("decoding", monkeypatch, capsys, str(tmp_path / "photographs"), "--pairs", "2")
    assert {"original", "quality 90, 256"} < found.keys()
    assert found["original"]["images"] == 8


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


CPU = torch.device("cpu")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda p: p.stem)
def test_every_benchmark_can_be_imported(path):
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def small_loop(soft_targets) -> Loop:
    dataset = loops.noise(40, 16, 3)
    setup = loops.cached(loops.training_views(dataset, CPU), soft_targets, CPU)
    return Loop("cifar_resnet", "resnet8", dataset, setup, 16, CPU)


def test_a_loop_takes_the_requested_number_of_steps():
    asked = []

    def soft_targets(view, samples):
        asked.append(samples)
        return np.zeros((len(samples), 3), np.float16), None

    loop, counts = small_loop(soft_targets), []
    for steps in (1, 3, 2):
        loop.run(steps)
        counts.append(len(asked))
    assert counts == [1, 4, 6]
    assert [len(samples) for samples in asked] == [16, 16, 8] * 2


def test_a_live_teacher_gives_the_logits_of_the_views_of_its_step():
    dataset = loops.noise(32, 16, 3)
    views = loops.training_views(dataset, CPU)
    teacher = loops.Teacher("cifar_resnet", "resnet8", dataset, CPU)
    order = [np.arange(16), np.arange(16, 32)]
    live = loops.LiveTeacher(views, teacher)
    for batch in live.batches(loops.VIEW, order):
        logits, kept = live.soft_targets(loops.VIEW, batch.samples)
        assert np.array_equal(logits, teacher.logits(batch.pixels).numpy())
        assert kept is None


def test_step_runs(monkeypatch, capsys, tmp_path):
    arguments = ("--pairs", "2", "--steps", "1", "--samples", "256")
    none = ("--photographs", str(tmp_path / "none.tar"))
    found = summary("step", monkeypatch, capsys, *arguments, *none)
    assert {"cached over supervised", "online over cached"} < found["resnet20"].keys()
    assert set(found["resnet20"]["ms"]) == {"teacher", "supervised", "cached", "online"}
    assert "mobilenet_v3_small" not in found


def test_step_takes_photographs_of_any_size_and_mode(tmp_path):
    for name, mode, size in (("a.jpg", "L", (40, 30)), ("b.png", "RGBA", (20, 50))):
        Image.new(mode, size).save(tmp_path / name)
    dataset = loops.photographs(tmp_path, 5, 24, 1000)
    assert dataset.splits["train"].images.shape == (5, 3, 24, 24)


def write_cifar(path, count: int) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for number in range(count):
            png = parts.encode_png(np.full((3, 32, 32), number, np.uint8))
            member = tarfile.TarInfo(f"train/{number % 4}/{number:05d}.png")
            member.size = len(png)
            archive.addfile(member, io.BytesIO(png))


def test_many_files_runs(monkeypatch, capsys):
    monkeypatch.setattr(many_files, "CLASSES", 3)
    found = summary("many_files", monkeypatch, capsys, "--counts", "60", "90")
    for kind in ("tar", "folder"):
        assert [row["index_bytes_per_image"] > 40 for row in found[kind]] == [True, True]
        assert found[f"{kind}_growth"]["cpu_seconds_per_1000"] > 0


def test_epoch_runs(monkeypatch, capsys, tmp_path):
    pytest.importorskip("torchdistill", reason="torchdistill is not installed")
    write_cifar(tmp_path / "cifar.tar.gz", 128)
    arguments = (str(tmp_path / "cifar.tar.gz"), "--pairs", "1", "--steps", "2", "--workers", "0")
    found = summary("epoch", monkeypatch, capsys, *arguments)
    assert found["torchdistill"].startswith("1.1.")
    assert "torchdistill without teacher" in found["times_as_fast_as"]


def test_epoch_gives_both_sides_the_same_images(tmp_path):
    write_cifar(tmp_path / "cifar.tar.gz", 140)
    dataset = epoch.cifar100(tmp_path / "cifar.tar.gz", 132)
    images, split = epoch.PilImages(dataset, np.asarray), dataset.splits["train"]
    assert len(images) == len(split) == 132
    for index in (0, 65):
        pixels, label = images[index]
        assert np.array_equal(pixels.transpose(2, 0, 1), split.images[index])
        assert label == split.labels[index] == index % 4


def test_epoch_names_a_missing_package_or_archive(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchdistill", None)
    with pytest.raises(UserError, match=r"torchdistill cannot be imported .*pip install"):
        epoch.torchdistill_slices(loops.noise(4, 32, 3), 1, 0, CPU)
    write_cifar(tmp_path / "cifar.tar.gz", 3)
    with pytest.raises(UserError, match=r"has 3 images below train/<class>/; expected CIFAR-100"):
        epoch.cifar100(tmp_path / "cifar.tar.gz", 100)


def test_the_parts_of_a_step_are_measured(capsys):
    case = replace(RESNET20, student="resnet8", batch_size=16)
    dataset = loops.noise(40, 16, 12)
    encoded = [parts.encode_png(image) for image in dataset.splits["train"].images]
    found = parts.measure_parts(case, dataset, encoded, 2)
    assert {"view", "target, dense", "target, top_k", "forward", "backward"} < found.keys()
    assert "what binds: " in capsys.readouterr().out


def test_a_cold_start_is_measured_part_by_part(project):
    output = parts.run_module(project, "benchmarks.cold_start", "small", str(time.monotonic()))
    found = json.loads(output.splitlines()[-1])
    seconds = found["seconds"]
    assert {"import torch", "verify the store", "make the optimiser", "first step"} < seconds.keys()
    named = sum(value for name, value in seconds.items() if name != "in all")
    assert named == pytest.approx(seconds["in all"])
    assert found["peak_bytes"] > 2**26


@pytest.mark.slow
def test_parts_runs(monkeypatch, capsys, tmp_path):
    for number in range(20):
        Image.new("RGB", (300, 250), (number, 0, 0)).save(tmp_path / f"{number:02d}.jpg")
    arguments = ("--pairs", "1", "--starts", "1", "--samples", "300")
    found = summary("parts", monkeypatch, capsys, *arguments, "--photographs", str(tmp_path))
    for case in ("resnet20", "mobilenet_v3_small"):
        assert found[case]["cold_start"]["seconds"]["in all"] > 0
