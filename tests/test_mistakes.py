"""Each mistake of docs/mistakes.md gets the message that the page quotes."""

from pipeline.runtime.command import run_command

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from unittest.mock import patch

import h5py
import numpy as np
import onnx
import pytest
import torch
import yaml
from conftest import (
    PARAMS,
    change_params,
    opened,
    run_every_stage,
    run_module,
    run_stage,
    write_images,
)
from conftest import prepare as prepare_anew
from image_files import tiff
from import_closure import ROOT
from onnx import TensorProto, helper
from own_family import FAMILY, RETURNED, changed, problem_of_family
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.commands import check, check_networks, predict
from pipeline.commands.import_logits import import_logits
from pipeline.commands.store import inspect, verify
from pipeline.compute import distributed
from pipeline.data.prepared.dataset import open_dataset
from pipeline.export.running.onnx_model import OnnxMetadata
from pipeline.initial_weights.head import head_parameters
from pipeline.int8_training.fake_quantisation import FakeQuantized
from pipeline.models import checkpoint as model_files
from pipeline.models.spec import InputSpec, ModelSpec
from pipeline.networks import cifar_resnet
from pipeline.runtime import signals
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, sha256_of_file, write_json
from pipeline.runtime.outputs import TEACHER, ExportOutputs
from pipeline.students.params import load_student
from pipeline.teacher import foreign_teacher
from pipeline.training.data_parallel import synchronise_batch_norm
from soak.hostile import png_of_any_size
from soak.hostile_inputs import Watch, write_onnx

PAGE = (ROOT / "docs/mistakes.md").read_text("utf-8")
ROWS = dict(re.findall(r"^\| ([^|]+?) \| `` (.+?) `` \|$", PAGE, re.MULTILINE))
ANT, STORE = Path("images/train/ant"), Path("data/soft_targets")
SHARD = STORE / "train_view00001_sample000000000.h5"
#: A row's mistake, and how to make it: the function raises the UserError, or returns the message.
MISTAKES: dict[str, Callable[[], str | None]] = {}


def test_the_page_and_the_tests_list_the_same_mistakes():
    assert ROWS.keys() == MISTAKES.keys()
    assert len(ROWS) == PAGE.count("| `` ")


@pytest.mark.parametrize("row", ROWS)
def test_each_mistake_gets_the_message_of_the_page(project, row):
    try:
        message = MISTAKES[row]()
    except (UserError, SystemExit) as error:
        message = str(error)
    assert message, "accepted"
    parts = (re.escape(part.strip()) for part in ROWS[row].split("…"))
    assert re.search(".*".join(parts), " ".join(message.split())), message
    assert not Path("executed").exists()


# Python.


def of_an_old_python() -> None:
    source = (ROOT / "pipeline/runtime/interpreter.py").read_text("utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 9, 18))
        patch.setattr(sys, "prefix", "/usr")
        exec(compile(source, "interpreter.py", "exec"), {"__name__": "-"})


def without_packages() -> str:
    here = f"import sys; sys.path.append({str(ROOT)!r}); import pipeline.runtime.interpreter, torch"
    bare = [sys.executable, "-S", "-c", here]  # -S: no installed package
    return subprocess.run(bare, capture_output=True, text=True, check=False).stderr


MISTAKES |= {
    "a Python that is too old": of_an_old_python,
    "a Python without the project's packages": without_packages,
}

# Parameters.


def problems() -> str:
    return "\n".join(check.problems())


def with_params(section: str, **values: object) -> str:
    change_params(section, **values)
    return problems()


def with_text(text: str | bytes) -> str:
    Path("params.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return problems()


def with_line(line: str) -> str:
    return with_text(Path("params.yaml").read_text("utf-8") + line + "\n")


def without(section: str, *keys: str) -> str:
    """Without the last of the keys, which lead from the section to it."""
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    mapping = params[section]
    for key in keys[:-1]:
        mapping = mapping[key]
    del mapping[keys[-1]]
    return with_text(yaml.safe_dump(params))


BOMB = "b0: &b0 [x]\n" + "".join(
    f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
MISTAKES |= {
    "another type": partial(with_params, "training", epochs="ten"),
    "out of range": partial(with_params, "views", seed=-1),
    "not one of the choices": partial(with_params, "teacher", weights="pretraind"),
    "an unknown key": partial(with_params, "training", epoch=3),
    "an unknown section": partial(with_line, "distilation: {}"),
    "two keys that exclude each other": partial(
        with_params, "training", optimizer="adamw", momentum=0.8
    ),
    "more frozen epochs than epochs": partial(with_params, "training", freeze_epochs=5),
    "frozen layers in a teacher that starts from scratch": lambda: with_params(
        "teacher",
        training=PARAMS["teacher"]["training"]
        | {"freeze_epochs": 1, "backbone_learning_rate_factor": 0.1},
    ),
    "a number for `int8_training`": partial(with_params, "export", int8_training=2),
    "a student without a key that DVC reads": partial(without, "students", "small", "distillation"),
    "no `teacher.checkpoint`, which DVC reads": partial(without, "teacher", "checkpoint"),
    "no `dataset.root`, which DVC reads": partial(without, "dataset", "root"),
    "no training of a teacher that is trained": partial(without, "teacher", "training"),
    "no share for a split that the dataset lacks": partial(without, "dataset", "test_fraction"),
    "splits that leave nothing to train on": partial(
        with_params, "dataset", validation_fraction=0.5, test_fraction=0.5
    ),
    "more views than there are": partial(with_params, "views", count=163),
    "`mean` for other channels": partial(
        with_params, "teacher", network={"name": "resnet8", "mean": [0.5]}
    ),
    "`top_k` for a method that needs every logit": lambda: (
        change_params("distillation", method="dist")
        or with_params("soft_targets", encoding="top_k", k=2)
    ),
    "a student's name with other letters": partial(with_line, "  -rf: {}"),
    "`mean` of pixels in 0 to 255": partial(
        with_params, "teacher", network={"name": "resnet8", "mean": [123.675, 116.28, 103.53]}
    ),
    "a student that is called `teacher`": partial(with_line, "  teacher: {}"),
    "weights that leave nothing to learn from": lambda: with_text(
        yaml.safe_dump(
            PARAMS
            | {"distillation": {"method": "dkd", "alpha": 0, "beta": 0, "hard_label_weight": 0}}
        )
    ),
    "`policy` with other names of two views": partial(
        with_params, "views", policy={"first": "crop", "second": "none"}
    ),
    "parameters of RandAugment beside two views": partial(
        with_params, "views", rand_augment={"weak": "none", "strong": "none", "operations": 2}
    ),
    "a student's name that is a path": partial(with_line, "  ../x: {}"),
    "no student": lambda: with_text(
        yaml.safe_dump({k: v for k, v in PARAMS.items() if k != "students"})
    ),
    "an unknown student on the command line": lambda: load_student("smal"),
    "a repeated key": partial(with_line, "views: {}"),
    "invalid YAML": partial(with_line, "a: b: c"),
    "a file that is not UTF-8": partial(with_text, b"\xff\xfe\x00binary"),
    "a tag that would make a Python object": partial(
        with_line, "x: !!python/object/apply:os.system [touch executed]"
    ),
    "aliases that grow without end": partial(with_text, BOMB),
    "an alias within itself": partial(with_text, "a: &a [*a]\n"),
    "an invalid date or number": partial(with_line, "x: 2024-13-45"),
    "nesting without end": partial(with_text, "[" * 2000),
}


# Networks: messages of `python -m pipeline.commands.check`.


def misspelt_network() -> str:
    change_params("students", small=PARAMS["students"]["small"] | {"network": "resnet9"})
    return problems() or "\n".join(check_networks.problems())


def import_code_beside_the_family() -> str | None:
    Path("my_blocks.py").touch()
    return problem_of_family(f"import my_blocks\n{FAMILY}")


def with_family(old: str, new: str) -> Callable[[], str | None]:
    return lambda: problem_of_family(changed(old, new))


MISTAKES |= {
    "an unknown network": misspelt_network,
    "an unknown option": lambda: problem_of_family(FAMILY, {"widht": 2}),
    "a family without `build`": with_family("def build", "def make"),
    "a syntax error in a family": with_family("def forward(self, x):", "def forward(self, x)"),
    "an exception in `build`": with_family("super().__init__()", "self.width = WIDTH"),
    "an import that is not found": lambda: problem_of_family(f"import my_blocks\n{FAMILY}"),
    "an import of another file": import_code_beside_the_family,
    "another number of outputs": with_family("(4, num_classes)", "(4, 1000)"),
    "more than logits": with_family(RETURNED, f"{RETURNED}, x"),
    "more than logits in training": with_family(
        RETURNED, f"if self.training:\n            return x, x\n        {RETURNED}"
    ),
    "a network that ends in a softmax": with_family(RETURNED, f"{RETURNED}.softmax(1)"),
    "a network that returns no numbers": with_family(RETURNED, f"{RETURNED} * float('nan')"),
    "an exception in `forward`": with_family(RETURNED, "return self.haed(x)"),
    "an input that does not fit": with_family(RETURNED, "return self.head(x)"),
    "a memory layout that does not fit": with_family(
        RETURNED, "return self.head(self.features(x).view(len(x), -1)[:, :4])"
    ),
    "dropout in evaluation": with_family(
        "self.features(x)", "nn.functional.dropout(self.features(x))"
    ),
    "a layer over the batch": with_family(
        "self.features(x)", "(self.features(x) - self.features(x).mean(0))"
    ),
}


# Datasets: messages of `python -m pipeline.commands.check`, or of `prepare`.


def checking(*acts: Callable[[], object], **dataset: object) -> Callable[[], str]:
    """Do these in the finished project, set these keys, and check."""

    def make() -> str:
        for act in acts:
            act()
        return with_params("dataset", **dataset)

    return make


def remove_params() -> str:
    Path("params.yaml").unlink()
    return problems()


def name_two_classes_alike() -> None:
    ANT.rename("images/train/" + unicodedata.normalize("NFC", "é"))
    Path("images/train/bee").rename("images/train/" + unicodedata.normalize("NFD", "é"))


def cut_a_tar() -> None:
    with tarfile.open("images.tar", "w") as archive:
        archive.add("images")
    os.truncate("images.tar", Path("images.tar").stat().st_size // 2)


SIGN_IN = b"<!DOCTYPE html><html><title>Sign in</title>"


def link_to_a_folder() -> None:
    ANT.rename("elsewhere")
    ANT.symlink_to(Path("elsewhere").absolute())


def wrap_classes() -> None:
    for outer, name in (("animals", "ant"), ("animals", "bee"), ("pets", "cat")):
        Path("images/train", outer).mkdir(exist_ok=True)
        Path("images/train", name).rename(Path("images/train", outer, name))
    prepare_anew()


def unpack_two_classes_of_imagenette() -> None:
    for wnid in ("n01440764", "n02102040"):
        for split in ("train", "val"):
            path = Path("sets/imagenette2") / split / wnid
            path.mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(path / "0.JPEG")
    prepare_anew(source="torchvision", name="Imagenette", root="sets")


MISTAKES |= {
    "no `params.yaml`": remove_params,
    "a missing root": checking(root="elsewhere"),
    "a root of `dvc add` that was not fetched": checking(
        lambda: Path("elsewhere.dvc").write_text("outs: []"), root="elsewhere"
    ),
    "a root that is no folder and no archive": checking(
        lambda: Path("images.rar").write_bytes(b"Rar!"), root="images.rar"
    ),
    "a root that the stages write into": checking(root="."),
    "a checkpoint that the stages write": partial(
        with_params,
        "teacher",
        weights="checkpoint",
        checkpoint="models/teacher/weights.safetensors",
    ),
    "a file that is no tar, by `check`": checking(
        lambda: Path("images.tar").write_bytes(b"no archive"), root="images.tar"
    ),
    "a tar that was cut short, by `check`": checking(cut_a_tar, root="images.tar"),
    "a web page in an archive's place": checking(
        lambda: Path("images.zip").write_bytes(SIGN_IN), root="images.zip"
    ),
    "no `train/`": checking(lambda: Path("images/train").rename("images/test")),
    "two folders of one split": checking(
        partial(shutil.copytree, "images/train", "images/Training")
    ),
    "an unknown folder of class folders": checking(
        partial(shutil.copytree, "images/train", "images/holdout")
    ),
    "class folders in unknown folders": checking(
        partial(shutil.copytree, "images/train", "images/holdout"),
        lambda: Path("images/train").rename("images/mine"),
    ),
    "no class folders": checking(
        partial(shutil.copy, ANT / "000.png", "images/train/ant.0.png"),
        *(partial(shutil.rmtree, f"images/train/{name}") for name in ("ant", "bee", "cat")),
    ),
    "no image": checking(partial(shutil.rmtree, "images/train")),
    "a class folder without images": checking(Path("images/train/dog").mkdir),
    "one class": checking(*(partial(shutil.rmtree, f"images/train/{n}") for n in ("bee", "cat"))),
    "a class in `test/` alone": checking(partial(shutil.copytree, ANT, "images/test/dog")),
    "a class too small to split": checking(
        lambda: [path.unlink() for path in sorted(ANT.iterdir())[2:]]
    ),
    "two classes with one name, composed and not": checking(name_two_classes_alike),
    "a torchvision dataset that is partly unpacked": unpack_two_classes_of_imagenette,
    "unlabelled images in `train/`": checking(lambda: ANT.rename("images/train/unlabeled")),
    "a link to a folder": checking(link_to_a_folder),
    "a link to nothing": checking(lambda: (ANT / "x.png").symlink_to("nowhere")),
    "a pipe": checking(partial(os.mkfifo, ANT / "x.png")),
    "a name that is not UTF-8": checking(
        Path(os.fsdecode(b"images/train/ant/\xff.png")).touch,
    ),
    "a class without a test image": lambda: (
        shutil.copytree("images/train", "images/test", ignore=lambda *_: ["ant"])
        and capture(prepare_anew)
    ),
    "classes within outer folders": lambda: capture(wrap_classes),
    "classes that differ in case": lambda: ANT.rename("images/train/Bee") and capture(prepare_anew),
}


def capture(function: Callable[[], object]) -> str:
    """The printed lines of a function that refuses nothing."""
    output = io.StringIO()
    with redirect_stdout(output):
        function()
    return output.getvalue()


# Images.


def with_image(content: bytes, name: str = "x.png", **dataset: object) -> None:
    (ANT / name).write_bytes(content)
    prepare_anew(**dataset)


def with_large_file() -> None:
    (ANT / "x.png").touch()
    os.truncate(ANT / "x.png", 600_000_000)
    prepare_anew()


def saved(form: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or Image.new("RGB", (40, 30), "red")).save(file, form, **options)
    return file.getvalue()


def with_checksum_changed() -> None:
    content = bytearray((ANT / "000.png").read_bytes())
    content[content.index(b"IEND") - 5] ^= 1
    with_image(bytes(content))


def replacing_images(paths: Iterable[Path], content: bytes, **dataset: object) -> None:
    for path in paths:
        path.write_bytes(content)
    prepare_anew(**dataset)


TWELVE_BITS = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 16)
MISTAKES |= {
    "pixels that do not match their checksum": with_checksum_changed,
    "negative pixels": lambda: with_image(
        saved("TIFF", Image.fromarray(np.full((9, 9), -1, np.int32))), "x.tiff"
    ),
    "16-bit channels stored apart": lambda: with_image(
        tiff(np.zeros((9, 9, 3), int), 16, planar=2), "x.tiff"
    ),
    "16-bit images that use 12 bits": lambda: with_image(saved("PNG", TWELVE_BITS)),
    "a `bit_depth` that is too small": lambda: with_image(saved("PNG", TWELVE_BITS), bit_depth=10),
    "most images of one colour": lambda: replacing_images(
        Path("images").rglob("*.png"), saved("PNG", Image.new("RGB", (16, 16)))
    ),
    "a class without a readable image": lambda: replacing_images(
        ANT.iterdir(), b"", unreadable="skip"
    ),
    "zero bytes": partial(with_image, b""),
    "a text named `.png`": partial(with_image, b"no image"),
    "a truncated PNG": lambda: with_image((ANT / "000.png").read_bytes()[:400]),
    "a truncated JPEG": lambda: with_image(saved("JPEG")[:500], "x.jpg"),
    "50,000 x 50,000 pixels": lambda: with_image(png_of_any_size(50_000, 50_000)),
    "an animated GIF": lambda: with_image(
        saved("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))]), "x.gif"
    ),
    "an animated WebP": lambda: with_image(
        saved("WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30))]), "x.webp"
    ),
    "EPS, which is a program": partial(
        with_image, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x.eps"
    ),
    "floating-point pixels": lambda: with_image(
        saved("TIFF", Image.fromarray(np.zeros((9, 9), np.float32))), "x.tiff"
    ),
    "a photograph of a format that is not read": partial(
        with_image, b"\0\0\0\x18ftypheic\0\0\0\0", "x.heic"
    ),
    "an archive among the images": lambda: with_image(b"PK\x03\x04", "more.zip"),
    "a side too long for JPEG": lambda: with_image(
        saved("PNG", Image.new("L", (70_000, 16))), storage="encoded"
    ),
    "a file of 600 MB": with_large_file,
}


@pytest.mark.parametrize(
    ("name", "image", "form"),
    [
        ("x.jpg", Image.new("RGB", (40, 30)), "PNG"),  # a wrong extension
        ("x", Image.new("L", (40, 30)), "BMP"),
        ("x.jpg", Image.new("CMYK", (40, 30)), "JPEG"),
        ("x.png", Image.fromarray(np.zeros((40, 30), np.uint16)), "PNG"),
    ],
)
def test_only_the_bytes_of_a_file_decide_its_format(project, name, image, form):
    with_image(saved(form, image), name)
    assert sum(len(split) for split in open_dataset().splits.values()) == 61


def test_a_long_exif_is_accepted(project):
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    with_image(saved("JPEG", exif=exif), "x.jpg")


# Archives: nothing is unpacked, so nothing can be written.


def from_tar(*members: tuple[tarfile.TarInfo, bytes], suffix: str = ".tar") -> None:
    with tarfile.open(f"archive{suffix}", f"w:{suffix[5:]}") as archive:
        archive.add("images", ".")
        for member, content in members:
            member.size = member.size or len(content)
            archive.addfile(member, io.BytesIO(content))
    prepare_anew(root=f"archive{suffix}")


def member(name: str, **values: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(info, key, value)
    return info


def link(kind: bytes, to: str) -> None:
    from_tar((member("train/ant/x.png", type=kind, linkname=to), b""))


MISTAKES |= {
    "a name that leads out of a tar": lambda: from_tar((member("../../x.png"), b"x")),
    "an absolute name in a tar": lambda: from_tar((member("/tmp/x.png"), b"x")),
    "a symbolic link in a tar": lambda: link(tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link in a tar": lambda: link(tarfile.LNKTYPE, "train/ant/000.png"),
    "a device in a tar": lambda: link(tarfile.CHRTYPE, ""),
    "a member of a tar that says it has a terabyte": lambda: damaged_tar(".tar", prepend_terabyte),
}


def damaged_tar(suffix: str, damage: Callable[[bytes], bytes]) -> None:
    with tarfile.open(f"archive{suffix}", f"w:{suffix[5:]}") as archive:
        archive.add("images", ".")
    path = Path(f"archive{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    prepare_anew(root=path.name)


def prepend_terabyte(content: bytes) -> bytes:
    return member("train/ant/x.png", size=2**40).tobuf(tarfile.GNU_FORMAT) + content


def in_header(content: bytes) -> bytes:
    """Damage a name in the middle; tarfile alone would take it for the end of the archive."""
    place = content.index(b"train/bee/005.png")
    return content[:place] + b"T" + content[place + 1 :]


MISTAKES |= {
    "a truncated `.tar.gz`": lambda: damaged_tar(".tar.gz", lambda c: c[: len(c) // 2]),
    "a `.tar.gz` with a wrong checksum": lambda: damaged_tar(
        ".tar.gz", lambda c: c[:-8] + bytes(8)
    ),
    "a `.tar` with a damaged header": lambda: damaged_tar(".tar", in_header),
    "a `.tar` cut after a member": lambda: damaged_tar(".tar", lambda c: c.rstrip(b"\0")[:-1024]),
    "two tars in one file": lambda: damaged_tar(".tar", lambda c: c + c),
    "a file that is no archive": lambda: damaged_tar(".tar", lambda c: b"\0no archive"),
}


def from_zip(change: Callable[[zipfile.ZipFile], None]) -> None:
    with zipfile.ZipFile("archive.zip", "w") as archive:
        for path in sorted(Path("images").rglob("*.png")):
            archive.write(path, path.relative_to("images"))
        change(archive)
    prepare_anew(root="archive.zip")


def set_last(**values: object) -> Callable[[zipfile.ZipFile], None]:
    def change(archive: zipfile.ZipFile) -> None:
        for key, value in values.items():
            setattr(archive.infolist()[-1], key, value)

    return change


MISTAKES |= {
    "a name that leads out of a zip": lambda: from_zip(lambda z: z.writestr("../x.png", b"x")),
    "a link in a zip": lambda: from_zip(set_last(external_attr=0o120777 << 16)),
    "an encrypted zip": lambda: from_zip(set_last(flag_bits=1)),
    "a member of a zip that says it has a terabyte": lambda: from_zip(set_last(file_size=2**40)),
    "a zip with a wrong checksum": lambda: from_zip(set_last(CRC=1)),
}


# Checkpoints.


def load_checkpoint(
    content: object,
    name: str = "mine.pth",
    key: str | None = None,
    classes: list[int] | list[str] | None = None,
) -> None:
    """Write a checkpoint, and read it like `weights: checkpoint`."""
    path = Path(name)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    spec = InputSpec(3, 16, [0.5] * 3, [0.2] * 3)
    family = "onnx" if path.suffix == ".onnx" else "cifar_resnet"
    described = ModelSpec(family, "resnet8", {}, ["a", "b", "c"], spec)
    foreign_teacher.load_foreign(described, path, key, classes)


def state(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = cifar_resnet.build("resnet8", 3, 3).state_dict()
    return weights | {key.replace("_", ".", 1): value for key, value in changed.items()}


class Payload:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return (Path.touch, (Path("executed"),))


def cut_short(content: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()[:-100]


def within_itself() -> dict[str, object]:
    content: dict[str, object] = {"epoch": 3}
    content["model"] = content
    return content


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 44725828\n"


def hdf5_file() -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as content:
        content["model_weights"] = [1.0]
    return file.getvalue()


def zip_of_files(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return file.getvalue()


def tensor_without_storage() -> bytes:
    """A checkpoint of which one tensor is longer than its storage."""
    file, changed = io.BytesIO(), io.BytesIO()
    torch.save(state(fc_bias=torch.ones(3)), file)
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(changed, "w") as archive:
        sizes = {part.filename: part.file_size for part in whole.infolist()}
        last = max((n for n in sizes if sizes[n] == 12), key=lambda n: int(n.rpartition("/")[2]))
        for name in sizes:
            archive.writestr(name, whole.read(name)[: 4 if name == last else None])
    return changed.getvalue()


def thousand_outputs() -> dict[str, torch.Tensor]:
    return state(fc_weight=torch.zeros(1000, 64), fc_bias=torch.zeros(1000))


def lying_header() -> bytes:
    save_file(state(), "whole.safetensors")
    content = Path("whole.safetensors").read_bytes()
    return (2**62).to_bytes(8, "little") + content[8:]


def train_with_weights(value: float) -> None:
    torch.save(state(fc_weight=torch.full((3, 64), value)), "mine.pth")
    change_params("teacher", weights="checkpoint", checkpoint="mine.pth")
    run_stage("teacher")


def teach_in_reverse() -> None:
    own, _ = model_files.load(TEACHER.model, produced_by="-")
    weights = own.state_dict()
    reverse = {key: weights[key].flip(0) for key in ("fc.weight", "fc.bias")}
    torch.save(weights | reverse, "mine.pth")
    change_params("teacher", weights="checkpoint", checkpoint="mine.pth")
    run_stage("teacher")


def compressed() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    return file.getvalue()


def old_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return file.getvalue()


MISTAKES |= {
    "an empty file": partial(load_checkpoint, b""),
    "a file that is cut short": lambda: load_checkpoint(cut_short(state())),
    "a pointer of Git LFS": partial(load_checkpoint, LFS_POINTER),
    "a web page": partial(
        load_checkpoint,
        b"<!DOCTYPE html><html><head><title>Virus scan warning</title></head></html>",
    ),
    "an error of a server": partial(load_checkpoint, b'{"message": "Not Found"}'),
    "a checkpoint of Keras": lambda: load_checkpoint(hdf5_file()),
    "an ONNX file named .pth": lambda: load_checkpoint(onnx_model(lambda _: None)),
    "an archive of files": lambda: load_checkpoint(zip_of_files("best.pth")),
    "a pickle that torch did not write": partial(load_checkpoint, pickle.dumps({"epoch": 3})),
    "a tensor that leads out of the file": lambda: load_checkpoint(tensor_without_storage()),
    "pickled code alone": lambda: load_checkpoint({"state_dict": Payload()}),
    "other shapes": lambda: load_checkpoint(state(conv_weight=torch.zeros(16, 4, 3, 3))),
    "a further layer": lambda: load_checkpoint(state(conv_bias=torch.zeros(16))),
    "whole numbers for weights": lambda: load_checkpoint(
        state(fc_weight=torch.zeros(3, 64).to(torch.int8))
    ),
    "complex weights": lambda: load_checkpoint(
        state(fc_weight=torch.zeros(3, 64).to(torch.cfloat))
    ),
    "sparse weights": lambda: load_checkpoint(state(fc_weight=torch.zeros(3, 64).to_sparse())),
    "weights without contents": lambda: load_checkpoint(
        state(fc_weight=torch.zeros(3, 64, device="meta"))
    ),
    "a file without a state dict": partial(load_checkpoint, {"epoch": 3}),
    "a mapping within itself": lambda: load_checkpoint(within_itself()),
    "several sets of weights": lambda: load_checkpoint({"model": state(), "teacher": state()}),
    "averaged weights (EMA) that do not fit": lambda: load_checkpoint(
        {"model": state(), "ema": {"shadow": list(state().values())[:31]}}
    ),
    "two tensors of one name": lambda: load_checkpoint(
        {f"{'a' if key[:2] == 'fc' else 'body'}.{key}": value for key, value in state().items()}
        | {"b.fc.weight": torch.ones(3, 64)}
    ),
    "an unknown `checkpoint_key`": lambda: load_checkpoint({"model": state()}, key="modle"),
    "a `checkpoint_key` for weights that are trained": partial(
        with_params, "teacher", checkpoint_key="model"
    ),
    "outputs of other classes": lambda: load_checkpoint(thousand_outputs()),
    "too few numbers of outputs": lambda: load_checkpoint(thousand_outputs(), classes=[0, 1]),
    "a number that is no output": lambda: load_checkpoint(thousand_outputs(), classes=[0, 1, 1000]),
    "too few names of outputs": lambda: load_checkpoint(thousand_outputs(), classes=["a", "b"]),
    "numbers and names of outputs": partial(
        with_params, "teacher", weights="checkpoint", checkpoint="x", checkpoint_classes=[1, "a"]
    ),
    "a class that no output is named as": lambda: load_checkpoint(
        state(), classes=["a", "dog", "c"]
    ),
    "a compressed `.pth`": lambda: load_checkpoint(compressed()),
    "a tar, as torch wrote until 2017": lambda: load_checkpoint(old_tar()),
    "safetensors with a lying header": lambda: load_checkpoint(lying_header(), "mine.safetensors"),
    "a folder as the checkpoint": lambda: (
        Path("weights").mkdir()
        or with_params("teacher", weights="checkpoint", checkpoint="weights")
    ),
    "weights that are not finite": partial(train_with_weights, torch.nan),
    "a teacher of chance": partial(train_with_weights, 0.0),
    "classes in another order": teach_in_reverse,
}


def start(path: str | None, content: object = None, name: str = "new", **weights: object) -> str:
    """Let a student start from a file, and run its baseline unless `check` finds a problem."""
    if path == "mine.pth":
        torch.save(content or state(), path)
    if "sha256" in weights and weights["sha256"] is None:
        file = Path(path, "network.json") if Path(path).is_dir() else Path(path)
        weights["sha256"] = sha256_of_file(file)
    own = {"name": "resnet8", "weights": {"path": path, **weights} if weights else path}
    change_params("students", **{name: PARAMS["students"]["small"] | {"network": own}})
    return problems() or run_stage("baseline", name)


ZEROS, SMALL = "0" * 64, "models/students/small"
MISTAKES |= {
    "a path alone for `weights`": partial(start, "mine.pth"),
    "weights without a digest": partial(start, "mine.pth", head="kept"),
    "other weights than the digest's": partial(start, "mine.pth", sha256=ZEROS),
    "weights that are not there": partial(start, "gone.pth", sha256=ZEROS),
    "another student's weights that are not there": lambda: (
        change_params("students", other=PARAMS["students"]["small"])
        or start("models/students/other", sha256=ZEROS)
    ),
    "the student's own weights": partial(start, SMALL, name="small", sha256=None),
    "the weights alone of a network of the pipeline": partial(
        start, f"{SMALL}/weights.safetensors", sha256=None
    ),
    "a `key` in a network of the pipeline": partial(start, SMALL, sha256=None, key="model"),
    "several sets of weights to start from": lambda: start(
        "mine.pth", {"model": state(), "teacher": state()}, sha256=None
    ),
    "`partial` weights of which none fits": lambda: start(
        "mine.pth",
        {"a.weight": torch.ones(2), "b.weight": torch.ones(2)},
        sha256=None,
        partial=True,
    ),
    "a student's key for the teacher": partial(
        with_params, "teacher", network={"name": "resnet8", "weights": "pretrained"}
    ),
    "frozen layers of a network from scratch": partial(with_params, "training", freeze_epochs=1),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_accepted(project, dtype):
    load_checkpoint(
        {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in state().items()
        }
    )


def onnx_model(change: Callable[[onnx.ModelProto], None]) -> bytes:
    write_onnx(Path("whole.onnx"))
    model = onnx.load("whole.onnx")
    change(model)
    return model.SerializeToString()


def keep_outside(model: onnx.ModelProto, location: str = "/etc/passwd") -> None:
    tensor = model.graph.node[0].attribute.add(name="x", type=onnx.AttributeProto.TENSOR).t
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("length", "12")):
        tensor.external_data.add(key=key, value=value)


def keep_beside(model: onnx.ModelProto) -> None:
    Path("mine.onnx.data").write_bytes(bytes(10))
    keep_outside(model, "mine.onnx.data")


def return_two(model: onnx.ModelProto) -> None:
    model.graph.output.add().CopyFrom(model.graph.output[0])
    model.graph.output[1].name = "z"


def take_two(model: onnx.ModelProto) -> None:
    model.graph.input.add().CopyFrom(model.graph.input[0])
    model.graph.input[1].name = "mask"


def take_pixels(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8


def load_in_stage(content: bytes, **network: object) -> None:
    Path("mine.onnx").write_bytes(content)
    network |= {"name": "mine"}
    change_params(
        "teacher", family="onnx", network=network, weights="checkpoint", checkpoint="mine.onnx"
    )
    run_stage("teacher")


def load_folder_of_two() -> None:
    Path("weights").mkdir()
    for name in ("a", "b"):
        write_onnx(Path(f"weights/{name}.onnx"))
    spec = InputSpec(3, 16, [0.5] * 3, [0.2] * 3)
    spec = ModelSpec("onnx", "mine", {}, ["a", "b", "c"], spec)
    foreign_teacher.load_foreign(spec, Path("weights"))


def close_circle(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[:] = ["y"]


def end_in_probabilities(model: onnx.ModelProto) -> None:
    """By other operators than a last softmax."""
    logits = model.graph.output[0].name
    softmax = helper.make_node("Softmax", [logits], ["p"])
    model.graph.node.extend([softmax, helper.make_node("Abs", ["p"], ["probabilities"])])
    model.graph.output[0].name = "probabilities"


def take_a_terabyte(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**40


MISTAKES |= {
    "a file that is not ONNX": partial(load_checkpoint, b"garbage", "mine.onnx"),
    "external data in another folder": lambda: load_checkpoint(
        onnx_model(keep_outside), "mine.onnx"
    ),
    "external data that is missing": lambda: load_checkpoint(
        onnx_model(partial(keep_outside, location="mine.onnx.data")), "mine.onnx"
    ),
    "external data of another export": lambda: load_checkpoint(
        onnx_model(keep_beside), "mine.onnx"
    ),
    "several outputs that could be the logits": lambda: load_checkpoint(
        onnx_model(return_two), "mine.onnx"
    ),
    "several inputs": lambda: load_checkpoint(onnx_model(take_two), "mine.onnx"),
    "`mean` for a file that normalises": lambda: load_in_stage(
        onnx_model(take_pixels), mean=[0.5] * 3
    ),
    "a folder of two ONNX files": load_folder_of_two,
    "a circle of nodes": lambda: load_checkpoint(onnx_model(close_circle), "mine.onnx"),
    "probabilities that no last softmax made": lambda: load_checkpoint(
        onnx_model(end_in_probabilities), "mine.onnx"
    ),
    "a batch without end": lambda: load_checkpoint(onnx_model(take_a_terabyte), "mine.onnx"),
}


# Stores.


def with_index(**values: object) -> None:
    write_json(STORE / "store.json", read_json(STORE / "store.json", produced_by="-") | values)
    opened()


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def reading(act: Callable[..., object], *arguments: object) -> Callable[[], None]:
    """Do this to the finished store, and read it."""

    def make() -> None:
        act(*arguments)
        opened()

    return make


def flip_in_row() -> None:
    with h5py.File(SHARD, "r") as file:
        place = file["logits"].id.get_offset()
    flipped(SHARD, place)


def link_elsewhere(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["logits"]
        file["logits"] = h5py.ExternalLink("/tmp/other.h5", "logits")


def verify_foreign_shard() -> None:
    shutil.copy(SHARD, STORE / "mine.h5")
    verify(STORE, recompute=0, seed=0)


def verify_measured(**fidelity: float) -> None:
    index = read_json(STORE / "store.json", produced_by="-")
    write_json(STORE / "store.json", index | {"fidelity": index["fidelity"] | fidelity})
    verify(STORE, recompute=0, seed=0)


def lose_the_classes() -> None:
    """All logits share a number that leaves bfloat16 no digits for their differences."""
    shared = load_file(TEACHER.model / "weights.safetensors")
    torch.save(shared | {"fc.bias": shared["fc.bias"] - 20_000}, "mine.pth")
    change_params("teacher", weights="checkpoint", checkpoint="mine.pth")
    change_params("soft_targets", precision="bfloat16")
    run_stage("teacher")
    run_stage("soft_targets")


def inspect_damaged_top_k() -> None:
    change_params("soft_targets", encoding="top_k", k=2)
    run_stage("soft_targets")
    with h5py.File(STORE / "train_view00000_sample000000000.h5", "r+") as file:
        file["class_ids"][0] = 0xFF
    list(inspect(STORE))


MISTAKES |= {
    "a flipped bit in a row": reading(flip_in_row),
    "a flipped bit in the header": reading(flipped, SHARD, 3),
    "a truncated shard": reading(os.truncate, SHARD, 2000),
    "a missing shard": reading(SHARD.unlink),
    "a shard of another view under this one's name": reading(
        shutil.copy, STORE / "train_view00002_sample000000000.h5", SHARD
    ),
    "rows that do not say what the teacher says": partial(verify_measured, agreement=0.3194),
    "logits that share a large number, in half precision": lose_the_classes,
    "a foreign shard": verify_foreign_shard,
    "a shard that links to another file": reading(link_elsewhere, SHARD),
    "a damaged top_k store, by `inspect`": inspect_damaged_top_k,
    "a newer format": partial(with_index, format_version=99),
    "an index with another type": partial(with_index, num_views="3"),
    "an index with impossible numbers": partial(with_index, num_views=-1),
    "an index with too few class names": partial(with_index, class_names=["ant"]),
    "a store of another dataset": partial(with_index, dataset_fingerprint="0" * 64),
    "a store of another teacher": partial(with_index, teacher_fingerprint="0" * 64),
    "a store of other views": partial(with_index, seed=8),
    "an index that is not JSON": reading((STORE / "store.json").write_text, "{"),
    "an index that is not a mapping": reading((STORE / "store.json").write_text, "[]"),
}


# Imported logits.


def import_table(**changes: Callable[[np.ndarray], np.ndarray]) -> None:
    """Import a table with a row for each image, with some of its arrays changed."""
    dataset = open_dataset()
    ids = [each for split in dataset.splits.values() for each in split.sample_ids]
    labels = np.concatenate([split.labels for split in dataset.splits.values()])
    arrays = {
        "ids": np.array(ids),
        "logits": 4 * np.eye(3, dtype=np.float32)[labels] - 1,
        "class_names": np.array(dataset.class_names),
    }
    np.savez("mine.npz", **arrays | {key: change(arrays[key]) for key, change in changes.items()})
    import_logits(Path("mine.npz"), Path("mine"))


def text(content: str) -> None:
    Path("mine.csv").write_text(content, "utf-8")
    import_logits(Path("mine.csv"), Path("mine"))


def store_of_others(change: Callable[[Path], None]) -> None:
    shutil.copytree(STORE, "mine")
    change(Path("mine/test_view00000_sample000000000.h5"))
    change_params("teacher", family="logits", network="mine", weights="logits", checkpoint="mine")
    run_stage("teacher")


def lose_a_shard() -> str:
    shutil.copytree(STORE, "mine")
    Path("mine", SHARD.name).unlink()
    teacher = {"family": "logits", "network": "mine", "weights": "logits", "checkpoint": "mine"}
    return with_params("teacher", **teacher) or "\n".join(check_networks.problems())


def compress(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        logits = file["logits"][()]
        del file["logits"]
        file.create_dataset("logits", data=logits, compression="gzip")


MISTAKES |= {
    "no folder of a store": lambda: (
        Path("mine.txt").touch()
        or with_params("teacher", weights="logits", family="logits", checkpoint="mine.txt")
    ),
    "a store without one of its shards, by `check`": lose_a_shard,
    "images without logits": partial(import_table, ids=lambda ids: np.char.add("x", ids)),
    "probabilities for logits": partial(import_table, logits=lambda a: np.abs(a) / 5),
    "percentages for logits": partial(import_table, logits=lambda a: 97 * (a > 0) + 1.5 * (a < 0)),
    "hard labels for logits": partial(import_table, logits=lambda a: 1 * (a > 0)),
    "logits that are not finite": partial(import_table, logits=lambda a: a * np.inf),
    "unknown class names": partial(import_table, class_names=lambda names: names[[0, 1, 1]]),
    "pickled ids": partial(import_table, ids=lambda ids: ids.astype(object)),
    "a table without its header": partial(text, "train/ant/000.png,1,2,3\n"),
    "a store with compressed logits": partial(store_of_others, compress),
    "a store whose logits are elsewhere": partial(store_of_others, link_elsewhere),
}


# Trainings.


class Clipped(torch.nn.BatchNorm2d):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features).clamp(-3, 3)


def run_out_of_memory() -> str:
    """As if a student trained."""
    with patch.object(signals, "running_command", lambda: "pipeline.stages.student"):
        try:
            run_command(lambda: torch.empty(10**15))
        except SystemExit as end:
            return str(end.code)


def join_on_a_machine_with(gpus: int, **environment: str) -> None:
    """Start as one of several processes, on a machine with so many GPUs."""
    count = patch.object(torch.cuda, "device_count", lambda: gpus)
    available = patch.object(torch.cuda, "is_available", lambda: True)
    with patch.dict(os.environ, environment), available, count:
        distributed.launch("-")
        with distributed.process_group():
            pass


MISTAKES |= {
    "more memory than there is": run_out_of_memory,
    "more processes than GPUs": partial(join_on_a_machine_with, 2, PROCESSES="4"),
    "more processes than GPUs, by torchrun": partial(
        join_on_a_machine_with, 2, RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="4"
    ),
    "frozen epochs for a network without a last layer for the classes": lambda: head_parameters(
        torch.nn.Flatten(),
        ModelSpec("cifar_resnet", "resnet8", {}, ["a", "b"], InputSpec(3, 16, [0.5] * 3, [1] * 3)),
    ),
    "a batch norm of one's own in several processes": lambda: synchronise_batch_norm(Clipped(5)),
}


# Exported students.


def write_exported(**metadata: str) -> None:
    """Write a graph whose logits are the mean of each colour, with metadata of three classes."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("GlobalAveragePool", ["x"], ["y"]),
            helper.make_node("Flatten", ["y"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    reading = {"storage": "pixels", "image_size": 16}
    card = OnnxMetadata(
        name="mine",
        role="distilled",
        precision="float32",
        fingerprint="-",
        class_names=["ant", "bee", "cat"],
        opset=17,
        channels=3,
        image_size=16,
        reading=reading,
    )
    helper.set_model_props(model, card.metadata() | metadata)
    onnx.save(model, "mine.onnx")


def predicted(*places: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["predict", "mine.onnx", *places])
        predict.main()


def predicted_by(metadata: dict[str, str]) -> None:
    write_exported(**metadata)
    predicted("images")


def predict_by_foreign_onnx() -> None:
    write_onnx(Path("mine.onnx"))
    predicted("images")


def predict_text() -> None:
    write_exported()
    Path("notes.txt").write_text("no image")
    predicted("images", "notes.txt")


MISTAKES |= {
    "a missing student": partial(predicted, "images"),
    "an ONNX file that `export` did not write": predict_by_foreign_onnx,
    "changed metadata": partial(predicted_by, {"channels": "4"}),
    "classes that are not the graph's": partial(predicted_by, {"class_names": '["ant", "bee"]'}),
    "a file to classify that is not an image": predict_text,
    "`int8_training` of a network without layers that round": lambda: (
        FakeQuantized(torch.nn.Flatten(), "own") and None
    ),
}


# What stages wrote.


def then(stage: str, act: Callable[..., object], *arguments: object) -> Callable[[], None]:
    """Do this in the finished project, and run the stage."""

    def make() -> None:
        act(*arguments)
        run_stage(stage)

    return make


def change_json(path: str, **values: object) -> None:
    write_json(Path(path), read_json(Path(path), produced_by="-") | values)


def change_bytes(path: str, old: bytes, new: bytes) -> None:
    Path(path).write_bytes(Path(path).read_bytes().replace(old, new, 1))


def change_a_label() -> None:
    labels = np.load("data/prepared/train_labels.npy")
    labels[0] = 77
    np.save("data/prepared/train_labels.npy", labels)
    open_dataset()


def take_predictions_of_other_files() -> None:
    path = ExportOutputs("small").corrupted_predictions
    save_file(load_file(path), path, {"made_from": '{"files": {"distilled.float32": "0"}}'})


def put_a_folder_in_place_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


MISTAKES |= {
    "`dataset.json` changed": lambda: (
        change_json("data/prepared/dataset.json", std=[0.0, 1.0, 1.0]) or open_dataset()
    ),
    "a label out of range": change_a_label,
    "an array with a damaged header": lambda: (
        change_bytes("data/prepared/train_images.npy", b"(36,", b"((((") or open_dataset()
    ),
    "`network.json` changed": then(
        "soft_targets", change_bytes, "models/teacher/network.json", b"16", b"1000000000"
    ),
    "weights changed": then("soft_targets", flipped, TEACHER.model / "weights.safetensors", -1),
    "weights absent": then("soft_targets", (TEACHER.model / "weights.safetensors").unlink),
    "metrics changed": then(
        "compare", partial(change_json, "metrics/students/small.json", parameters="many")
    ),
    "a history changed": then(
        "compare", change_bytes, "metrics/history/students/small.csv", b"\n2,", b"\n999999999,"
    ),
    "a history of a training that was killed": then(
        "compare", change_bytes, "metrics/history/students/small.csv", b"True", b"False"
    ),
    "a history of another training than the metrics": then(
        "compare", partial(change_json, "metrics/students/small.json", kept_epoch=9)
    ),
    "predictions truncated": then(
        "compare", os.truncate, "predictions/exported/students/small.safetensors", 100
    ),
    "predictions of other files than the exported": then(
        "compare", take_predictions_of_other_files
    ),
    "a folder in a file's place": then(
        "compare", put_a_folder_in_place_of, Path("metrics/comparison.json")
    ),
}


# Names.

ODD_NAMES = ("-rf", "a b", "<i>é & \U0001f98a", "..x|`$(touch executed)`")


def test_names_of_any_letters_are_carried_through_to_the_report(folder):
    """Only a folder whose name begins with a dot is hidden."""
    root = folder / "-my images/é"
    write_images(root)
    for path, name in zip(sorted((root / "train").iterdir()), ODD_NAMES, strict=False):
        (path / "000.png").rename(path / "--help \u202e.png")
        path.rename(path.with_name(name))
    params = PARAMS | {"dataset": PARAMS["dataset"] | {"root": "-my images/é"}}
    run_every_stage(folder, params)
    assert list(open_dataset().class_names) == sorted(ODD_NAMES[:3])
    page = Path("reports/index.html").read_text("utf-8")
    assert "&lt;i&gt;é" in page
    assert "<i>é" not in page
    assert problems() == ""
    assert not Path("executed").exists()


# The campaign of wrong inputs.


def test_the_campaign_records_what_an_input_executes_or_writes_outside(project):
    for act, noted in (
        (lambda: os.system("true"), "executed: os.system"),
        (lambda: subprocess.run(["true"], check=False), "executed: subprocess.Popen"),
        (lambda: Path("../outside").write_text("x"), "wrote outside: open"),
        (lambda: os.mkdir("../folder"), "wrote outside: os.mkdir"),
        (lambda: Path("inside").write_text("x"), "$"),
        (lambda: Path("/etc/hostname").exists(), "$"),
    ):
        watch = Watch(Path())
        watch.on = True
        act()
        watch.on = False
        assert re.match(noted, watch.noted)


def test_wrong_inputs_of_every_kind_are_refused_or_read_correctly(capsys):
    run_module("soak.hostile_inputs", "--inputs", "22", "--jobs", "1")
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert counts["accepted"] + counts["refused"] == counts["inputs"] == 22
    assert min(counts["accepted"], counts["refused"]) > 3
