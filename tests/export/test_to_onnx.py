"""An exported network gives PyTorch's logits in onnxruntime, or nothing is written."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from conftest import run_stage
from import_closure import ROOT
from safetensors.numpy import load_file
from safetensors.torch import save_file
from stage_process import finish, start_module
from torch import nn

from pipeline.comparison.measurement.predictions import HELD_OUT
from pipeline.data.prepared.dataset import open_dataset
from pipeline.data.prepared.image_decoding import CLEAN_RATIO
from pipeline.data.sources.params import DatasetParams
from pipeline.export import to_onnx as to_onnx_module
from pipeline.export.model_card import NoFile, read_card
from pipeline.export.running import onnx_model
from pipeline.export.running.onnx_model import ExportedNetwork, OnnxMetadata
from pipeline.export.to_onnx import OPSET, to_onnx
from pipeline.export.verification import TOLERANCE, float32_error, verify_logits
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict, predict_all
from pipeline.models.spec import InputSpec, ModelSpec, build
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import TEACHER, ExportedFile, ExportOutputs, ModelOutputs
from pipeline.runtime.params import load_section
from pipeline.stages.export import onnx_metadata, reading_of

DISTILLED, BASELINE = (ExportedFile(role, "small") for role in ("distilled", "baseline"))
FILE, OUTPUTS = DISTILLED.path, ExportOutputs("small")
SMALL = ModelOutputs("distilled", "small")
STUDENT = SMALL.model


def metadata_of(reading: dict[str, object], side: int, channels: int = 3) -> OnnxMetadata:
    return OnnxMetadata(
        name="mine",
        role="distilled",
        precision="float32",
        fingerprint="-",
        class_names=list("abcde"),
        opset=OPSET,
        channels=channels,
        image_size=side,
        reading=reading,
    )


def test_plain_onnxruntime_gives_the_logits_that_the_student_wrote(exported):
    session = onnxruntime.InferenceSession(FILE)
    test = open_dataset().splits["test"]
    (logits,) = session.run(None, {"image": np.array(test.images)})
    expected = load_file("predictions/students/small.safetensors")["test"]
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= TOLERANCE * max(1, np.abs(expected).max(1).min())
    assert np.array_equal(logits.argmax(1), expected.argmax(1))


def test_the_metrics_agree_with_the_stages_own(exported):
    metrics = read_json(OUTPUTS.metrics, produced_by="-")
    assert list(metrics) == [file.key for file in OUTPUTS.files]
    for file in (DISTILLED, BASELINE):
        measured = read_json(ModelOutputs(file.role, "small").metrics, produced_by="-")
        figures = metrics[file.key]
        assert figures == {
            "torch_accuracy": measured["test_accuracy"],
            "largest_difference": figures["largest_difference"],
            "decisions_that_differ": 0,
        }
        assert 0 <= figures["largest_difference"] < 1e-4


def test_the_metadata_have_the_bit_depth_of_the_images_if_it_is_set(project):
    outputs, dataset = ModelOutputs("distilled", "small"), open_dataset()
    _, spec = checkpoint.load(outputs.model, produced_by="-")
    params = load_section(DatasetParams, "dataset").model_copy(update={"bit_depth": 12})
    reading = reading_of(params, spec.input)
    metadata = onnx_metadata(outputs, spec, dataset, reading).metadata()
    assert json.loads(metadata["reading"])["bit_depth"] == 12


def test_the_metadata_describe_the_classes_and_the_preprocessing(exported):
    model = onnx.load(FILE)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata == {
        "teach_once_format_version": "2",
        "name": "small",
        "role": "distilled",
        "precision": "float32",
        "fingerprint": checkpoint.fingerprint(STUDENT, produced_by="-"),
        "class_names": '["ant", "bee", "cat"]',
        "opset": str(OPSET),
        "channels": "3",
        "image_size": "16",
        "reading": '{"storage": "pixels", "image_size": 16}',
    }
    (image,), (logits,) = model.graph.input, model.graph.output
    shapes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (image, logits)
    ]
    assert (image.name, image.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
    assert (logits.name, logits.type.tensor_type.elem_type) == ("logits", onnx.TensorProto.FLOAT)
    assert shapes == [["batch", 3, 16, 16], ["batch", 3]]
    assert "uint8 [batch, 3, 16, 16], RGB, 0 to 255" in model.doc_string
    assert "shorter side resized to 16 pixels (bicubic, antialiased)" in model.doc_string


@pytest.mark.slow
def test_another_process_writes_the_same_bytes_without_paths_of_this_machine(
    exported, tmp_path, monkeypatch
):
    written = [path for file in OUTPUTS.files for path in (file.path, file.card)]
    written = [*filter(Path.is_file, written), OUTPUTS.predictions, OUTPUTS.metrics]
    expected = [path.read_bytes() for path in written]
    assert len(expected) == 8  # two files, and their cards; two cards that say why there is no file
    for path in (ROOT, exported, Path(torch.__file__).parent):
        assert not any(str(path).encode() in content for content in expected)
    monkeypatch.chdir(shutil.copytree(exported, tmp_path / "copy"))
    FILE.unlink()
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")  # which this process reads from the root
    finish(start_module("pipeline.stages.export", "small", PYTHONHASHSEED="5"))
    assert [path.read_bytes() for path in written] == expected


def test_the_readmes_program_classifies_and_the_page_names_all_metadata(exported):
    readme = (ROOT / "README.md").read_text("utf-8")
    program = re.search(r"^```python\n(session = (?:.|\n)+?)```", readme, re.MULTILINE)[1]
    images = np.array(open_dataset().splits["test"].images)
    names = {"json": json, "onnxruntime": onnxruntime, "images": images}
    exec(program.replace("resnet20", "small"), names)
    assert names["class_names"] == ["ant", "bee", "cat"]
    assert names["logits"].shape == (len(images), 3)
    page = (ROOT / "docs/exporting.md").read_text("utf-8")
    for key in names["session"].get_modelmeta().custom_metadata_map:
        assert f"`{key}`" in page


slow = pytest.mark.slow
NETWORKS = [
    ("cifar_resnet", "resnet8", {}, 16, 16, 3),  # ..., view's size, network's size, channels
    ("cifar_resnet", "resnet8", {}, 33, 16, 1),  # shrinks, with antialiasing
    pytest.param("torchvision", "mobilenet_v2", {"width_mult": 0.25}, 32, 64, 3, marks=slow),
    pytest.param("torchvision", "squeezenet1_1", {}, 32, 64, 3, marks=slow),
    pytest.param("torchvision", "mobilenet_v3_small", {"width_mult": 0.25}, 32, 64, 3, marks=slow),
    ("timm", "test_resnet", {}, 40, 64, 3),
]


@pytest.mark.parametrize(("family", "name", "options", "side", "size", "channels"), NETWORKS)
def test_every_family_gives_pytorchs_logits_in_batches_of_any_size(
    family, name, options, side, size, channels
):
    if family == "timm":
        pytest.importorskip("timm", reason="the extra `timm` is not installed")
    spec = InputSpec(channels, size, [0.4] * channels, [0.2] * channels)
    torch.manual_seed(0)
    network = build(ModelSpec(family, name, options, list("abcde"), spec))
    views = torch.randint(0, 256, (64, channels, side, side), dtype=torch.uint8)
    with_statistics_of(network, spec.apply(views))
    expected = predict(network, spec, views).numpy()
    spread = np.ptp(expected, 0).max()
    assert spread > 1e-2  # the logits depend on the image
    metadata = metadata_of({"storage": "pixels", "image_size": side}, side, channels)
    exported = ExportedNetwork(to_onnx(network, spec, metadata), "mine.onnx", 1)
    assert exported.metadata == metadata
    for batch in (1, 7, 64):
        parts = [exported.logits(part.numpy()) for part in views.split(batch)]
        assert np.abs(np.concatenate(parts) - expected).max() < 1e-3 * spread


def test_a_network_that_shares_the_graph_of_another_has_the_file_that_it_has_alone(monkeypatch):
    alone = to_onnx_module._captured.__wrapped__  # conftest.py lets the tests share graphs, too
    monkeypatch.setattr(to_onnx_module, "_captured", alone)
    spec, graphs = InputSpec(3, 16, [0.4] * 3, [0.2] * 3), {}
    metadata = metadata_of({"storage": "pixels", "image_size": 16}, 16)
    contents = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = build(ModelSpec("cifar_resnet", "resnet8", {}, list("abcde"), spec))
        contents.append(to_onnx(network, spec, metadata, graphs))
    assert len(graphs) == 1
    assert contents[0] != contents[1] == to_onnx(network, spec, metadata)


@pytest.mark.parametrize(("limit", "threads"), [("1", 1), ("0", 4), ("9", 4), ("x", 4), ("", 4)])
def test_a_stage_runs_files_in_no_more_threads_than_it_may_compute_in(monkeypatch, limit, threads):
    monkeypatch.setattr(onnx_model, "available_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert onnx_model.inference_threads() == threads


def with_statistics_of(network: nn.Module, inputs: torch.Tensor) -> None:
    """Set the statistics of batch norm in place: without them a new network's logits are near 0."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    network.train()
    with torch.no_grad():
        network(inputs)
    network.eval()


ENCODED = {
    **{"storage": "encoded", "image_size": 64},
    **{"resize_ratio": CLEAN_RATIO, "interpolation": "bilinear"},
}


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        ({"storage": "pixels", "image_size": 32}, "square cut out, which is resized to 16 pixels"),
        (
            ENCODED | {"quality": 80},
            "64 pixels where it is longer (bicubic, antialiased), and encoded as JPEG of quality "
            "80; the middle 16 x 16 pixels, after its shorter side was resized to 18 (",
        ),
        (
            ENCODED | {"quality": "original"},
            "transparent pixels white, RGB; the middle 16 x 16 pixels, after its shorter side",
        ),
        (
            {"storage": "pixels", "image_size": 16, "bit_depth": 12},
            "8 bits a channel (white is 4,095 where it has more), transparent pixels white",
        ),
    ],
)
def test_the_description_states_the_preprocessing(reading, words):
    assert words in metadata_of(reading, 16).in_words()


# Refusals.


class DiffersInExport(nn.Module):
    """A network that computes something else when it is exported."""

    def __init__(self, behaviour: str):
        super().__init__()
        self.behaviour = behaviour
        self.layer = nn.Linear(3 * 16 * 16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = self.layer(images.flatten(1))
        exporting = torch.compiler.is_exporting()
        if self.behaviour == "other logits":
            return scores + 0.01 * exporting
        if self.behaviour == "not a number":
            return scores * (float("nan") if exporting else 1)
        if self.behaviour == "other decisions":  # nearly equal logits: within the tolerance
            return 1000 + (-0.001 if exporting else 0.001) * scores.tanh()
        return scores if scores.sum() > 0 else -scores  # "pixels decide"


@pytest.fixture
def odd_network(project, monkeypatch):
    """Replace the project's student by such a network; `model` chooses another."""
    family = ModuleType("pipeline.networks.differs_in_export")
    family.build = lambda network, num_classes, in_channels: DiffersInExport(network)
    monkeypatch.setitem(sys.modules, family.__name__, family)

    def make(behaviour: str, model: ModelOutputs = SMALL) -> None:
        _, spec = checkpoint.load(model.model, produced_by="-")
        torch.manual_seed(0)
        odd = replace(spec, family="differs_in_export", network=behaviour, options={})
        network, splits = build(odd), open_dataset().splits
        checkpoint.save(model.model, network, odd)
        logits = {
            name: predict_all(network, odd.input, splits[name], device=torch.device("cpu"))
            for name in HELD_OUT
        }
        save_file(logits, model.predictions)

    return make


def exported_files() -> dict[Path, bytes]:
    folders = [OUTPUTS.predictions.parents[1], OUTPUTS.metrics.parents[1], FILE.parent]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (
            "other logits",
            r"PyTorch and onnxruntime disagree on student `small`: the logit of class \d of test "
            r"image \d+ is \S+, but \S+ in PyTorch \(tolerance 0\.00\d+\)\. Nothing was written",
        ),
        ("not a number", r"the logit of class \d of test image \d+ is nan, but"),
        ("other decisions", r"12 of 12 test images have another class \(tolerance 1\)"),
    ],
)
def test_nothing_is_written_if_pytorch_and_onnxruntime_disagree(odd_network, behaviour, message):
    odd_network(behaviour)
    before = exported_files()
    with pytest.raises(UserError, match=message):
        run_stage("export", "small")
    assert exported_files() == before


def test_a_network_that_the_exporter_refuses_gives_one_line_with_the_reason(odd_network, capfd):
    odd_network("pixels decide")
    before = exported_files()
    with pytest.raises(UserError) as refusal:
        run_stage("export", "small")
    message = str(refusal.value)
    assert "\n" not in message
    assert re.match(r"student `small` cannot be exported to ONNX: ", message)
    assert "data-dependent" in message
    assert capfd.readouterr() == ("", "")
    assert exported_files() == before


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("pixels decide", r"the teacher cannot be exported to ONNX: .*data-dependent"),
        ("other logits", r"PyTorch and onnxruntime disagree on the teacher: the logit of class"),
    ],
)
def test_a_teacher_without_a_file_has_a_card_with_the_reason_and_pytorchs_accuracy(
    odd_network, behaviour, reason
):
    odd_network(behaviour, TEACHER)
    for stage in ("export", "robustness"):
        run_stage(stage, "--teacher")
    (file,) = ExportOutputs().files
    card = read_card(file.card, produced_by="-")
    assert isinstance(card, NoFile)
    assert re.match(reason, card.no_file)
    assert not file.path.exists()
    run_stage("compare")
    teacher = pd.read_csv("reports/comparison.csv").iloc[0]
    logits = load_file(TEACHER.predictions)["test"]
    assert teacher["accuracy"] == (logits.argmax(1) == open_dataset().splits["test"].labels).mean()
    assert teacher["no_file"] == card.no_file
    assert np.isnan(teacher["size_bytes"])
    assert np.isnan(teacher["robust_accuracy"])
    assert teacher["parameters"] > 0  # of its network


def test_the_tolerance_grows_with_the_error_of_float32_and_no_further():
    expected, labels = np.array([[4.0, 1.0], [5.0, 2.0]], np.float32), np.array([0, 0])

    def verify(difference: float, error: float) -> dict[str, float]:
        actual = expected + np.array([[0, 0], [difference, 0]], np.float32)
        return verify_logits("mine", expected, actual, labels, lambda: error)

    assert verify(0.03, error=0.01)["largest_difference"] == 3e-2
    for difference, error in ((0.05, 0.01), (0.03, 0.0)):
        logit = rf"the logit of class 0 of test image 1 is {5 + difference:g}, but"
        with pytest.raises(UserError, match=logit):
            verify(difference, error)


def test_the_error_of_float32_is_measured_against_float64(project):
    network, description = checkpoint.load(STUDENT, produced_by="-")
    test = open_dataset().splits["test"]
    error = float32_error(network, description.input, test)
    assert 0 < error < 1e-4
    with torch.no_grad():  # a last layer that multiplies its errors
        network.fc.weight *= 1e4
    assert float32_error(network, description.input, test) > 100 * error


def test_a_network_that_computes_in_float32_alone_gets_the_usual_tolerance(project, monkeypatch):
    network, description = checkpoint.load(STUDENT, produced_by="-")
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda images: forward(images.float()))
    assert float32_error(network, description.input, open_dataset().splits["test"]) == 0


def test_one_class_may_differ_if_two_logits_are_nearly_equal():
    expected = np.array([[1, 0.9999], [2, 1], [0, 3]], np.float32)
    actual = expected + np.array([[0, 0.0002], [0, 0], [0, 0]], np.float32)
    figures = verify_logits("mine", expected, actual, np.array([0, 0, 0]), lambda: 0.0)
    assert figures == {
        "torch_accuracy": 2 / 3,
        "largest_difference": 2e-4,
        "decisions_that_differ": 1,
    }


def test_a_student_of_other_classes_is_refused(project):
    shutil.move("images/train/cat", "images/train/cow")
    run_stage("prepare")
    with pytest.raises(UserError, match=r"classes, of these or other names.*dvc repro student@sma"):
        run_stage("export", "small")
