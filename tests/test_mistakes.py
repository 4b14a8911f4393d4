"""Each mistake of docs/mistakes.md gets the message that the page quotes."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import onnx
import pytest
import torch
import yaml
from conftest import PARAMS, change_params, opened, run_every_stage, run_stage, write_images
from conftest import prepare as prepare_anew
from import_closure import ROOT
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file

from pipeline.commands import check, predict
from pipeline.commands.store import inspect, verify
from pipeline.data.prepared.dataset import open_dataset
from pipeline.export.onnx_model import OnnxMetadata
from pipeline.models.spec import InputSpec, ModelSpec
from pipeline.networks import cifar_resnet
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, write_json
from pipeline.runtime.outputs import TEACHER
from pipeline.students.params import load_student
from pipeline.teacher import foreign_checkpoint
from soak.hostile import png_of_any_size
from soak.hostile_inputs import Watch, write_onnx

PAGE = (ROOT / "docs/mistakes.md").read_text("utf-8")
ROWS = dict(re.findall(r"^\| ([^|]+?) \| `` (.+?) `` \|$", PAGE, re.MULTILINE))
ANT, STORE = Path("images/train/ant"), Path("data/soft_targets")
SHARD = STORE / "train_view00001_sample000000000.h5"
Mistake = Callable[[], str | None]
MISTAKES: dict[str, Mistake] = {}


def mistake(row: str) -> Callable[[Mistake], Mistake]:
    """Register the function that makes a row's mistake. It raises the UserError, or returns the
    message."""

    def register(make: Mistake) -> Mistake:
        assert row not in MISTAKES, row
        MISTAKES[row] = make
        return make

    return register


def test_the_page_and_the_tests_list_the_same_mistakes():
    assert ROWS.keys() == MISTAKES.keys()
    assert len(ROWS) == PAGE.count("| `` ")


@pytest.mark.parametrize("row", ROWS)
def test_each_mistake_gets_the_message_of_the_page(project, row):
    try:
        message = MISTAKES[row]()
    except UserError as error:
        message = str(error)
    assert message, "accepted"
    parts = (re.escape(part.strip()) for part in ROWS[row].split("…"))
    assert re.search(".*".join(parts), " ".join(message.split())), message
    assert not Path("executed").exists()


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


BOMB = "b0: &b0 [x]\n" + "".join(
    f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
for _row, _make in {
    "another type": partial(with_params, "training", epochs="ten"),
    "out of range": partial(with_params, "views", seed=-1),
    "not one of the choices": partial(with_params, "teacher", weights="pretraind"),
    "an unknown key": partial(with_params, "training", epoch=3),
    "an unknown section": partial(with_line, "distilation: {}"),
    "two keys that exclude each other": partial(
        with_params, "training", optimizer="adamw", momentum=0.8
    ),
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
    "nesting without end": partial(with_text, "[" * 5000),
}.items():
    mistake(_row)(_make)


@mistake("no `params.yaml`")
def _():
    Path("params.yaml").unlink()
    return problems()


# Datasets: messages of `python -m pipeline.commands.check`, or of `prepare`.


@mistake("a missing root")
def _():
    return with_params("dataset", root="elsewhere")


@mistake("a root that is no folder and no archive")
def _():
    Path("images.rar").write_bytes(b"Rar!")
    return with_params("dataset", root="images.rar")


@mistake("a root that the stages write into")
def _():
    return with_params("dataset", root=".")


@mistake("a checkpoint that the stages write")
def _():
    return with_params(
        "teacher", weights="checkpoint", checkpoint="models/teacher/weights.safetensors"
    )


@mistake("a file that is no tar, by `check`")
def _():
    Path("images.tar").write_bytes(b"no archive")
    return with_params("dataset", root="images.tar")


@mistake("no `train/`")
def _():
    Path("images/train").rename("images/training")
    return problems()


@mistake("a class folder without images")
def _():
    Path("images/train/dog").mkdir()
    return problems()


@mistake("one class")
def _():
    shutil.rmtree("images/train/bee")
    shutil.rmtree("images/train/cat")
    return problems()


@mistake("a class in `test/` alone")
def _():
    shutil.copytree(ANT, "images/test/dog")
    return problems()


@mistake("a class too small to split")
def _():
    for path in sorted(ANT.iterdir())[2:]:
        path.unlink()
    return problems()


@mistake("two classes with one name, composed and not")
def _():
    ANT.rename("images/train/" + unicodedata.normalize("NFC", "é"))
    Path("images/train/bee").rename("images/train/" + unicodedata.normalize("NFD", "é"))
    return problems()


@mistake("a link to a folder")
def _():
    ANT.rename("elsewhere")
    ANT.symlink_to(Path("elsewhere").absolute())
    return problems()


@mistake("a link to nothing")
def _():
    (ANT / "x.png").symlink_to("nowhere")
    return problems()


@mistake("a pipe")
def _():
    os.mkfifo(ANT / "x.png")
    return problems()


@mistake("a name that is not UTF-8")
def _():
    Path(os.fsdecode(b"images/train/ant/\xff.png")).write_bytes(b"")
    return problems()


@mistake("classes that differ in case")
def _():
    ANT.rename("images/train/Bee")
    return capture(prepare_anew)


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


def saved(form: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or Image.new("RGB", (40, 30), "red")).save(file, form, **options)
    return file.getvalue()


for _row, _make in {
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
    "an archive among the images": lambda: with_image(b"PK\x03\x04", "more.zip"),
    "a side too long for JPEG": lambda: with_image(
        saved("PNG", Image.new("L", (70_000, 16))), storage="encoded"
    ),
}.items():
    mistake(_row)(_make)


@mistake("a file of 600 MB")
def _():
    (ANT / "x.png").touch()
    os.truncate(ANT / "x.png", 600_000_000)
    prepare_anew()


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


for _row, _make in {
    "a name that leads out of a tar": lambda: from_tar((member("../../x.png"), b"x")),
    "an absolute name in a tar": lambda: from_tar((member("/tmp/x.png"), b"x")),
    "a symbolic link in a tar": lambda: link(tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link in a tar": lambda: link(tarfile.LNKTYPE, "train/ant/000.png"),
    "a device in a tar": lambda: link(tarfile.CHRTYPE, ""),
}.items():
    mistake(_row)(_make)


@mistake("a member of a tar that says it has a terabyte")
def _():
    with tarfile.open("archive.tar", "w") as archive:
        archive.add("images", ".")
    whole = Path("archive.tar").read_bytes()
    header = member("train/ant/x.png", size=2**40).tobuf(tarfile.GNU_FORMAT)
    Path("archive.tar").write_bytes(header + whole)
    prepare_anew(root="archive.tar")


def damaged_tar(suffix: str, damage: Callable[[bytes], bytes]) -> None:
    with tarfile.open(f"archive{suffix}", f"w:{suffix[5:]}") as archive:
        archive.add("images", ".")
    path = Path(f"archive{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    prepare_anew(root=path.name)


def in_header(content: bytes) -> bytes:
    """Damage a name in the middle; tarfile alone would take it for the end of the archive."""
    place = content.index(b"train/bee/005.png")
    return content[:place] + b"T" + content[place + 1 :]


for _row, _make in {
    "a truncated `.tar.gz`": lambda: damaged_tar(".tar.gz", lambda c: c[: len(c) // 2]),
    "a `.tar.gz` with a wrong checksum": lambda: damaged_tar(
        ".tar.gz", lambda c: c[:-8] + bytes(8)
    ),
    "a `.tar` with a damaged header": lambda: damaged_tar(".tar", in_header),
    "a `.tar` cut after a member": lambda: damaged_tar(".tar", lambda c: c.rstrip(b"\0")[:-1024]),
    "two tars in one file": lambda: damaged_tar(".tar", lambda c: c + c),
    "a file that is no archive": lambda: damaged_tar(".tar", lambda c: b"no archive"),
}.items():
    mistake(_row)(_make)


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


for _row, _make in {
    "a name that leads out of a zip": lambda: from_zip(lambda z: z.writestr("../x.png", b"x")),
    "a link in a zip": lambda: from_zip(set_last(external_attr=0o120777 << 16)),
    "an encrypted zip": lambda: from_zip(set_last(flag_bits=1)),
    "a member of a zip that says it has a terabyte": lambda: from_zip(set_last(file_size=2**40)),
    "a zip with a wrong checksum": lambda: from_zip(set_last(CRC=1)),
}.items():
    mistake(_row)(_make)


# Checkpoints.


def load_checkpoint(content: object, name: str = "mine.pth", **options: object) -> None:
    """Write a checkpoint, and read it like `weights: checkpoint`."""
    path = Path(name)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, **options)
    spec = InputSpec(3, 16, [0.5] * 3, [0.2] * 3)
    family = "onnx" if path.suffix == ".onnx" else "cifar_resnet"
    foreign_checkpoint.load_foreign(ModelSpec(family, "resnet8", {}, ["a", "b", "c"], spec), path)


def state(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = cifar_resnet.build("resnet8", 3, 3).state_dict()
    return weights | {key.replace("_", ".", 1): value for key, value in changed.items()}


class Payload:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return (Path.touch, (Path("executed"),))


def within_itself() -> dict[str, object]:
    content: dict[str, object] = {"epoch": 3}
    content["model"] = content
    return content


def lying_header() -> bytes:
    save_file(state(), "whole.safetensors")
    content = Path("whole.safetensors").read_bytes()
    return (2**62).to_bytes(8, "little") + content[8:]


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


for _row, _make in {
    "an empty file": partial(load_checkpoint, b""),
    "pickled code": lambda: load_checkpoint({"state_dict": Payload()}),
    "other shapes": lambda: load_checkpoint(state(fc_weight=torch.zeros(10, 64))),
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
    "several state dicts": lambda: load_checkpoint({"a": state(), "b": state()}),
    "a compressed `.pth`": lambda: load_checkpoint(compressed()),
    "a tar, as torch wrote until 2017": lambda: load_checkpoint(old_tar()),
    "safetensors with a lying header": lambda: load_checkpoint(lying_header(), "mine.safetensors"),
}.items():
    mistake(_row)(_make)


@mistake("a folder as the checkpoint")
def _():
    Path("weights").mkdir()
    return with_params("teacher", weights="checkpoint", checkpoint="weights")


@mistake("weights that are not finite")
def _():
    weights = state(fc_weight=torch.full((3, 64), torch.nan))
    torch.save(weights, "mine.pth")
    change_params("teacher", weights="checkpoint", checkpoint="mine.pth")
    run_stage("teacher")


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


def keep_outside(model: onnx.ModelProto) -> None:
    tensor = model.graph.node[0].attribute.add(name="x", type=onnx.AttributeProto.TENSOR).t
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def close_circle(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[:] = ["y"]


def take_a_terabyte(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**40


for _row, _make in {
    "a file that is not ONNX": partial(load_checkpoint, b"garbage", "mine.onnx"),
    "external data": lambda: load_checkpoint(onnx_model(keep_outside), "mine.onnx"),
    "a circle of nodes": lambda: load_checkpoint(onnx_model(close_circle), "mine.onnx"),
    "a batch without end": lambda: load_checkpoint(onnx_model(take_a_terabyte), "mine.onnx"),
}.items():
    mistake(_row)(_make)


# Stores.


def with_index(**values: object) -> None:
    write_json(STORE / "store.json", read_json(STORE / "store.json", produced_by="-") | values)
    opened()


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@mistake("a flipped bit in a row")
def _():
    with h5py.File(SHARD, "r") as file:
        place = file["logits"].id.get_offset()
    flipped(SHARD, place)
    opened()


@mistake("a flipped bit in the header")
def _():
    flipped(SHARD, 3)
    opened()


@mistake("a truncated shard")
def _():
    os.truncate(SHARD, 2000)
    opened()


@mistake("a missing shard")
def _():
    SHARD.unlink()
    opened()


@mistake("a shard of another view under this one's name")
def _():
    shutil.copy(STORE / "train_view00002_sample000000000.h5", SHARD)
    opened()


@mistake("a foreign shard")
def _():
    shutil.copy(SHARD, STORE / "mine.h5")
    verify(STORE, recompute=0, seed=0)


@mistake("a shard that links to another file")
def _():
    with h5py.File(SHARD, "r+") as file:
        del file["logits"]
        file["logits"] = h5py.ExternalLink("/tmp/other.h5", "logits")
    opened()


@mistake("a damaged top_k store, by `inspect`")
def _():
    change_params("soft_targets", encoding="top_k", k=2)
    run_stage("soft_targets")
    path = STORE / "train_view00000_sample000000000.h5"
    with h5py.File(path, "r+") as file:
        file["class_ids"][0] = 0xFF
    list(inspect(STORE))


for _row, _make in {
    "a newer format": partial(with_index, format_version=99),
    "an index with another type": partial(with_index, num_views="3"),
    "an index with impossible numbers": partial(with_index, num_views=-1),
    "an index with too few class names": partial(with_index, class_names=["ant"]),
    "a store of another dataset": partial(with_index, dataset_fingerprint="0" * 64),
    "a store of another teacher": partial(with_index, teacher_fingerprint="0" * 64),
    "a store of other views": partial(with_index, seed=8),
}.items():
    mistake(_row)(_make)


@mistake("an index that is not JSON")
def _():
    (STORE / "store.json").write_text("{")
    opened()


@mistake("an index that is not a mapping")
def _():
    (STORE / "store.json").write_text("[]")
    opened()


# Imported logits.


def import_logits(path: str) -> None:
    change_params("teacher", family="logits", network="mine", weights="logits", checkpoint=path)
    run_stage("teacher")


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
    import_logits("mine.npz")


def text(content: str) -> None:
    Path("mine.csv").write_text(content, "utf-8")
    import_logits("mine.csv")


def store_of_others(change: Callable[[h5py.File], None]) -> None:
    shutil.copytree(STORE, "mine")
    with h5py.File("mine/test_view00000_sample000000000.h5", "r+") as file:
        change(file)
    import_logits("mine")


def compress(file: h5py.File) -> None:
    logits = file["logits"][()]
    del file["logits"]
    file.create_dataset("logits", data=logits, compression="gzip")


def point_elsewhere(file: h5py.File) -> None:
    del file["logits"]
    file["logits"] = h5py.ExternalLink("/tmp/other.h5", "logits")


@mistake("neither a table nor a store")
def _():
    Path("mine.txt").write_text("logits")
    change_params("teacher", weights="logits", family="logits", checkpoint="mine.txt")
    return problems()


for _row, _make in {
    "images without logits": partial(import_table, ids=lambda ids: np.char.add("x", ids)),
    "probabilities for logits": partial(import_table, logits=lambda a: np.abs(a) / 5),
    "logits that are not finite": partial(import_table, logits=lambda a: a * np.inf),
    "unknown class names": partial(import_table, class_names=lambda names: names[[0, 1, 1]]),
    "pickled ids": partial(import_table, ids=lambda ids: ids.astype(object)),
    "a table without its header": partial(text, "train/ant/000.png,1,2,3\n"),
    "a store with compressed logits": partial(store_of_others, compress),
    "a store whose logits are elsewhere": partial(store_of_others, point_elsewhere),
}.items():
    mistake(_row)(_make)


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
    card = OnnxMetadata("mine", "-", ["ant", "bee", "cat"], 17, 3, 16, reading)
    helper.set_model_props(model, card.metadata() | metadata)
    onnx.save(model, "mine.onnx")


def predicted(*places: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["predict", "mine.onnx", *places])
        predict.main()


@mistake("a missing student")
def _():
    predicted("images")


@mistake("an ONNX file that `export` did not write")
def _():
    write_onnx(Path("mine.onnx"))
    predicted("images")


@mistake("changed metadata")
def _():
    write_exported(channels="4")
    predicted("images")


@mistake("classes that are not the graph's")
def _():
    write_exported(class_names='["ant", "bee"]')
    predicted("images")


@mistake("a file to classify that is not an image")
def _():
    write_exported()
    Path("notes.txt").write_text("no image")
    predicted("images", "notes.txt")


# What stages wrote.


@mistake("`dataset.json` changed")
def _():
    path = Path("data/prepared/dataset.json")
    write_json(path, read_json(path, produced_by="-") | {"std": [0.0, 1.0, 1.0]})
    open_dataset()


@mistake("a label out of range")
def _():
    path = Path("data/prepared/train_labels.npy")
    labels = np.load(path)
    labels[0] = 77
    np.save(path, labels)
    open_dataset()


@mistake("an array with a damaged header")
def _():
    path = Path("data/prepared/train_images.npy")
    path.write_bytes(path.read_bytes().replace(b"(36,", b"((((", 1))
    open_dataset()


@mistake("`network.json` changed")
def _():
    path = TEACHER.model / "network.json"
    content = read_json(path, produced_by="-")
    write_json(path, content | {"input": content["input"] | {"size": 10**9}})
    run_stage("soft_targets")


@mistake("weights changed")
def _():
    flipped(TEACHER.model / "weights.safetensors", -1)
    run_stage("soft_targets")


@mistake("weights absent")
def _():
    (TEACHER.model / "weights.safetensors").unlink()
    run_stage("soft_targets")


@mistake("metrics changed")
def _():
    path = Path("metrics/students/small.json")
    write_json(path, read_json(path, produced_by="-") | {"parameters": "many"})
    run_stage("compare")


@mistake("a history changed")
def _():
    path = Path("metrics/history/students/small.csv")
    path.write_text(path.read_text("utf-8").replace("\n2,", "\n999999999,"))
    run_stage("compare")


@mistake("predictions truncated")
def _():
    os.truncate("predictions/students/small.safetensors", 100)
    run_stage("compare")


@mistake("a folder in a file's place")
def _():
    Path("metrics/comparison.json").unlink()
    Path("metrics/comparison.json").mkdir()
    run_stage("compare")


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


@pytest.mark.parametrize(
    ("act", "noted"),
    [
        (lambda: os.system("true"), "executed: os.system"),
        (lambda: subprocess.run(["true"], check=False), "executed: subprocess.Popen"),
        (lambda: Path("../outside").write_text("x"), "wrote outside: open"),
        (lambda: os.mkdir("../folder"), "wrote outside: os.mkdir"),
        (lambda: Path("inside").write_text("x"), ""),
        (lambda: Path("/etc/hostname").exists(), ""),
    ],
)
def test_the_campaign_records_what_an_input_executes_or_writes_outside(project, act, noted):
    watch = Watch(Path())
    watch.on = True
    act()
    watch.on = False
    assert watch.noted.startswith(noted)
    assert bool(watch.noted) == bool(noted)


def test_wrong_inputs_of_every_kind_are_refused_or_read_correctly():
    result = subprocess.run(
        [sys.executable, "-m", "soak.hostile_inputs", "--inputs", "66", "--jobs", "1"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["accepted"] + counts["refused"] == counts["inputs"] == 66
    assert min(counts["accepted"], counts["refused"]) > 10
