"""What a student and its baseline start from: the same bytes, and what params.yaml names."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, change_params, run_stage
from safetensors.torch import load, load_file, save_file

from pipeline.commands import check
from pipeline.data.prepared.dataset import Dataset, open_dataset
from pipeline.models import checkpoint
from pipeline.models.checkpoint import state_bytes
from pipeline.models.params import NetworkParams
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, sha256_of_file
from pipeline.students import training_run
from pipeline.students.initial_network import InitialNetwork, build_initial_network
from pipeline.students.params import StudentParams, TrainingSection

OTHER = Path("models/students/small")  # of the project: a trained ResNet-8 for its classes


def initial(
    weights: object, network: str = "resnet8", dataset: Dataset | None = None, **more: object
) -> InitialNetwork:
    """The network of student `new` before its training."""
    params = StudentParams(
        family="cifar_resnet",
        network=NetworkParams(name=network, weights=weights, **more),
        training={},
        distillation={},
    )
    training = TrainingSection(**PARAMS["training"]).trainings[0]
    return build_initial_network("new", params, training, dataset or open_dataset())


def with_digest(path: Path, **more: object) -> dict:
    described = path / "network.json" if path.is_dir() else path
    return {"path": str(path), "sha256": sha256_of_file(described), **more}


def equal(start: InitialNetwork, state: dict, keys: str = "") -> bool:
    """Whether the tensors whose names match the pattern are those of the state."""
    own = {k: v for k, v in start.network.state_dict().items() if re.match(keys, k)}
    return all(torch.equal(value, state[key]) for key, value in own.items())


@pytest.fixture
def state(project) -> dict:
    return load_file(OTHER / "weights.safetensors")


@pytest.fixture
def foreign(state) -> Path:
    """The same weights, saved elsewhere."""
    path = Path("models/imported/mine.pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("weights", ["scratch", "folder"])
def test_student_and_baseline_start_from_the_same_bytes_which_network_json_names(
    project, monkeypatch, weights
):
    starts = []

    def capture(network, *arguments, **named):
        starts.append(state_bytes(network))
        return fit(network, *arguments, **named)

    fit = training_run.fit
    monkeypatch.setattr(training_run, "fit", capture)
    own = {"name": "resnet8", "weights": with_digest(OTHER) if weights == "folder" else weights}
    training = {"freeze_epochs": 2, "epochs": 2} if weights == "folder" else {}
    new = PARAMS["students"]["small"] | {"network": own, "training": training}
    change_params("students", new=new)
    run_stage("student", "new")
    run_stage("baseline", "new")
    assert starts[0] == starts[1]
    texts = {"scratch": "from scratch", "folder": "models/students/small, all layers"}
    for kind in ("students", "baselines"):
        start = read_json(f"models/{kind}/new/network.json", produced_by="-")["start"]
        assert start == {
            "text": texts[weights],
            "sha256": hashlib.sha256(starts[0]).hexdigest(),
            "seed": PARAMS["training"]["seeds"],
        }
        if weights == "folder":  # whose training changed the last layer alone
            before, after = load(starts[0]), load_file(f"models/{kind}/new/weights.safetensors")
            changed = {key for key in before if not torch.equal(before[key], after[key])}
            assert changed == {"fc.weight", "fc.bias"}


def test_a_network_of_the_pipeline_keeps_the_rows_of_known_classes_and_its_input(project, state):
    dataset = open_dataset()
    assert equal(initial(with_digest(OTHER)), state)
    two = replace(dataset, class_names=["cat", "ant"], mean=[0.1, 0.2, 0.3])
    start = initial(with_digest(OTHER), dataset=two)
    assert equal(start, {**state, **{k: state[k][[2, 0]] for k in ("fc.weight", "fc.bias")}})
    assert start.start.text == "models/students/small, all layers"
    assert list(start.spec.input.mean) == pytest.approx(dataset.mean)  # of the weights
    for own in ({"dataset": replace(dataset, class_names=["ant", "dog"])}, {"head": "new"}):
        new_classes = own.pop("dataset", dataset)
        start = initial(with_digest(OTHER, **own), dataset=new_classes)
        assert start.start.text == "models/students/small, new last layer"
        assert equal(start, state, "(?!fc)")
        assert len(start.network.fc.bias) == len(new_classes.class_names)
        assert not equal(start, state, "fc.weight") or len(start.network.fc.bias) != 3


def test_a_checkpoint_gets_a_new_last_layer_for_another_number_of_classes(project, state, foreign):
    start = initial(with_digest(foreign, key="model"))
    assert equal(start, state)
    assert start.remarks[-1] == (
        "models/imported/mine.pth: its 3 outputs are taken as the dataset's classes, in the order "
        "of the folders' names; if they are others, set `head: new`"
    )
    dataset = replace(open_dataset(), class_names=["a", "b", "c", "d"])
    for own, images in (({}, dataset), ({"head": "new"}, None)):
        start = initial(with_digest(foreign, **own), dataset=images)
        assert start.start.text == "models/imported/mine.pth, new last layer"
        assert equal(start, state, "(?!fc)")
        assert not any("taken as" in remark for remark in start.remarks)
        # What is new is drawn as from scratch.
        assert torch.equal(
            start.network.fc.weight, initial("scratch", dataset=images).network.fc.weight
        )


def test_imagenets_class_folders_keep_their_rows_of_a_checkpoint(state, foreign):
    rows = torch.arange(1000.0)
    whole = {**state, "fc.bias": rows, "fc.weight": rows[:, None].repeat(1, 64)}
    path = Path("models/imported/whole.safetensors")
    save_file(whole, path)
    dataset = replace(open_dataset(), class_names=["goldfish", "tench"])
    start = initial(with_digest(path), dataset=dataset)
    assert start.network.fc.bias.tolist() == [1, 0]
    assert start.start.text == f"{path}, all layers"


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_a_smaller_network_takes_the_layers_that_fit_of_a_larger_one(project, kind):
    """And a larger one those of a smaller one; the others are new."""
    larger = initial("scratch", "resnet20")
    path = Path("models/imported/larger")
    path.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, larger.network, larger.spec)
    if kind == "checkpoint":
        path = Path("models/imported/larger.pth")
        torch.save({"module." + k: v for k, v in larger.network.state_dict().items()}, path)
    with pytest.raises(UserError, match=f"`{path}` does not fit the network"):
        initial(with_digest(path), "resnet8")
    start, fresh = initial(with_digest(path, partial=True)), initial("scratch")
    taken = {"conv", "bn", "fc", "blocks.0.conv1", "blocks.0.bn1", "blocks.0.conv2", "blocks.0.bn2"}
    # Its second block is a larger network's fourth.
    layers = {key.rpartition(".")[0] for key in fresh.network.state_dict()}
    for key, value in start.network.state_dict().items():
        source = larger if key.rpartition(".")[0] in taken else fresh
        assert torch.equal(value, source.network.state_dict()[key])
    assert start.start.text == f"{path}, {len(taken)} of {len(layers)} layers"
    assert start.remarks[-1].startswith(f"{path}: new are `blocks.1.conv1`, `blocks.1.bn1`, ")

    start = initial(with_digest(OTHER, partial=True, head="new"), "resnet20")
    assert equal(start, load_file(OTHER / "weights.safetensors"), "conv|blocks.0")
    assert equal(start, larger.network.state_dict(), "fc")  # new, as from scratch


def test_both_stages_refuse_other_weights_as_check_does(project, foreign):
    network = {"name": "resnet8", "weights": {"path": str(foreign), "sha256": "0" * 64}}
    change_params("students", new=PARAMS["students"]["small"] | {"network": network})
    (line,) = check.problems()
    assert f"set `sha256: {sha256_of_file(foreign)}`" in line
    for stage in ("student", "baseline"):
        with pytest.raises(UserError, match=re.escape(line)):
            run_stage(stage, "new")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"sha256": "0" * 64}, r"`params.yaml: students.small.network.weights.path` is missing."),
        ({"path": "a", "file": "b"}, "`params.yaml: students.small.network.weights.file` is unkn"),
        ({"path": "a", "sha256": "xy"}, "`params.yaml: students.small.network.weights.sha256` is"),
    ],
)
def test_a_mistake_in_the_weights_is_named_by_its_key(project, weights, message):
    network = {"name": "resnet8", "weights": weights}
    change_params("students", small=PARAMS["students"]["small"] | {"network": network})
    lines = check.problems()
    assert re.match(message, lines[0])
    assert len(lines) == 1
