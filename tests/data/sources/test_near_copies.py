"""Near-copies across splits are told: another size, another JPEG; alike images are not."""

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare
from PIL import Image
from scipy.fft import dctn
from sklearn.datasets import load_sample_images

from pipeline.data.sources.image_reading import DecodedImage
from pipeline.data.sources.near_copies import Sketches, find_near_copies, sketch
from pipeline.data.sources.splits import TEST, TRAIN, VALIDATION, SampleTable
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import PREPARED


def pictures(count: int, side: int = 96) -> list[Image.Image]:
    """Different parts of two photographs, with some contrast."""
    parts = []
    for photograph in load_sample_images().images:
        for top in range(0, len(photograph) - side, side):
            row = photograph[top : top + side]
            parts += [row[:, left : left + side] for left in range(0, row.shape[1] - side, side)]
    parts = [part for part in parts if part.mean(2)[::9, ::9].std() > 25]
    assert len(parts) >= count
    return [Image.fromarray(part) for part in parts[:count]]


def save(image: Image.Image, path: str, scale: float = 1, **options: object) -> None:
    size = [round(side * scale) for side in image.size]
    file = Path("images") / path
    file.parent.mkdir(parents=True, exist_ok=True)
    image.resize(size).save(file, **options)


def near_copies() -> dict | None:
    return read_json(PREPARED / "dataset.json", produced_by="-").get("duplicates")


@pytest.mark.parametrize("storage", ["pixels", "encoded"])
def test_copies_of_another_size_or_quality_are_told_with_their_names(folder, capsys, storage):
    images = pictures(40, 64)
    for number, image in enumerate(images[:30]):
        save(image, f"train/{'ab'[number % 2]}/{number:02d}.png")
    for number, image in enumerate(images[30:]):
        save(image, f"{('val', 'test')[number % 2]}/a/{number}.png")
    copies = {"val/a/x.jpg": (3, 0.5, 50), "test/b/x.jpg": (4, 2, 75), "test/a/y.jpg": (5, 1, 95)}
    for name, (number, scale, quality) in copies.items():
        save(images[number], name, scale, quality=quality)
    save(images[30], "test/a/z.jpg", 0.7, quality=60)  # of `val/`
    prepare(image_size=32, storage=storage)
    expected = [
        *(["train/a/04.png", "test/b/x.jpg"], ["train/b/03.png", "val/a/x.jpg"]),
        *(["train/b/05.png", "test/a/y.jpg"], ["val/a/0.png", "test/a/z.jpg"]),
    ]
    found = near_copies()["near_copies"]
    assert found["count"] == 4
    assert found["of"] == {"validation in train": 1, "test in train": 2, "test in validation": 1}
    assert sorted(found["first"]) == expected
    output = capsys.readouterr().out
    assert "warning: 4 of 14 validation and test images look like a copy of an image" in output
    assert "`train/a/04.png` ~ `test/b/x.jpg`" in output


def test_copies_are_named_rightly_where_unreadable_files_are_left_out(folder):
    for number, image in enumerate(pictures(20)):
        save(image, f"train/{'ab'[number % 2]}/{number:02d}.png")
    Path("images/train/a/01.png").write_bytes(b"no image")
    save(pictures(20)[4], "test/a/x.jpg", 0.5)
    prepare(unreadable="skip")
    assert near_copies()["near_copies"]["first"] == [["train/a/04.png", "test/a/x.jpg"]]


def test_equal_files_are_told_once_as_duplicates(folder):
    for number, image in enumerate(pictures(20)):
        save(image, f"train/{'ab'[number % 2]}/{number:02d}.png")
        if number in (0, 2, 4):
            save(image, f"test/a/{number}.png")
    prepare()
    assert near_copies().keys() == {"across_splits"}


def table(*arrays: list[np.ndarray]) -> tuple[SampleTable, np.ndarray, np.ndarray]:
    """Samples of the three splits, their sketches, and digests that all differ."""
    splits = np.repeat([TRAIN, VALIDATION, TEST], [len(images) for images in arrays])
    samples = SampleTable([str(n) for n in range(len(splits))], splits * 0, splits)
    sketches = Sketches(len(splits))
    images = (image for images in arrays for image in images)
    decoded = (DecodedImage(number, b"", image, None, 32) for number, image in enumerate(images))
    assert len(list(sketches.watch(decoded))) == len(splits)
    digests = np.arange(len(splits))[:, None]
    return samples, sketches.rows, digests


def noise(count: int, seed: int = 0, spread: float = 30) -> list[np.ndarray]:
    values = np.random.default_rng(seed).normal(128, spread, (count, 3, 24, 24))
    return list(values.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "images",
    [
        [np.full((3, 24, 24), level, np.uint8) for level in range(0, 240, 4)],  # plain
        [np.full((3, 24, 24), 7, np.uint8)] * 60,  # blank
        noise(60, spread=2),  # next to blank
        noise(60),
    ],
)
def test_blank_plain_and_noisy_images_are_no_copies(images):
    assert find_near_copies(*table(images[:40], images[40:50], images[50:])) == {}


def test_alike_images_are_no_copies_of_one_another_but_their_copies_are():
    """Each is one picture with other noise, as of an aligned object."""
    base = np.asarray(pictures(1, 24)[0]).transpose(2, 0, 1).astype(float)
    rng = np.random.default_rng(0)
    noisy = (base + rng.normal(0, 25, (90, *base.shape))).clip(0, 255)
    alike = list(noisy.astype(np.uint8))
    assert find_near_copies(*table(alike[:60], alike[60:75], alike[75:])) == {}
    brighter = [alike[3] // 2 + 100]
    found = find_near_copies(*table(alike[:60], alike[60:75], alike[75:] + brighter))
    assert found["near_copies"]["first"] == [["3", "90"]]


def test_many_copies_of_one_image_are_told_too():
    copy = noise(1)[0]
    samples = table([copy] * 30 + noise(30, 1), noise(5, 2), [copy, *noise(5, 3)])
    assert find_near_copies(*samples)["near_copies"]["count"] == 1


def test_a_search_in_parts_finds_the_same(monkeypatch):
    images = noise(100, spread=60)
    samples = table(images[:80], noise(9, 1), [image // 2 + 64 for image in images[60:75]])
    whole = find_near_copies(*samples)
    assert whole["near_copies"]["count"] == 15
    monkeypatch.setattr("pipeline.data.sources.near_copies._ROWS", 7)
    assert find_near_copies(*samples) == whole


@pytest.mark.parametrize(("channels", "side"), [(3, 24), (1, 8), (3, 32), (1, 37), (3, 100)])
def test_a_sketch_is_the_cosine_transform_of_the_mean_of_cells(channels, side):
    rng = np.random.default_rng(side)
    coarse = rng.integers(0, 256, (channels, 8, 8), dtype=np.uint8)
    luma = (0.299, 0.587, 0.114) @ coarse.reshape(3, -1) if channels == 3 else coarse.reshape(-1)
    spectrum = dctn(luma.reshape(8, 8).astype(float), norm="ortho")
    spectrum[0, 0] = 0
    spectrum /= np.sqrt((spectrum**2).sum())
    expected = [spectrum[v, h] for v in range(8) for h in range(8) if 0 < v + h <= 6]
    if side % 8:  # the same cells, of parts of pixels: enlarged by 8, then reduced by 8
        image = rng.integers(0, 256, (channels, side, side), dtype=np.uint8)
        enlarged = image.repeat(8, 1).repeat(8, 2)
        np.testing.assert_allclose(sketch(image), sketch(enlarged), atol=1e-5)
        return
    image = coarse.repeat(side // 8, 1).repeat(side // 8, 2)
    np.testing.assert_allclose(sketch(image), expected, atol=1e-5)


def test_a_jpeg_of_half_the_size_has_nearly_the_same_sketch():
    for image in pictures(20):
        file = io.BytesIO()
        image.resize((48, 48)).save(file, "JPEG", quality=50)
        copy = Image.open(file).resize((96, 96))
        one, other = (sketch(np.asarray(i).transpose(2, 0, 1)) for i in (image, copy))
        assert np.linalg.norm(one - other) < 0.1
