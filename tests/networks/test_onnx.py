"""An ONNX file teaches as the network that was exported."""

import importlib.util
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import PARAMS, opened, run_stage, write_params
from torch import nn

from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import checkpoint
from pipeline.models.spec import InputSpec, ModelSpec, build
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import TEACHER
from pipeline.teacher import foreign_checkpoint

TOLERANCE = 1e-3  # of a row's largest logit, as docs/teachers.md says


class ChannelsLast(nn.Module):
    """The convention of other frameworks: [B, H, W, C] to probabilities."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.permute(0, 3, 1, 2)).softmax(1)


def export(network: nn.Module, images: torch.Tensor, dynamic: bool) -> None:
    torch.onnx.export(
        network.eval(),
        (images,),
        "mine.onnx",
        dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic else None,
        external_data=False,
        verbose=False,
    )


def set_teacher(**network: object) -> None:
    teacher = deepcopy(PARAMS["teacher"]) | {"family": "onnx", "weights": "checkpoint"}
    teacher |= {"network": {"name": "mine", **network}, "checkpoint": "mine.onnx"}
    write_params(Path(), PARAMS | {"teacher": teacher})


def store_rows() -> np.ndarray:
    store = opened()
    return np.concatenate([store.gather(v, np.arange(36))[0] for v in range(3)]).astype(float)


@pytest.mark.parametrize(
    ("wrap", "example", "dynamic"),
    [
        (lambda network: network, torch.zeros(2, 3, 16, 16), True),
        (ChannelsLast, torch.zeros(5, 16, 16, 3), False),  # and batches of 5 alone
    ],
)
def test_the_onnx_route_and_the_torch_route_give_the_same_store(project, wrap, example, dynamic):
    expected, measured = store_rows(), read_json("metrics/teacher.json", produced_by="-")
    network, _ = checkpoint.load(TEACHER.model, produced_by="-")
    export(wrap(network), example, dynamic)
    set_teacher()
    run_stage("teacher")
    run_stage("soft_targets")
    found = store_rows()
    scale = np.maximum(1, np.abs(expected).max(1, keepdims=True))
    assert (np.abs(found - expected) <= TOLERANCE * scale).all()
    run_stage("speed")
    assert "teacher" in read_json("metrics/speed.json", produced_by="-")["cpu"]
    metrics = read_json("metrics/teacher.json", produced_by="-")
    for name in ("validation_accuracy", "test_accuracy", "macs"):
        assert metrics[name] == measured[name]
    # The export may fold batch norm into the biases of the convolutions.
    assert abs(metrics["parameters"] - measured["parameters"]) < 0.02 * measured["parameters"]
    Path("mine.onnx").unlink()
    rebuilt, _ = checkpoint.load(TEACHER.model, produced_by="-")  # of its saved weights alone
    assert list(rebuilt.state_dict()) == ["onnx"]


def node(kind: str, source: str, result: str, **attributes: object) -> onnx.NodeProto:
    inputs = [source, "axes"] if kind.startswith("Reduce") else [source]
    return onnx.helper.make_node(kind, inputs, [result], **attributes)


def graph(*, shape=("n", 3, 8, 8), output=("n", 3), nodes=None, kind=None) -> None:
    """Write mine.onnx: the mean of each channel is the logit of a class."""
    float32 = onnx.TensorProto.FLOAT
    nodes = nodes or [node("ReduceMean", "x", "y", keepdims=0)]
    axes = onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [2, 3])
    made = onnx.helper.make_graph(
        nodes,
        "mine",
        [onnx.helper.make_tensor_value_info("x", kind or float32, shape)],
        [onnx.helper.make_tensor_value_info("y", float32, output)],
        [axes],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(made, opset_imports=opset, ir_version=9), "mine.onnx")


def describe(size: int = 8, **options: object) -> ModelSpec:
    spec = InputSpec(3, size, [0.5] * 3, [0.2] * 3)
    return ModelSpec("onnx", "mine", options, ["a", "b", "c"], spec)


def load(size: int = 8, **options: object) -> nn.Module:
    network, _ = foreign_checkpoint.load_foreign(describe(size, **options), Path("mine.onnx"))
    return network


@pytest.mark.parametrize("nodes", [None, "softmax"])
@pytest.mark.parametrize("classes", [[3, 0, 2], ["B", "x", "c", "a"]])
def test_a_list_of_classes_selects_the_outputs(folder, nodes, classes):
    if nodes:
        nodes = [node("ReduceMean", "x", "z", keepdims=0), node("Softmax", "z", "y")]
    graph(shape=("n", 4, 8, 8), output=("n", 4), nodes=nodes)
    spec = ModelSpec("onnx", "mine", {}, ["a", "b", "c"], InputSpec(4, 8, [0.5] * 4, [0.2] * 4))
    network, spec = foreign_checkpoint.load_foreign(spec, Path("mine.onnx"), classes=classes)
    images = torch.randn(5, 4, 8, 8)
    torch.testing.assert_close(network(images), images.mean((2, 3))[:, [3, 0, 2]])
    assert spec.pretrained_classes == [3, 0, 2]
    checkpoint.save(Path(), network, spec)
    again, _ = checkpoint.load(Path(), produced_by="-")
    assert torch.equal(again(images), network(images))
    with pytest.raises(UserError, match="`teacher.checkpoint_key` is set, but family `onnx` takes"):
        foreign_checkpoint.load_foreign(spec, Path("mine.onnx"), key="model")


def test_the_fingerprint_covers_the_file(folder):
    prints = set()
    for mean in ("ReduceMean", "ReduceSum"):
        graph(nodes=[node(mean, "x", "y", keepdims=0)])
        (folder / mean).mkdir()
        checkpoint.save(folder / mean, load(), describe())
        prints.add(checkpoint.fingerprint(folder / mean, produced_by="-"))
    assert len(prints) == 2


def test_a_small_graph_runs_in_either_layout(folder):
    images = torch.randn(4, 3, 8, 8)
    graph()
    torch.testing.assert_close(load()(images), images.mean((2, 3)))
    graph(shape=("n", "c", "h", "w"))
    with pytest.raises(UserError, match=r"set `options: \{layout: nchw\}` or `nhwc`"):
        load()
    torch.testing.assert_close(load(layout="nchw")(images), images.mean((2, 3)))


MEAN = node("ReduceMean", "x", "m", keepdims=0)
PERCENT = onnx.helper.make_node("Constant", [], ["p"], value_float=100.0)


@pytest.mark.parametrize(
    ("nodes", "remark"),
    [
        (
            [MEAN, node("Sigmoid", "m", "y")],
            "ends in a Sigmoid (`y`): its input is the logits, and",
        ),
        ([MEAN, node("Softmax", "m", "y")], "ends in a Softmax (`y`): its input is the logits"),
        (
            [
                *(MEAN, node("Softmax", "m", "s"), PERCENT, node("Identity", "s", "i")),
                onnx.helper.make_node("Mul", ["p", "i"], ["y"]),
            ],
            "ends in a Softmax (`y`)",
        ),
    ],
)
def test_the_input_of_a_last_softmax_or_sigmoid_is_used_and_a_line_says_so(folder, nodes, remark):
    graph(nodes=nodes)
    images = torch.randn(4, 3, 8, 8)
    network = load()
    torch.testing.assert_close(network(images), images.mean((2, 3)))
    (line,) = network.remarks
    assert remark in line


def test_a_temperature_of_the_logits_stays(folder):
    graph(nodes=[MEAN, PERCENT, onnx.helper.make_node("Mul", ["m", "p"], ["y"])])
    network, images = load(), torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(network(images), 100 * images.mean((2, 3)))
    assert network.remarks == []


CAST = [node("Cast", "x", "z", to=1), node("ReduceMean", "z", "y", keepdims=0)]
PROBABILITIES = [  # that no last softmax made
    *(node("ReduceMean", "x", "m", keepdims=0), node("Softmax", "m", "s")),
    *(node("Neg", "s", "t"), node("Neg", "t", "y")),
]


@pytest.mark.parametrize(
    ("changed", "size", "message"),
    [
        ({"output": ("n", 4)}, 8, r"outputs `y` \['n', 4\]; expected exactly one of \[batch, 3\]"),
        ({}, 16, r"takes images of 8 x 8 pixels, but gets 16 x 16. Set `input_size: 8`"),
        ({"shape": ("n", 5, 8, 8)}, 8, r"takes an input of \['n', 5, 8, 8\]; expected \[batch, 3,"),
        (
            {"kind": 11, "nodes": CAST},
            8,
            r"inputs `x` tensor\(double\); expected one of tensor\(fl",
        ),
        ({"nodes": PROBABILITIES}, 8, "returns probabilities"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(folder, changed, size, message):
    graph(**changed)
    with pytest.raises(UserError, match=f"^`mine.onnx`: .*{message}"):
        load(size)


def test_an_empty_file_is_refused(folder):
    Path("mine.onnx").touch()
    with pytest.raises(UserError, match="`mine.onnx`: it is not an ONNX file: it has no graph"):
        load()


def test_a_file_cannot_be_trained_and_computes_in_float32_alone(folder):
    with pytest.raises(UserError, match="is a file that cannot be trained. It can be a teacher"):
        build(describe())
    graph()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UserError, match="set soft_targets.precision to"),
    ):
        load()(torch.zeros(1, 3, 8, 8))


KERAS = """
import numpy as np, keras
images, labels = np.load("images.npy"), np.load("labels.npy")
keras.utils.set_random_seed(0)
model = keras.Sequential([
    keras.Input((16, 16, 3)),
    keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
    keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
    keras.layers.Flatten(),
    keras.layers.Dense(3, activation="softmax"),
])
model.compile("adam", "sparse_categorical_crossentropy")
model.fit(images / 255, labels, epochs=60, batch_size=12, verbose=0)
model.export("mine.onnx", format="onnx", verbose=False)
np.save("answers.npy", model.predict(images / 255, verbose=0))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="keras is not installed")
def test_a_keras_model_exported_by_keras_teaches(project):
    split = open_dataset().splits["train"]
    np.save("images.npy", split.images.transpose(0, 2, 3, 1).astype(np.float32))
    np.save("labels.npy", split.labels)
    subprocess.run(
        [sys.executable, "-c", KERAS], env=os.environ | {"KERAS_BACKEND": "torch"}, check=True
    )
    set_teacher(mean=[0.0] * 3, std=[1.0] * 3)
    run_stage("teacher")
    run_stage("soft_targets")
    network, description = checkpoint.load(TEACHER.model, produced_by="-")
    views = torch.from_numpy(np.array(split.images))
    answers = network(description.input.apply(views)).softmax(1).numpy()
    np.testing.assert_allclose(answers, np.load("answers.npy"), atol=1e-4)
