"""Pixel ranges are looked at, over the whole dataset, and told with numbers."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare, write_images
from image_files import deep_png, tiff
from PIL import Image

from pipeline.data.prepared.dataset import EncodedSplit
from pipeline.runtime.errors import UserError


def picture(label: int, index: int) -> np.ndarray:
    """[16, 16] values of 0 to 239."""
    values = np.random.default_rng([label, index]).integers(0, 120, (16, 16))
    values[:8, 5 * label : 5 * label + 5] += 120
    return values


KINDS = {
    "16 bits, grey": lambda values, factor: deep_png(values[..., None] * factor, 0),
    "16 bits, colours": lambda values, factor: deep_png(np.dstack([values * factor] * 3), 2),
    "32 bits": lambda values, factor: tiff(values * factor, 32, sample_format=2),
}


def write_deep(root: Path, kind: str, factor: int, per_class: int = 6) -> int:
    """Write images of `picture` times a factor; return the largest value."""
    largest = 0
    for label, name in enumerate("abc"):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for index in range(per_class):
            values = picture(label, index)
            largest = max(largest, int(values.max()) * factor)
            suffix = "tif" if kind == "32 bits" else "png"
            (folder / f"{index}.{suffix}").write_bytes(KINDS[kind](values, factor))
    return largest


def expected_pixels(split, bit_depth: int, factor: int) -> np.ndarray:
    numbers = [("abc".index(name.split("/")[1]), int(Path(name).stem)) for name in split.sample_ids]
    values = np.stack([picture(*pair) * factor for pair in numbers])
    return np.rint(values * (255 / (2**bit_depth - 1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("factor", "bits"), [(16, 12), (1, 8)])
def test_deep_images_that_use_few_bits_are_refused_with_numbers_and_read_with_bit_depth(
    folder, kind, factor, bits
):
    largest = write_deep(folder / "images", kind, factor)
    with pytest.raises(UserError) as refusal:
        prepare()
    for words in ("8 bits a channel (18 of 18)", f"is {largest:,}", f"{bits} of 16 bits"):
        assert words in str(refusal.value)
    assert f"`dataset.bit_depth: {bits}`" in str(refusal.value)
    split = prepare(bit_depth=bits, channels=1).splits["train"]
    assert np.array_equal(split.images[:, 0], expected_pixels(split, bits, factor))


def test_fourteen_bits_are_told_and_the_full_range_is_not(folder, capsys):
    largest = write_deep(folder / "images", "16 bits, grey", 64)
    split = prepare(channels=1).splits["train"]
    assert np.array_equal(split.images[:, 0], expected_pixels(split, 16, 64))
    told = capsys.readouterr().out
    assert f"8 bits a channel (18 of 18), the largest value is {largest:,}, 23% of white" in told
    assert "`dataset.bit_depth: 14`" in told
    write_deep(folder / "full", "16 bits, grey", 257)
    split = prepare(root="full", channels=1).splits["train"]
    assert np.array_equal(split.images[:, 0], expected_pixels(split, 8, 1))
    assert "warning" not in capsys.readouterr().out


def test_one_bright_pixel_does_not_hide_that_twelve_bits_are_used(folder, capsys):
    write_deep(folder / "images", "16 bits, grey", 16)
    values = picture(0, 0)[..., None] * 16
    values[3, 3] = 65_535
    (folder / "images/train/a/0.png").write_bytes(deep_png(values, 0))
    prepare()
    assert "warning: of 18 images of more than 8 bits a channel, 17 have no value above 4,095" in (
        capsys.readouterr().out
    )


def test_a_wrong_bit_depth_is_refused_even_where_unreadable_files_are_skipped(folder):
    write_deep(folder / "images", "16 bits, grey", 64)
    with pytest.raises(UserError, match=r"it has the value [\d,]+; `dataset.bit_depth: 12` allows"):
        prepare(bit_depth=12, unreadable="skip")


def test_the_scale_is_one_for_the_whole_dataset(folder):
    """A dark image stays dark beside a bright one."""
    write_deep(folder / "images", "16 bits, grey", 257)
    dark = folder / "images/train/a/0.png"
    dark.write_bytes(deep_png(np.full((16, 16, 1), 257) * np.eye(16, dtype=int)[..., None], 0))
    dataset = prepare(channels=1)
    images = {
        name: image
        for split in dataset.splits.values()
        for name, image in zip(split.sample_ids, split.images, strict=True)
    }
    assert images["train/a/0.png"].max() == 1


def test_the_files_kept_by_quality_original_show_the_scaled_pixels(folder):
    write_deep(folder / "images", "16 bits, colours", 16)
    split = prepare(storage="encoded", quality="original", bit_depth=12).splits["train"]
    assert isinstance(split, EncodedSplit)
    stored = [np.asarray(Image.open(io.BytesIO(split.content(n)))) for n in range(len(split))]
    assert np.array_equal(np.stack(stored)[..., 1], expected_pixels(split, 12, 16))


def test_images_of_one_colour_are_told_and_refused_if_they_are_most(folder, capsys):
    write_images(folder / "images", per_class=6)
    black, red = (Image.new("RGB", (16, 16), colour) for colour in ("black", "red"))
    black.save(folder / "images/train/ant/x.png")
    red.save(folder / "images/train/bee/y.png")
    prepare()
    told = capsys.readouterr().out
    assert "warning: images with one colour in all pixels: 2 of 20, of which black 1" in told
    assert "`train/ant/x.png`, `train/bee/y.png`" in told
    for path in [*(folder / "images").rglob("0*.png")][:10]:
        black.save(path)
    with pytest.raises(UserError, match="12 of its 20 images .* 11 of them black"):
        prepare()


def test_near_black_images_are_told(folder, capsys):
    write_images(folder / "images", per_class=6)
    for path in (folder / "images").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 64).save(path)
    prepare()
    mean = max(json.loads(Path("data/prepared/dataset.json").read_text("utf-8"))["mean"])
    assert f"the images are near black: the mean of their pixels is {mean:.2%}" in (
        capsys.readouterr().out
    )


def test_bright_values_that_are_missing_are_told(folder, capsys):
    """Colours whose file keeps 8 bits of 12 in 16, which no reader can restore."""
    write_images(folder / "images", per_class=6)
    for path in (folder / "images").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 16).save(path)
    prepare()
    assert "near black: the mean of their pixels is" in (told := capsys.readouterr().out)
    assert "the largest is 14 of 255" in told


def test_pages_that_are_not_read_are_told(folder, capsys):
    write_images(folder / "images", per_class=6)
    page = Image.open(folder / "images/train/ant/000.png")
    page.save(folder / "images/train/ant/stack.tif", save_all=True, append_images=[page.rotate(90)])
    page.save(folder / "images/train/ant/single.tif")
    prepare()
    assert (
        "warning: files with several pages, of which the first is read: 1 of 20, such as "
        "`train/ant/stack.tif`"
    ) in capsys.readouterr().out


@pytest.mark.parametrize(("size", "told"), [(8, True), (9, False)])
def test_images_that_are_reduced_to_half_their_side_are_told(folder, capsys, size, told):
    write_deep(folder / "images", "16 bits, grey", 257)
    prepare(image_size=size, bit_depth=16)
    line = f"reduced to {size} pixels a side (`dataset.image_size`); the median of their shorter "
    assert (line + "sides is 16." in capsys.readouterr().out) == told
