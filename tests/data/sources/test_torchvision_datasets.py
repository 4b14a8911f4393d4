"""Real datasets: torchvision's, partly unlabelled, imbalanced, with duplicates."""

import gzip
import shutil
import struct
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torchvision
from conftest import (
    PARAMS,
    bytes_of,
    change_params,
    opened,
    prepare,
    run_stage,
    write_images,
    write_params,
)
from PIL import Image

from pipeline.commands import check
from pipeline.commands.store import verify
from pipeline.data.prepared.dataset import open_dataset
from pipeline.data.sources import image_folder
from pipeline.data.sources.torchvision_catalog import SETS
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.students import loop

PREPARED, STORE = Path("data/prepared"), Path("data/soft_targets")
RNG = np.random.default_rng(0)
TRAIN_PIXELS = RNG.integers(0, 256, (60, 28, 28), dtype=np.uint8)
TEST_PIXELS = RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8)


# torchvision's datasets.


def idx(array: np.ndarray) -> bytes:
    """A file of the MNIST family: magic number, shape, bytes."""
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_fashion_mnist(root: Path) -> Path:
    raw = root / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name, pixels in (("train", TRAIN_PIXELS), ("t10k", TEST_PIXELS)):
        labels = (np.arange(len(pixels)) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            (raw / f"{name}-{kind}-ubyte").write_bytes(idx(array))
    return raw


FASHION = {"source": "torchvision", "name": "FashionMNIST", "root": "sets", "image_size": 28}


def expect(patch: pytest.MonkeyPatch, name: str, *sizes: int) -> None:
    """Let a dataset have so many images in each of its splits: the files of a test are few."""
    patch.setitem(SETS, name, replace(SETS[name], sizes=sizes))


def test_a_torchvision_dataset_keeps_its_splits_classes_and_pixels(folder, monkeypatch):
    expect(monkeypatch, "FashionMNIST", 60, 20)
    write_fashion_mnist(folder / "sets")
    dataset = prepare(**FASHION, channels=1)
    assert list(dataset.class_names)[:3] == ["T-shirt/top", "Trouser", "Pullover"]
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 50,  # a fifth of each of 10 classes of 6 is split off
        "validation": 10,
        "test": 20,
    }
    test, train = dataset.splits["test"], dataset.splits["train"]
    assert list(test.sample_ids) == [f"test/{index:06d}" for index in range(20)]
    assert np.array_equal(test.images[:, 0], TEST_PIXELS)
    assert test.labels.tolist() == list(range(10)) * 2
    indices = np.array([int(sample_id.removeprefix("train/")) for sample_id in train.sample_ids])
    assert np.array_equal(train.images[:, 0], TRAIN_PIXELS[indices])
    assert np.array_equal(train.labels, indices % 10)


def test_a_torchvision_dataset_may_have_unlabelled_images(folder, monkeypatch):
    base = folder / "sets/stl10_binary"
    base.mkdir(parents=True)
    for name, count in (("train", 30), ("test", 10), ("unlabeled", 7)):
        pixels = RNG.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        (base / f"{name}_X.bin").write_bytes(pixels.tobytes())
        if name != "unlabeled":
            (base / f"{name}_y.bin").write_bytes(
                (np.arange(count) % 10 + 1).astype(np.uint8).tobytes()
            )
    (base / "class_names.txt").write_text("\n".join("abcdefghij"))
    expect(monkeypatch, "STL10", 30, 10, 7)
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    dataset = prepare(source="torchvision", name="STL10", root="sets")
    labels = dataset.splits["train"].labels
    assert labels[-7:].tolist() == [-1] * 7
    assert labels[:-7].min() == 0
    assert dataset.splits["train"].sample_ids[-1] == "unlabeled/000006"
    assert min(dataset.splits[name].labels.min() for name in ("validation", "test")) == 0


WNIDS = list(torchvision.datasets.Imagenette._WNID_TO_CLASS)
IMAGENETTE = {"source": "torchvision", "name": "Imagenette", "root": "sets"}


def write_imagenette(root: Path, **wnids: Sequence[str]) -> Path:
    """Four images of each of these classes in each of these splits."""
    for split, found in wnids.items():
        for wnid in found:
            path = root / "imagenette2" / split / wnid
            path.mkdir(parents=True)
            for index in range(4):
                pixels = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / f"{wnid}_{index}.JPEG")
    return root / "imagenette2"


@pytest.mark.parametrize(
    ("kind", "content", "found"),
    [
        ("images-idx3", b"", "files that torchvision cannot open (invalid literal for int()"),
        ("images-idx3", b"<html>gone</html>", "files that torchvision cannot open (AssertionError"),
        ("images-idx3", idx(TRAIN_PIXELS)[:5000], "files that torchvision cannot open (shape"),
        ("images-idx3", idx(TRAIN_PIXELS[:59]), "59 images of `FashionMNIST` (train); expected 60"),
        (
            "labels-idx1",
            idx(np.zeros(61, np.uint8)),
            "61 labels of `FashionMNIST` (train); expected",
        ),
        (
            "labels-idx1",
            idx(np.full(60, 77, np.uint8)),
            "a label 77 of `FashionMNIST` (train); exp",
        ),
    ],
)
def test_damaged_files_of_a_torchvision_dataset_are_refused(
    folder, monkeypatch, kind, content, found
):
    expect(monkeypatch, "FashionMNIST", 60, 20)
    (write_fashion_mnist(folder / "sets") / f"train-{kind}-ubyte").write_bytes(content)
    with pytest.raises(UserError) as refusal:
        prepare(**FASHION)
    assert f"`sets` (`dataset.root`) has {found}" in str(refusal.value)
    assert "files are missing or damaged. Remove what was unpacked below" in str(refusal.value)
    assert "download" not in str(refusal.value)


def test_an_unknown_class_folder_of_a_torchvision_dataset_is_refused(folder, monkeypatch):
    expect(monkeypatch, "Imagenette", 40, 40)
    write_imagenette(folder / "sets", train=WNIDS, val=[*WNIDS, "n99999999"])
    with pytest.raises(UserError, match="that torchvision cannot open .'n99999999'."):
        prepare(**IMAGENETTE)


@pytest.mark.parametrize(
    ("train", "val", "found"),
    [
        (WNIDS, WNIDS[-2:], "8 images of `Imagenette` (validation); expected 40"),
        (WNIDS[:4], WNIDS, "16 images of `Imagenette` (train); expected 40"),
    ],
)
def test_a_partly_unpacked_torchvision_dataset_is_refused(folder, monkeypatch, train, val, found):
    """Its classes are numbered among the folders that are there, split by split."""
    expect(monkeypatch, "Imagenette", 40, 40)
    write_imagenette(folder / "sets", train=train, val=val)
    with pytest.raises(UserError) as refusal:
        prepare(**IMAGENETTE)
    assert f"`sets` (`dataset.root`) has {found}" in str(refusal.value)
    assert "Remove what was unpacked below `sets`" in str(refusal.value)
    assert not PREPARED.exists()


def test_labels_of_a_torchvision_dataset_are_read_without_its_images(folder, monkeypatch):
    expect(monkeypatch, "Imagenette", 40, 40)
    base = write_imagenette(folder / "sets", train=WNIDS, val=WNIDS)
    broken = base / "train" / WNIDS[3] / f"{WNIDS[3]}_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(UserError, match=f"train/000013: sets/.*/{broken.name}: Trunc"):
        prepare(**IMAGENETTE)
    dataset = prepare(**IMAGENETTE, unreadable="skip")
    splits = dataset.splits.values()
    labels = {i: label for s in splits for i, label in zip(s.sample_ids, s.labels, strict=True)}
    expected = {f"{split}/{n:06d}": n // 4 for split in ("train", "validation") for n in range(40)}
    del expected["train/000013"]
    assert labels == expected


@pytest.mark.parametrize("name", SETS)
def test_every_known_dataset_has_a_number_of_images_for_each_split(name):
    assert len(SETS[name].sizes) == len(SETS[name].splits)


@pytest.mark.parametrize("name", SETS)
def test_every_known_dataset_has_the_splits_of_the_catalogue(folder, name):
    """Without files: an unknown split or argument would be a TypeError or a ValueError."""
    for arguments in SETS[name].splits.values():
        with pytest.raises((RuntimeError, FileNotFoundError)):
            getattr(torchvision.datasets, name)(folder, **arguments, download=False)


def test_a_failed_download_names_the_files_to_provide(folder, monkeypatch):
    (folder / "sets").mkdir()

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    with pytest.raises(UserError) as refusal:
        prepare(source="torchvision", name="CIFAR100", root="sets")
    message = str(refusal.value)
    assert "`sets` (`dataset.root`) does not have all of `CIFAR100` (train)" in message
    assert "Put into `sets`: cifar-100-python.tar.gz" in message
    assert not PREPARED.exists()


def test_a_packed_file_below_the_root_is_unpacked_without_a_network(folder, monkeypatch):
    """As the message of a failed download promises."""
    expect(monkeypatch, "FashionMNIST", 60, 20)
    for path in list(write_fashion_mnist(folder / "sets").iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    made = torchvision.datasets.FashionMNIST
    monkeypatch.setattr(made, "resources", [(name, None) for name, _ in made.resources])
    assert len(prepare(**FASHION, channels=1).splits["test"]) == 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "CIFAR1OO"}, "name is `CIFAR1OO`, which is not known; did you mean `CIFAR10` or"),
        ({"name": None}, "name is missing. Known: CIFAR10, CIFAR100, MNIST"),
        ({"source": "image_folder", "name": "CIFAR10"}, "which belongs to source `torchvision`"),
        (
            {"name": "CIFAR10", "storage": "encoded", "quality": "original"},
            "source `torchvision` has no image files",
        ),
        (
            {"name": "CIFAR10", "root": "nowhere"},
            "the folder that holds `CIFAR10` or receives its download",
        ),
    ],
)
def test_an_unknown_or_absent_dataset_is_refused_before_a_run(folder, values, message):
    (folder / "sets").mkdir()
    dataset = PARAMS["dataset"] | {"source": "torchvision", "root": "sets"} | values
    write_params(folder, PARAMS | {"dataset": dataset})
    assert message in "\n".join(check.problems())


# Unlabelled images.


def write_unlabelled(root: Path, count: int = 9) -> None:
    """Write black and white noise, unlike any class, some of it in nested folders."""
    for index in range(count):
        path = root / ("deep/er" if index % 2 else "") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([9, index]).integers(0, 2, (16, 16, 3), np.uint8) * 255
        Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("name", ["unlabeled", "unlabelled"])
def test_unlabelled_images_join_only_the_training_split_and_leave_the_normalisation(folder, name):
    write_images(folder / "images", per_class=10)
    before = prepare()
    write_unlabelled(folder / "images" / name)
    dataset = prepare()
    train = dataset.splits["train"]
    assert {n: len(s) for n, s in dataset.splits.items()} == {
        "train": len(before.splits["train"]) + 9,
        "validation": 6,
        "test": 6,
    }
    assert train.labels.tolist() == [*before.splits["train"].labels.tolist(), *[-1] * 9]
    assert next(i for i in train.sample_ids if "deep" in i) == f"{name}/deep/er/1.png"
    assert list(dataset.class_names) == ["ant", "bee", "cat"]
    assert (dataset.mean, dataset.std) == (before.mean, before.std)
    assert dataset.fingerprint != before.fingerprint


def labels_seen_by(stage: str) -> np.ndarray:
    seen, train_step = [], loop.train_step

    def watched(forward, spec, local, batch, *arguments):
        seen.append(batch.labels.numpy())
        return train_step(forward, spec, local, batch, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", watched)
        run_stage(stage, "small")
    return np.concatenate(seen)


def test_a_student_learns_from_unlabelled_images_and_its_teacher_and_its_baseline_do_not(project):
    before = bytes_of(Path("models/teacher"))
    write_unlabelled(project / "images/unlabeled", 20)
    change_params("soft_targets", encoding="top_k", k=2)
    for stage in ("prepare", "teacher", "soft_targets"):
        run_stage(stage)
    assert bytes_of(Path("models/teacher")) == before
    train = open_dataset().splits["train"]
    unlabelled = np.flatnonzero(train.labels < 0)
    logits, kept = opened().decoded_at(1.0).gather(1, unlabelled)
    assert np.isfinite(logits).all()
    # 2 of 3 classes: without a label, the largest, which is kept anyway
    assert kept.sum(1).tolist() == [2] * len(unlabelled)
    assert "20 of them match the teacher's logits" in verify(STORE, recompute=20, seed=0)
    labels = labels_seen_by("student")
    assert len(labels) == 2 * len(train)  # epochs
    assert (labels < 0).sum() == 2 * len(unlabelled)
    baseline = labels_seen_by("baseline")
    assert baseline.min() == 0
    steps = [read_json(Path(f"metrics/{kind}/small.json"), produced_by="-")["optimiser_steps"]
             for kind in ("students", "baselines")]  # fmt: skip
    assert steps[0] == steps[1]
    run_stage("compare")


# Warnings.


def test_only_imbalanced_classes_and_ignored_files_are_reported(folder, capsys):
    write_images(folder / "images", per_class=10)
    prepare()
    output = capsys.readouterr().out
    assert not any(word in output for word in ("warning", "unequal", "ignored"))
    assert "duplicates" not in read_json(PREPARED / "dataset.json", produced_by="-")
    for path in sorted((folder / "images/train/bee").iterdir())[5:]:
        path.unlink()
    (folder / "images/valid").mkdir()
    (folder / "images/valid/x.png").write_bytes(b"")
    (folder / "images/train/readme.txt").write_text("")
    prepare()
    output = capsys.readouterr().out
    expected = "classes are unequal: 3 training images of `bee`, 6 of `ant`, 2.0 times as many"
    assert expected in output
    assert "prepare: left out of `images`, as no images: 1 `.txt`\n" in output
    assert "prepare: ignored images of `images`: 1 outside `train/<class>/`" in output


def test_classes_without_validation_or_test_images_are_reported(folder, capsys):
    write_images(folder / "images", per_class=8)
    write_images(folder / "images", per_class=2, split="test")
    shutil.rmtree(folder / "images/test/bee")
    prepare()
    output = capsys.readouterr().out
    assert "warning: no test image of 1 class (`bee`), which test accuracy does" in output
    assert "no validation image" not in output


def test_duplicates_across_splits_and_contradicting_labels_are_reported_and_kept(folder, capsys):
    images = folder / "images"
    write_images(images, per_class=6)
    write_images(images, per_class=8, split="test")  # whose first 6 are the same
    (images / "val/ant").mkdir(parents=True)
    shutil.copy(images / "test/ant/006.png", images / "val/ant/other name.png")
    shutil.copy(images / "train/ant/000.png", images / "train/bee/again.png")
    dataset = prepare()
    output = capsys.readouterr().out
    assert "warning: 19 of 25 validation and test images have the same content" in output
    assert "`train/ant/001.png` = `test/ant/001.png`" in output
    assert "warning: 1 time the same content has several labels, such as `train" in output
    assert "`train/ant/000.png` = `train/bee/again.png`" in output
    duplicates = read_json(PREPARED / "dataset.json", produced_by="-")["duplicates"]
    assert duplicates["across_splits"]["count"] == 19
    assert len(duplicates["across_splits"]["first"]) == 5
    pair = ["train/ant/000.png", "train/bee/again.png"]
    assert duplicates["contradicting_labels"] == {"count": 1, "first": [pair]}
    assert sum(len(split) for split in dataset.splits.values()) == 44


def test_an_image_that_is_removed_during_prepare_is_named(folder, monkeypatch):
    write_images(folder / "images", per_class=6)
    everything = image_folder.read_files
    monkeypatch.setattr(image_folder, "read_files", lambda *a: islice(everything(*a), 17))
    with pytest.raises(UserError, match="1 listed image is gone, the first `train/cat/"):
        prepare()
    assert not PREPARED.exists()
