"""`dataset.unreadable: skip` leaves out files that are not images, counts and lists them."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare, write_images
from image_files import saved
from import_closure import ROOT
from PIL import Image

from pipeline.data.prepared.dataset import EncodedSplit, open_dataset, verify_dataset
from pipeline.data.prepared.image_decoding import UNREADABLE
from pipeline.runtime.errors import UserError

BROKEN = ("train/ant/003.png", "train/bee/005.png", "train/cat/000.png")


def contents(dataset) -> dict[str, tuple[str, int, bytes]]:
    """Split, label and image of each sample id."""
    return {
        sample_id: (
            name,
            int(split.labels[row]),
            split.content(row) if isinstance(split, EncodedSplit) else split.images[row].tobytes(),
        )
        for name, split in dataset.splits.items()
        for row, sample_id in enumerate(split.sample_ids)
    }


def break_files(root: Path) -> None:
    photograph = saved("JPEG")
    for name, content in zip(BROKEN, (photograph[:-40], b"", b"a"), strict=True):
        (root / name).write_bytes(content)


@pytest.mark.parametrize("storage", ["pixels", "encoded"])
@pytest.mark.parametrize("archived", [False, True])
def test_unreadable_files_are_left_out_and_all_others_stay_as_they_are(
    folder, capsys, storage, archived
):
    write_images(folder / "images", per_class=10)
    options = {"storage": storage, "unreadable": "skip", "root": "images"}
    whole = contents(prepare(**options))
    assert not Path("data/prepared/unreadable.json").exists()
    break_files(folder / "images")
    if archived:  # in another order
        options["root"] = "images.tar"
        with tarfile.open("images.tar", "w") as archive:
            for path in sorted((folder / "images").rglob("*.png"), reverse=True):
                archive.add(path, path.relative_to(folder / "images"))
    capsys.readouterr()
    left = contents(prepare(**options))
    assert left == {name: sample for name, sample in whole.items() if name not in BROKEN}
    verify_dataset()
    told = capsys.readouterr().out
    assert "not images that can be read (`dataset.unreadable: skip`): 3." in told
    assert f"  {BROKEN[1]}: it is none of" in told
    record = json.loads(Path("data/prepared/unreadable.json").read_text("utf-8"))["files"]
    assert tuple(record) == BROKEN
    assert "truncated" in record[BROKEN[0]]
    assert json.loads(Path("data/prepared/dataset.json").read_text("utf-8"))["unreadable"] == 3


def test_unreadable_files_are_refused_by_default(folder):
    write_images(folder / "images", per_class=10)
    break_files(folder / "images")
    with pytest.raises(UserError, match="3 files of `images`") as refusal:
        prepare()
    assert all(name in str(refusal.value) for name in BROKEN)
    assert "`dataset.unreadable: skip` leaves such files out" in str(refusal.value)


def test_a_class_whose_training_images_are_all_unreadable_is_refused(folder):
    write_images(folder / "images", per_class=6)
    before = prepare().fingerprint
    for path in (folder / "images/train/bee").iterdir():
        path.write_text("no image")
    with pytest.raises(UserError, match="none of the training images of class `bee` can be read"):
        prepare(unreadable="skip")
    assert open_dataset().fingerprint == before


def test_a_split_whose_images_are_all_unreadable_is_refused(folder):
    write_images(folder / "images", per_class=6)
    write_images(folder / "images", per_class=1, split="val")
    for path in (folder / "images/val").rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(UserError, match="none of the images of validation can be read"):
        prepare(unreadable="skip")


def test_too_little_memory_is_not_an_unreadable_image(folder):
    """In a process of its own: this one may have enough left of earlier tests."""
    write_images(folder / "images", per_class=6)
    Image.new("L", (9_000, 9_000)).save(folder / "images/train/bee/large.png")
    code = (
        "import pytest\n"
        "from conftest import memory_left, prepare\n"
        "from pipeline.data.sources import image_reading\n"
        "image_reading.available_cores = lambda: 2  # threads take memory, too\n"
        "for unreadable in ('refuse', 'skip'):\n"
        "    named = pytest.raises(MemoryError, match='for `train/bee/large.png`')\n"
        "    with memory_left(300 * 2**20), named:\n"
        "        prepare(unreadable=unreadable)\n"
    )
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # OpenBLAS's take memory, too
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_too_little_memory_is_not_among_what_a_damaged_image_raises():
    assert not issubclass(MemoryError, UNREADABLE)


@pytest.mark.parametrize("unreadable", ["refuse", "skip"])
def test_only_bit_depth_is_to_be_corrected_if_images_do_not_fit_it(folder, unreadable):
    write_images(folder / "images", per_class=6)
    deep = Image.fromarray(np.full((16, 16), 4080, np.uint16))
    deep.save(folder / "images/train/ant/000.png")
    advice = "1 file of `images` .* as images; correct `dataset.bit_depth`:\n  train/ant/000.png"
    with pytest.raises(UserError, match=advice):
        prepare(unreadable=unreadable, bit_depth=10)


def test_the_mean_is_that_of_the_images_that_are_left(folder):
    write_images(folder / "images", per_class=6)
    break_files(folder / "images")
    dataset = prepare(unreadable="skip")
    images = dataset.splits["train"].images
    np.testing.assert_allclose(dataset.mean, (images / 255).mean((0, 2, 3)), atol=1e-6)
