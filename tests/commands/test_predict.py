"""The command `predict` reads an image file as the pipeline does, without torch."""

import json
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import prepare, run_module, write_images
from image_files import deep_png, saved
from PIL import Image
from safetensors.numpy import load_file
from stage_process import start_module

from pipeline.commands import predict
from pipeline.data.prepared.dataset import EncodedSplit, open_dataset
from pipeline.data.prepared.image_decoding import FORMATS
from pipeline.data.sources.params import DatasetParams
from pipeline.export.running.onnx_model import OnnxMetadata
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import UserError
from pipeline.runtime.params import load_section
from pipeline.stages.export import reading_of
from pipeline.views.loader import open_views
from pipeline.views.policy import ViewPolicy

MODEL = "models/exported/small.onnx"


def run(*arguments: str) -> None:
    run_module("pipeline.commands.predict", *arguments)


@pytest.mark.parametrize("kind", ["finished_project", "finished_encoded_project"])
def test_files_of_the_test_split_are_classified_as_the_student_was_tested(
    kind, request, monkeypatch, capsys
):
    monkeypatch.chdir(request.getfixturevalue(kind))
    dataset = open_dataset()
    test = dataset.splits["test"]
    assert isinstance(test, EncodedSplit) == (kind == "finished_encoded_project")
    files = [f"images/{sample_id}" for sample_id in test.sample_ids]
    capsys.readouterr()  # drop what the stages printed
    run(MODEL, *files, "--json", "--top", "3")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    logits = load_file("predictions/students/small.safetensors")["test"].astype(np.float64)
    assert [row["file"] for row in rows] == files
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for row, expected in zip(rows, probabilities, strict=True):
        printed = {entry["class"]: entry["probability"] for entry in row["classes"]}
        assert list(printed) == [dataset.class_names[label] for label in np.argsort(-expected)]
        assert list(printed.values()) == pytest.approx(sorted(expected, reverse=True), abs=1e-5)


def write_odd_images(root: Path) -> None:
    """Write images of every mode and shape."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 4), np.uint8)
    smooth = Image.fromarray(noise[:6, :9, :3]).resize((90, 60), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    for name in ("ant", "bee", "cat"):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        smooth.save(folder / "0.jpg", exif=exif)
        Image.fromarray(noise).save(folder / "1.png")  # transparent here and there
        smooth.convert("CMYK").save(folder / "2.jpg")
        smooth.convert("P").save(folder / "3.png")
        smooth.convert("L").resize((11, 9)).save(folder / "4.png")
        deep.save(folder / "5.png")


@pytest.mark.parametrize(
    ("reading", "side", "channels"),
    [
        ({"storage": "pixels", "image_size": 16}, 16, 3),
        ({"storage": "pixels", "image_size": 24}, 16, 1),
        ({"storage": "encoded", "image_size": 40, "quality": 80}, 16, 1),
        ({"storage": "encoded", "image_size": 40, "quality": "original"}, 24, 3),
    ],
)
def test_any_file_becomes_the_pixels_that_the_pipeline_decodes(folder, reading, side, channels):
    write_odd_images(folder / "images")
    split = prepare(**reading, channels=channels).resized(side).splits["train"]
    views = open_views(split, ViewPolicy("none"), 0, torch.device("cpu"), num_workers=0)
    (batch,) = views.batches(0, [np.arange(len(split))])
    metadata = OnnxMetadata(
        name="mine",
        role="distilled",
        precision="float32",
        fingerprint="-",
        class_names=["a", "b"],
        opset=18,
        channels=channels,
        image_size=side,
        reading=reading_of(load_section(DatasetParams, "dataset"), InputSpec(1, side, [0], [1])),
    )
    assert len(split) >= 6
    for sample_id, expected in zip(split.sample_ids, batch.pixels.numpy(), strict=True):
        pixels = predict.student_input((folder / "images" / sample_id).read_bytes(), metadata)
        assert np.array_equal(pixels, expected), sample_id


def test_a_deep_image_is_scaled_as_the_students_dataset_was(exported, tmp_path, capsys):
    values = np.random.default_rng(0).integers(0, 4096, (16, 16, 1))
    (tmp_path / "deep.png").write_bytes(deep_png(values, 0))
    eight = np.rint(values[..., 0] / 4095 * 255).astype(np.uint8)
    Image.fromarray(eight).save(tmp_path / "eight.png")
    model = onnx.load(MODEL)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    reading = json.loads(entries["reading"]) | {"bit_depth": 12}
    onnx.helper.set_model_props(model, entries | {"reading": json.dumps(reading)})
    onnx.save(model, tmp_path / "twelve.onnx")
    files = [str(tmp_path / f"{name}.png") for name in ("deep", "eight")]
    run(str(tmp_path / "twelve.onnx"), *files, "--json")
    captured = capsys.readouterr()
    deep, same = (json.loads(line)["classes"] for line in captured.out.splitlines())
    assert deep == same
    assert not captured.err
    run(MODEL, *files)
    assert (
        f"deep.png: it has more than 8 bits a channel, and its largest value is {values.max():,}"
        in (capsys.readouterr().err)
    )


def test_no_file_makes_another_program_run(exported, tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.eps")
    content = (tmp_path / "photo.eps").read_bytes()
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(UserError, match="it is none of AVIF"):
        run(MODEL, str(tmp_path / "photo.jpg"))
    assert not (tmp_path / "executed").exists()


def test_prepare_and_predict_refuse_a_file_with_the_same_words(exported, tmp_path):
    sound = saved("JPEG")
    animated = saved("GIF", save_all=True, append_images=[Image.new("RGB", (32, 24))])
    files = {"cut": sound[:-40], "moving": animated, "text.jpg": b"no image", "empty.png": b""}
    root = tmp_path / "images"
    write_images(root, per_class=5)
    for name, content in files.items():
        (root / "train/ant" / name).write_bytes(content)
    with pytest.raises(UserError) as of_predict:
        run(MODEL, str(root))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(UserError) as of_prepare:
            prepare()
    words = {
        line.rpartition("/")[2]
        for line in str(of_predict.value).splitlines()
        if "train/ant/" in line
    }
    assert len(words) == 4
    assert words == {
        line.rpartition("/")[2]
        for line in str(of_prepare.value).splitlines()
        if "train/ant/" in line
    }


def shell(*arguments: str) -> tuple[int, str, str]:
    """Run the command in another process; return its code, output and errors."""
    process = start_module("pipeline.commands.predict", *arguments, PYTHONPROFILEIMPORTTIME="1")
    stdout, stderr = process.communicate()
    return process.returncode, stdout, stderr


def test_it_prints_a_line_per_file_then_lists_the_unreadable_ones_and_fails(
    finished_project, folder
):
    write_images(folder, per_class=1)
    pictures = folder / "train"
    (pictures / "ant/.hidden.png").write_bytes(b"")
    (pictures / "notes.txt").write_text("no image")
    (pictures / "ant/@eaDir/000.png").mkdir(parents=True)
    (pictures / "ant/@eaDir/000.png/thumb.jpg").write_bytes(b"")
    (pictures / "notes.png").write_text("no image")
    whole = (pictures / "ant/000.png").read_bytes()
    (pictures / "bee/cut.png").write_bytes(whole[: len(whole) // 2])
    code, stdout, stderr = shell(
        str(finished_project / MODEL), "train", "nowhere.png", "--top", "2"
    )
    lines = stdout.splitlines()
    share = r"(ant|bee|cat) +\d+\.\d\d%"
    for name, line in zip(("ant", "bee", "cat"), lines, strict=True):
        assert re.fullmatch(rf"train/{name}/000\.png  {share}  {share}", line)
    assert len({len(line) for line in lines}) == 1  # they are aligned
    assert code == 1
    assert stderr.splitlines()[-5:] == [
        "left out, as no images: 1 `.hidden.png`, 1 `.txt`, 1 `@eaDir`",
        "error: 3 of 6 files cannot be read as images:",
        "  train/bee/cut.png: image file is truncated",
        f"  train/notes.png: it is none of {', '.join(FORMATS)}, or is damaged",
        "  nowhere.png: No such file or directory",
    ]


def test_it_succeeds_if_every_file_is_an_image_and_imports_no_torch(exported):
    code, stdout, stderr = shell(MODEL, "images/train/ant")
    assert code == 0, stderr
    assert len(stdout.splitlines()) == 20
    imported = set(re.findall(r"^import time:.*\| +(\w+)", stderr, re.MULTILINE))
    assert {"numpy", "onnxruntime"} <= imported
    assert not imported & {"torch", "torchvision", "onnx", "pandas", "scipy"}


def test_more_files_than_a_batch_are_classified_in_order(exported, monkeypatch, capsys):
    monkeypatch.setattr(predict, "BATCH_SIZE", 7)
    run(MODEL, "images")
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == sorted(str(path) for path in Path("images").rglob("*.png"))
    assert len(names) == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("params.yaml", "images"), "`params.yaml` cannot be loaded by onnxruntime"),
        ((MODEL, "images", "--top", "4"), "`--top` is `4`; expected how many classes .* 1 to 3"),
        ((MODEL, "images", "--top", 5000 * "9"), "`--top` is `999"),
        ((MODEL, "images", "--top", "all"), "`--top` is `all`"),
        ((MODEL, "empty"), "there is no image in empty; expected images"),
    ],
)
def test_a_mistake_in_the_command_is_reported(exported, arguments, message):
    Path("empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message):
        run(*arguments)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"teach_once_format_version": "1"}, "has format version 1; expected 2"),
        ({"reading": "{"}, r"has damaged metadata. Expecting property name"),
        (
            {"reading": '{"storage": "encoded", "image_size": 64, "quality": 90}'},
            r"has damaged metadata. .*`encoded` needs quality, resize_ratio and interpolation",
        ),
    ],
)
def test_a_file_that_export_did_not_write_is_refused(
    exported, tmp_path, monkeypatch, entries, message
):
    model, path = onnx.load(MODEL), tmp_path / "other.onnx"
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, metadata | entries)
    onnx.save(model, path)
    with pytest.raises(UserError, match=rf"`{path}` {message}"):
        run(str(path), "images")


def test_a_file_whose_graph_fails_is_refused(exported, tmp_path):
    model, path = onnx.load(MODEL), tmp_path / "other.onnx"
    weights = next(each for each in model.graph.initializer if len(each.dims) == 4)
    weights.raw_data = b""
    weights.dims[:] = [0, 3, 3, 3]
    onnx.save(model, path)
    with pytest.raises(UserError, match=rf"`{path}` (cannot be loaded|fails on images)"):
        run(str(path), "images")


def test_a_folder_that_cannot_be_listed_is_not_said_to_be_the_datasets(exported, tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    with pytest.raises(UserError, match="not UTF-8") as raised:
        run_module("pipeline.commands.predict", "models/exported/small.onnx", str(tmp_path))
    assert "dataset.root" not in str(raised.value)
