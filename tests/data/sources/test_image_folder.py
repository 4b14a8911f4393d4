"""Sources `mnist_5k` and `image_folder`, packed as pixels."""

import io
import shutil
import tarfile
import zipfile
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from conftest import prepare, write_images
from PIL import Image

from pipeline.data.prepared.dataset import open_dataset
from pipeline.data.prepared.image_decoding import eight_bits
from pipeline.data.sources.image_reading import to_pixels
from pipeline.data.sources.packing import Statistics
from pipeline.runtime.errors import UserError


def test_the_embedded_digits_are_of_equal_classes_and_have_no_near_copies(folder, capsys):
    shares = {"validation_fraction": 0.1, "test_fraction": 0.5}
    dataset = prepare(source="mnist_5k", image_size=28, labels_per_class=20, split_seed=5, **shares)
    assert list(dataset.class_names) == [str(digit) for digit in range(10)]
    counts = {"train": [1800] + 10 * [20], "validation": [0] + 10 * [50], "test": [0] + 10 * [250]}
    for name, split in dataset.splits.items():
        assert np.bincount(split.labels + 1).tolist() == counts[name]
        assert split.images.shape == (len(split), 3, 28, 28)
    assert "warning" not in capsys.readouterr().out


def test_hidden_labels_are_counted_and_leave_the_splits_and_the_images_as_they_were(folder, capsys):
    write_images(folder / "images", per_class=20)
    whole = prepare()
    assert "hidden" not in capsys.readouterr().out
    hidden = prepare(labels_per_class=5)
    key = "`dataset.labels_per_class: 5`"
    line = f"21 labels of training images are hidden ({key}; null keeps all)"
    assert line in capsys.readouterr().out
    for name, split in hidden.splits.items():
        assert split.sample_ids == whole.splits[name].sample_ids
        np.testing.assert_array_equal(split.images, whole.splits[name].images)
        kept = split.labels >= 0
        np.testing.assert_array_equal(split.labels[kept], whole.splits[name].labels[kept])
        assert kept.all() or name == "train"
    assert np.bincount(hidden.splits["train"].labels + 1).tolist() == [21, 5, 5, 5]
    assert hidden.fingerprint != whole.fingerprint


def test_split_off_samples_are_stratified_seeded_and_disjoint(folder):
    write_images(folder / "images", per_class=20)
    dataset = prepare()
    assert [len(split) for split in dataset.splits.values()] == [36, 12, 12]
    for split in dataset.splits.values():
        assert len(set(Counter(split.labels.tolist()).values())) == 1
    ids = [split.sample_ids for split in dataset.splits.values()]
    assert len({*chain(*ids)}) == 60
    assert [split.sample_ids for split in prepare().splits.values()] == ids
    assert [split.sample_ids for split in prepare(split_seed=1).splits.values()] != ids


def test_the_splits_of_the_source_are_kept(folder):
    write_images(folder / "images", per_class=10)
    write_images(folder / "images", per_class=2, split="val")
    write_images(folder / "images", per_class=3, split="test")
    dataset = prepare()
    assert dataset.splits["validation"].sample_ids[0] == "val/ant/000.png"
    assert [len(split) for split in dataset.splits.values()] == [30, 6, 9]


def test_a_folder_and_its_archives_are_the_same_dataset(folder):
    write_images(folder / "images", per_class=6)
    (folder / "images/train/ant/.DS_Store").write_text("not an image")
    shutil.copytree(folder / "images", folder / "wrapped/some_name")
    with tarfile.open(folder / "images.tar.gz", "w:gz") as archive:
        archive.add(folder / "images/train/ant/003.png", "train/bee/002.png")  # overwritten below
        archive.add(folder / "images", ".")
    with tarfile.open(folder / "wrapped.tar", "w") as archive:
        archive.add(folder / "wrapped/some_name", "some_name")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for path in sorted((folder / "images").rglob("*.png"), reverse=True):
            archive.write(path, path.relative_to(folder / "images"))
    roots = ("images", "images.tar.gz", "wrapped.tar", "images.zip")
    assert len({prepare(root=root).fingerprint for root in roots}) == 1


def test_the_fingerprint_covers_one_pixel(folder):
    write_images(folder / "images", per_class=6)
    before = prepare().fingerprint
    path = folder / "images/train/bee/003.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    assert prepare().fingerprint != before


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def reread(image: Image.Image, file_format: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return eight_bits(Image.open(file))


@pytest.mark.parametrize(
    ("mode", "file_format", "tolerance"),
    [("RGB", "PNG", 0), ("CMYK", "TIFF", 0), ("RGBA", "PNG", 0), ("P", "PNG", 60)],
)
def test_images_of_any_mode_become_rgb_and_grey(mode, file_format, tolerance):
    image = reread(RGB.convert(mode), file_format)
    difference = to_pixels(image, 16, 3).astype(int) - np.asarray(RGB).transpose(2, 0, 1)
    assert np.abs(difference).mean() <= tolerance
    assert to_pixels(image, 16, 1).shape == (1, 16, 16)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_greyscale_images_become_rgb_with_equal_channels(mode):
    grey = np.asarray(RGB.convert("1" if mode == "1" else "L").convert("L"))
    pixels = to_pixels(reread(RGB.convert(mode), "PNG"), 16, 3)
    assert np.array_equal(pixels, np.stack([grey] * 3))


def test_sixteen_bit_images_keep_their_brightness():
    values = np.array([[0, 257, 25_700, 65_535]] * 4, np.uint16)
    pixels = to_pixels(reread(Image.fromarray(values), "PNG"), 4, 1)
    assert pixels[0, 0].tolist() == [0, 1, 100, 255]


def test_transparent_pixels_become_white():
    image = np.zeros((16, 16, 4), np.uint8)
    image[:, 8:, 3] = 255
    for picture in (Image.fromarray(image), Image.fromarray(image).convert("PA")):
        pixels = to_pixels(eight_bits(picture), 16, 3)
        assert pixels[:, :, :8].min() == 255
        assert pixels[:, :, 8:].max() == 0
    palette = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) // 128)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    pixels = to_pixels(reread(palette, "PNG", transparency=0), 16, 3)
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 15, 0].tolist() == [10, 20, 30]


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated camera: upright after 90 degrees clockwise
    upright = np.asarray(RGB.transpose(Image.Transpose.ROTATE_270)).transpose(2, 0, 1)
    assert np.array_equal(to_pixels(reread(RGB, "PNG", exif=exif), 16, 3), upright)


def test_pixels_of_unknown_range_are_refused():
    with pytest.raises(ValueError, match="it has more than 16 bits a channel"):
        reread(Image.fromarray(np.full((16, 16), 70_000, np.int32)), "TIFF")


def test_images_of_other_shapes_keep_their_aspect_ratio_and_lose_their_margins():
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 255
    assert to_pixels(Image.fromarray(wide), 16, 3).min() == 255


def test_statistics_equal_those_of_the_pixels():
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), dtype=np.uint8)
    statistics = Statistics(3)
    for image in images:
        statistics.add(image)
    mean, std = statistics.mean_and_std()
    np.testing.assert_allclose(mean, (images / 255).mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(std, (images / 255).std((0, 2, 3)), atol=1e-6)


@pytest.mark.parametrize("storage", ["pixels", "encoded"])
def test_broken_images_are_all_listed_and_the_data_of_the_run_before_stay(folder, storage):
    write_images(folder / "images", per_class=6)
    before = prepare().fingerprint
    names = ("train/ant/001.png", "train/cat/004.png", "train/bee/notes.tif")
    for name in names:
        (folder / "images" / name).write_text("no image")
    with pytest.raises(UserError) as refusal:
        prepare(storage=storage, quality="original")
    assert str(refusal.value).startswith("3 files of `images`")
    assert all(name in str(refusal.value) for name in names)
    assert open_dataset().fingerprint == before
    assert [path.name for path in (folder / "data").iterdir()] == ["prepared"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_class_folder_without_images_is_refused_in_an_archive_too(folder, kind):
    write_images(folder / "images", per_class=3)
    (folder / "images/train/dog").mkdir()
    (folder / "images/train/dog/.hidden").write_text("")
    shutil.make_archive("images", kind, "images")
    with pytest.raises(UserError, match="has class folders without images: `train/dog`"):
        prepare(root=f"images.{kind}")


def test_images_are_resized_to_another_size_and_mapped_at_their_own(folder):
    write_images(folder / "images", per_class=6)
    dataset = prepare()
    images = dataset.splits["train"].images
    assert dataset.resized(16) is dataset
    resized = dataset.resized(8).splits["train"].images
    assert resized.shape == (len(images), 3, 8, 8)
    image = Image.fromarray(images[2].transpose(1, 2, 0))
    expected = image.resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(resized[2].transpose(1, 2, 0), np.asarray(expected))


def test_a_split_leaves_each_class_an_image_for_training(folder):
    write_images(folder / "images", per_class=20)
    for image in sorted((folder / "images/train/ant").iterdir())[3:]:
        image.unlink()
    splits = prepare(test_fraction=0.5, validation_fraction=0.1).splits
    assert {name: np.bincount(split.labels).tolist() for name, split in splits.items()} == {
        "train": [1, 8, 8],
        "validation": [1, 2, 2],
        "test": [1, 10, 10],
    }


@pytest.mark.parametrize("suffix", [".png", ""])  # without, an image is known by its first bytes
@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_a_name_that_an_archive_repeats_the_last_copy_counts_and_no_other(
    folder, kind, suffix, capsys
):
    images = folder / "images"
    write_images(images, per_class=6)
    for file in images.rglob("*.png"):
        file.rename(file.with_suffix(suffix))
    expected = prepare()
    broken, white = folder / "broken", folder / "white.png"
    broken.write_bytes(b"no image")
    Image.new("RGB", (16, 16), "white").save(white)
    files = [(str(file.relative_to(images)), file) for file in sorted(images.rglob("*0*" + suffix))]
    repeated = [(files[0][0], broken), *((name, white) for name, _ in files[1:9]), *files]
    if kind == "tar":
        with tarfile.open("images.tar", "w") as archive:
            for name, file in repeated:
                archive.add(file, name)
    else:
        with zipfile.ZipFile("images.zip", "w") as archive:
            for name, file in repeated:
                archive.write(file, name)
    assert "repeats" not in capsys.readouterr().out
    found = prepare(root=f"images.{kind}")
    line = (
        f"`images.{kind}` repeats 9 names, such as `{files[0][0]}`; of each the last copy is read"
    )
    assert line in capsys.readouterr().out
    assert (found.fingerprint, found.mean) == (expected.fingerprint, expected.mean)
