"""Source `image_folder`: folders as people, systems, cameras and archivers make them."""

import io
import os
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from conftest import prepare, write_images
from PIL import Image

from pipeline.data.sources.archives import read_files
from pipeline.data.sources.layout import part_of
from pipeline.data.sources.params import DatasetParams
from pipeline.runtime.errors import UserError
from pipeline.stages.prepare import SOURCES

IMAGES = Path("images")


def sizes(**values: object) -> dict[str, int]:
    return {name: len(split) for name, split in prepare(**values).splits.items()}


def ids(root: str = "images") -> list[str]:
    """The ids of all samples, by names alone."""
    values = {"root": root, "storage": "pixels", "image_size": 16, "split_seed": 0}
    fractions = {"validation_fraction": 0.2, "test_fraction": 0.2}
    source = SOURCES["image_folder"](DatasetParams(source="image_folder", **values, **fractions))
    return list(source.samples.ids)


def touch(*names: str, content: bytes = b"") -> None:
    for name in names:
        path = IMAGES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def a_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "JPEG")
    return file.getvalue()


# Splits.


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (
            "train",
            "train Train TRAIN training trainset train_set Training-Set train2017 images_train",
        ),
        ("val", "val valid Valid validation VALIDATION dev development val_images valset"),
        ("test", "test Test testing test_set TestData eval evaluation"),
        ("unlabeled", "unlabeled unlabelled Unlabeled_images"),
        (
            None,
            "cat holdout trainval train-val tests_of_trains contest validity evaluator images 1",
        ),
    ],
)
def test_usual_names_of_splits_are_read_in_any_case_and_nothing_else_is(part, names):
    assert {name: part_of(name) for name in names.split()} == dict.fromkeys(names.split(), part)


def test_valid_is_the_validation_split_and_training_the_training_split(folder, capsys):
    write_images(folder / "images", per_class=10, split="Training")
    write_images(folder / "images", per_class=2, split="valid")
    write_images(folder / "images", per_class=3, split="TEST")
    dataset = prepare()
    assert [len(split) for split in dataset.splits.values()] == [30, 6, 9]
    assert dataset.splits["train"].sample_ids[0] == "Training/ant/000.png"  # the path, as it is
    output = capsys.readouterr().out
    assert "`TEST/` as `test/`, `Training/` as `train/`, `valid/` as `val/`" in output


def test_two_folders_of_one_split_are_refused_with_both_names(folder):
    for split in ("train", "Training"):
        write_images(folder / "images", per_class=3, split=split)
    with pytest.raises(UserError, match="`Training/` and `train/`: both are read as `train/`"):
        ids()


def test_an_unknown_folder_of_class_folders_is_refused_by_name(folder):
    write_images(folder / "images", per_class=3)
    write_images(folder / "images", per_class=3, split="holdout")
    with pytest.raises(UserError, match="has `holdout/`, with folders of classes as `train/`"):
        ids()


def test_folders_of_other_images_beside_the_splits_are_ignored_with_a_line(folder, capsys):
    write_images(folder / "images", per_class=3)
    shutil.copytree(folder / "images/train/ant", folder / "images/annotations/masks")
    assert len(ids()) == 9
    output = capsys.readouterr().out
    assert "prepare: ignored images of `images`: 3 outside `train/<class>/`" in output
    assert "in `annotations/masks/`" in output


def test_class_folders_without_train_are_its_classes(folder, capsys):
    write_images(folder / "images", per_class=10)
    before = sizes()
    shutil.move("images/train", "flat")
    assert sizes(root="flat") == before
    output = capsys.readouterr().out
    assert "its 3 folders are taken as classes of `train/`: `ant`, `bee`, `cat`" in output
    assert ids("flat")[0] == "ant/000.png"


@pytest.mark.parametrize("wrapping", ["dataset/dataset", "test_data", "a/b/c"])
@pytest.mark.parametrize("flat", [False, True])
def test_folders_that_wrap_all_others_are_no_part_of_an_id(folder, wrapping, flat):
    write_images(folder / "images" / wrapping, per_class=3)
    if flat:
        if wrapping == "test_data":
            pytest.skip("its folders would be those of a test split")
        for name in ("ant", "bee", "cat"):
            shutil.move(f"images/{wrapping}/train/{name}", f"images/{wrapping}/{name}")
        Path(f"images/{wrapping}/train").rmdir()
    touch("readme.txt", f"{wrapping.partition('/')[0]}/LICENSE")
    assert ids()[0] == ("ant/000.png" if flat else "train/ant/000.png")
    assert len(ids()) == 9


def test_pictures_of_trains_are_a_class(folder):
    write_images(folder / "images", per_class=3)
    Path("images/train/ant").rename("images/train/train")
    assert ids()[-1] == "train/train/002.png"


def test_folders_in_class_folders_belong_to_the_class(folder, capsys):
    write_images(folder / "images", per_class=3)
    touch("train/ant/2024/may/x.png")
    touch("train/ant/2025/may/x.png")
    assert "train/ant/2024/may/x.png" in ids()
    assert "outer folders" not in capsys.readouterr().out


@pytest.mark.parametrize("train", ["train/", ""])
def test_classes_within_classes_get_a_line(folder, capsys, train):
    for name in ("animals/cat", "animals/dog", "plants/oak", "cars/bus"):
        touch(*(f"{train}{name}/{number}.png" for number in range(3)))
    assert len(ids()) == 12
    line = "outer folders, such as `animals`, with `cat`, `dog` in it. If the inner folders"
    assert line in capsys.readouterr().out
    shutil.rmtree(f"images/{train}animals/dog")
    ids()
    assert "outer folders" not in capsys.readouterr().out


def test_a_class_of_test_that_only_looks_like_one_of_train_is_refused_with_the_difference(folder):
    for name in ("train/caf\u00e9", "train/dog", "test/cafe\u0301", "test/dog"):
        touch(*(f"{name}/{number}.png" for number in range(3)))
    message = r"`train/` lacks: `café`; 'cafe\u0301' and 'caf\xe9' look the same: one uses composed"
    with pytest.raises(UserError) as refusal:
        ids()
    assert message in normalize("NFC", str(refusal.value))


@pytest.mark.parametrize("name", ["unlabeled", "Unlabelled_images"])
def test_unlabelled_images_in_train_are_no_class(folder, name):
    write_images(folder / "images", per_class=3)
    touch(f"train/{name}/x.png")
    with pytest.raises(UserError, match=f"has `train/{name}/`, which would be a class; expected "):
        ids()


@pytest.mark.parametrize(
    ("moves", "problem"),
    [
        ({"train/ant": "t/train/ant", "train/bee": "u/bee"}, "no `train/<class>/<image>`"),
        (
            {"train": "holdout/a", "val": "other/a"},
            "`holdout/a/` and `other/a/`: `holdout/` and `oth",
        ),
        ({"train": "pets/train", "val": "cat"}, "`pets/train/` beside other folders with images"),
        (
            {"train": "seg_train/seg_train/a", "test": "seg_test/seg_test/a"},
            "splits or classes, `seg_t",
        ),
        ({"train/ant": "images/x", "train/bee": "masks/y"}, "`images/` beside other folders with"),
    ],
)
def test_a_layout_that_may_be_read_in_two_ways_is_refused(folder, moves, problem):
    for old in moves:
        write_images(folder / "made", per_class=2, split=old)
    for old, new in moves.items():
        (folder / "images" / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "made" / old / "ant", folder / "images" / new)
    if problem.startswith("no "):
        touch("val/ant/x.png", content=a_jpeg())
    with pytest.raises(UserError) as refusal:
        ids()
    assert problem in str(refusal.value)
    assert "`train/<class>/<image>`" in str(refusal.value)  # what is expected


def test_images_directly_in_train_get_a_message_that_says_so(folder):
    touch("train/cat.0.jpg", "train/dog.0.jpg", "test/1.jpg", content=a_jpeg())
    with pytest.raises(UserError, match="has 2 images directly in `train/`; expected a folder for"):
        ids()


# What is left out.

SYSTEMS = [
    *("train/ant/@eaDir/000.png/SYNOPHOTO_THUMB_M.jpg", "@eaDir/x/y.jpg", "train/#recycle/a.jpg"),
    *("train/ant/.thumbnails/1.jpg", "train/.picasaoriginals/ant/x.jpg", "__MACOSX/ant/._x.jpg"),
    *("train/lost+found/x.jpg", "train/ant/.ipynb_checkpoints/000-checkpoint.png", ".DS_Store"),
    *("train/ant/._000.png", "train/$RECYCLE.BIN/S-1-5/$R1.jpg", "train/#snapshot/d/ant/0.jpg"),
    *("train/System Volume Information/x.jpg", "train/~Trash/x.jpg", "train/@Recycle/x.jpg"),
    *("train/ant/.@__thumb/default000.jpg", "#other system/ant/1.jpg", "train/ant/.#000.png"),
]
LEFT_OUT = {
    "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "desktop.ini": b"[.ShellClassInfo]\r\n",
    "IMG_1.THM": a_jpeg(),
    "IMG_1.AAE": b"<?xml version='1.0'?>",
    "IMG_1.xmp": b"<x:xmpmeta/>",
    "labels.csv": b"BM,weight,name\nP1 3,4\n",
    "notes.txt": b"",
    "a.json": b"{}",
    "readme.md": b"# P3\n",
    "one.tmp": a_jpeg()[:99],
    "two.jpg.crdownload": a_jpeg()[:99],
    "x.jpg~": a_jpeg(),
    "000.png:Zone.Identifier": b"[ZoneTransfer]",
    "labels.xlsx": b"PK\x03\x04",
    "index": b"1 2 3",
}


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_what_systems_cameras_and_tools_leave_is_left_out_with_a_line(folder, capsys, kind):
    write_images(folder / "images", per_class=3)
    expected = ids()
    assert "left out" not in capsys.readouterr().out
    touch(*SYSTEMS, content=a_jpeg())
    for name, content in LEFT_OUT.items():
        touch(f"train/ant/{name}", content=content)
    root = "images"
    if kind != "folder":
        root = Path(shutil.make_archive("archive", kind, "images")).name
    assert ids(root) == expected
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "left out" in line)
    assert line.startswith(f"prepare: left out of `{root}`, as no images: 2 `@eaDir`, 1 `#other")


def test_the_line_counts_the_most_frequent_kinds_first(folder, capsys):
    write_images(folder / "images", per_class=3)
    touch("train/ant/a.txt", "train/ant/b.TXT", "train/bee/c.txt", "x.csv", "train/ant/LICENSE")
    touch("train/ant/@eaDir/000.png/a.jpg", "train/ant/@eaDir/001.png/a.jpg", content=a_jpeg())
    touch("train/bee/@eaDir/000.png/a.jpg", content=a_jpeg())
    ids()
    expected = "3 `.txt`, 2 `@eaDir`, 1 `.csv`, 1 without suffix"
    assert f"left out of `images`, as no images: {expected}\n" in capsys.readouterr().out


def test_thumbnails_of_a_nas_are_no_samples(folder):
    """Each image was there twice, and images of the test split in the training split."""
    write_images(folder / "images", per_class=20)
    before = prepare().fingerprint
    for path in sorted(IMAGES.glob("train/*/*.png")):
        thumbnail = path.parent / "@eaDir" / path.name / "SYNOPHOTO_THUMB_M.jpg"
        thumbnail.parent.mkdir(parents=True)
        Image.open(path).resize((12, 12)).save(thumbnail)
    assert prepare().fingerprint == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jpg", b""),
        ("x.HEIC", b"\0\0\0\x18ftypheic"),
        ("x", b"\0\0\0\x18ftypheic"),
        ("x.cr2", b""),
        ("x.nef", b"MM\0*"),
        ("x.mp4", b"\0\0\0\x18ftypmp42"),
        ("clip", b"\x1a\x45\xdf\xa3"),
        ("scan.pdf", b"%PDF-1.7"),
        ("more.zip", b"PK\x03\x04"),
        ("page", b"%!PS-Adobe-3.0 EPSF-3.0"),
    ],
)
def test_pictures_that_are_not_read_are_never_left_out_in_silence(folder, name, content):
    write_images(folder / "images", per_class=3)
    touch(f"train/ant/{name}", content=content)
    with pytest.raises(UserError, match="cannot be read as images") as refusal:
        prepare()
    assert f"train/ant/{name}: " in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["#1", "@home", "__background__", "~", "$5", "#thumbsup", "#temperature", "recycled"]
)
def test_a_class_may_have_the_mark_of_a_system(folder, name):
    write_images(folder / "images", per_class=3)
    Path("images/train/ant").rename(IMAGES / "train" / name)
    assert f"train/{name}/000.png" in ids()


def test_a_folder_around_all_others_may_have_the_mark_of_a_system(folder):
    write_images(folder / "images/~me/@data", per_class=3)
    assert ids()[0] == "train/ant/000.png"


def test_names_that_cannot_be_printed_are_left_out_all_the_same(folder, capsys):
    write_images(folder / "images", per_class=3)
    Path(os.fsdecode(b"images/train/ant/.\xff")).touch()
    touch("train/ant/Icon\r", "train/ant/x.a\nb")
    assert len(ids()) == 9
    expected = "1 `.?`, 1 `.a?b`, 1 without suffix"
    assert f"left out of `images`, as no images: {expected}\n" in capsys.readouterr().out


def test_a_file_without_the_suffix_of_an_image_is_one_by_its_bytes(folder):
    write_images(folder / "images", per_class=3)
    touch("train/ant/photo", "train/ant/photo.dat", "train/ant/#1.orig", content=a_jpeg())
    assert len(ids()) == 12


# Archives.


def write_zip(
    names: Iterable[tuple[str | bytes, bytes]], system: int = 0, stated: Mapping[bytes, bytes] = {}
) -> None:
    """Write a zip whose names have these bytes, without the flag of UTF-8.

    Args:
        stated: content -> its extra fields.
    """

    class Info(zipfile.ZipInfo):
        def _encodeFilenameFlags(self) -> tuple[bytes, int]:
            return self.filename.encode("latin-1"), self.flag_bits

    with zipfile.ZipFile("archive.zip", "w") as archive:
        for name, content in names:
            info = Info((name if isinstance(name, bytes) else name.encode()).decode("latin-1"))
            info.create_system = system
            info.extra = stated.get(content, b"")
            archive.writestr(info, content)


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def of_three_classes(join: str = "/", prefix: str = "") -> list[tuple[str, bytes]]:
    return [
        (prefix + join.join(("train", name, f"{number}.png")), png(10 * label + number))
        for label, name in enumerate(("ant", "bee", "cat"))
        for number in range(5)
    ]


@pytest.mark.parametrize("prefix", ["", ".\\", "C:\\Users\\me\\", "pets\\", "\\"])
@pytest.mark.parametrize("system", [0, 3])
def test_backslashes_of_windows_separate_folders(folder, prefix, system):
    write_zip(of_three_classes())
    expected = prepare(root="archive.zip").fingerprint
    write_zip(of_three_classes("\\", prefix), system)
    assert ids("archive.zip")[0] == "train/ant/0.png"
    assert prepare(root="archive.zip").fingerprint == expected


def test_a_backslash_in_a_name_of_linux_stays(folder):
    write_zip([*of_three_classes(), ("train/ant/a\\b.png", png(99))], system=3)
    assert "train/ant/a\\b.png" in ids("archive.zip")
    write_images(folder / "images", per_class=3)
    touch("train/ant/a\\b.png", "x\\y.png", content=png(1))
    assert "train/ant/a\\b.png" in ids()


def test_backslashes_cannot_lead_out_of_an_archive(folder):
    write_zip([*of_three_classes("\\"), ("train\\..\\..\\x.png", png(99))])
    with pytest.raises(UserError, match="a name that leads out of it"):
        ids("archive.zip")
    with tarfile.open("archive.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("..\\x.png"))
    with pytest.raises(UserError, match="a name that leads out of it"):
        ids("archive.tar")


def test_backslashes_separate_folders_in_a_tar_too(folder):
    with tarfile.open("archive.tar", "w") as archive:
        for name, content in of_three_classes("\\"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert ids("archive.tar")[0] == "train/ant/0.png"


def test_labels_and_incremental_archives_of_gnu_tar_are_read(folder):
    write_images(folder / "images", per_class=3)
    expected = ids()
    shutil.copytree("images", "wrapped/pets")
    options = ["--label=pets", "--listed-incremental=snapshot"]
    subprocess.run(["tar", *options, "-cf", "archive.tar", "-C", "wrapped", "pets"], check=True)
    with tarfile.open("archive.tar") as archive:
        assert {member.type for member in archive} == {b"V", b"D", b"0"}
    assert ids("archive.tar") == expected


@pytest.mark.parametrize(
    ("names", "encoding"),
    [
        (("Vögel", "Käfer", "Ärger"), "utf-8"),
        (("Vögel", "Käfer", "Ñu"), "cp437"),
        (("ネコ", "いぬ", "鳥"), "cp932"),
        (("猫", "犬", "鳥類"), "utf-8"),
    ],
)
def test_names_of_a_zip_that_do_not_say_their_encoding_are_read(folder, names, encoding, capsys):
    write_zip(
        (f"train/{name}/{number}.png".encode(encoding), png(10 * label + number))
        for label, name in enumerate(names)
        for number in range(5)
    )
    assert list(prepare(root="archive.zip").class_names) == sorted(names)
    told = f"do not say their encoding, and are read as {encoding}" in capsys.readouterr().out
    assert told == (encoding != "utf-8")


def unicode_path(raw: bytes, name: str, version: int = 1) -> bytes:
    """Extra fields of Info-ZIP: the time, which is in nearly every zip, and the Unicode Path."""
    field = struct.pack("<BL", version, zlib.crc32(raw)) + name.encode()
    return struct.pack("<HHBL", 0x5455, 5, 1, 0) + struct.pack("<HH", 0x7075, len(field)) + field


@pytest.mark.parametrize("encoding", ["ascii", "cp932", "utf-8"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_of_a_zip_are_those_of_its_unicode_path_fields(folder, encoding, capsys):
    """Raw names may be stand-ins, `?` for each letter, which would be one class."""
    classes = ("cat", "猫", "犬")
    names = {png(10 * c + n): f"train/{classes[c]}/{n}.png" for c in range(3) for n in range(5)}
    raw = {content: name.encode(encoding, "replace") for content, name in names.items()}
    stated = {content: unicode_path(raw[content], name) for content, name in names.items()}
    write_zip(((name, content) for content, name in raw.items()), stated=stated)
    assert list(prepare(root="archive.zip").class_names) == sorted(classes)
    output = capsys.readouterr().out
    assert "encoding" not in output
    assert "repeats" not in output


@pytest.mark.parametrize(
    "extra", [unicode_path(b"other", "x"), unicode_path(b"train/a.png", "x", 2)]
)
def test_a_unicode_path_field_of_another_name_or_version_is_ignored(folder, extra):
    content = png(1)
    write_zip([("train/a.png", content)], stated={content: extra + b"\0"})
    assert [name for name, _ in read_files(Path("archive.zip"))] == ["train/a.png"]


def test_names_that_differ_in_case_are_two_images_and_two_classes_told(folder, capsys):
    write_zip([*of_three_classes(), ("train/ant/A.png", png(97)), ("train/ant/a.png", png(98))])
    assert {"train/ant/A.png", "train/ant/a.png"} <= {*ids("archive.zip")}
    write_zip([*of_three_classes(), *((f"train/Ant/{n}.png", png(90 + n)) for n in range(5))])
    ids("archive.zip")
    assert "classes differ only in upper and lower case: 'Ant' and 'ant'" in capsys.readouterr().out


def test_an_archive_may_have_a_suffix_in_capitals(folder):
    write_zip(of_three_classes())
    Path("archive.zip").rename("PETS.ZIP")
    assert len(ids("PETS.ZIP")) == 15
