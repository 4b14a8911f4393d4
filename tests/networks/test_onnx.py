"""An ONNX file teaches as the network that was exported."""

import importlib.util
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from clone import cloned
from conftest import PARAMS, bytes_of, change_params, opened, run_stage, write_params
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    quantize_dynamic,
    quantize_static,
)
from torch import nn

from pipeline.commands import check
from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import checkpoint
from pipeline.models.spec import InputSpec, ModelSpec, build
from pipeline.networks import cifar_resnet
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import TEACHER
from pipeline.teacher import foreign_teacher

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


def set_teacher(
    *, checkpoint: str = "mine.onnx", minimum_accuracy: float | None = None, **network: object
) -> None:
    teacher = deepcopy(PARAMS["teacher"]) | {"family": "onnx", "weights": "checkpoint"}
    teacher |= {"network": {"name": "mine", **network}, "checkpoint": checkpoint}
    teacher |= {"minimum_accuracy": minimum_accuracy} if minimum_accuracy else {}
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
    speeds = read_json("metrics/speed.json", produced_by="-")
    assert "teacher" in speeds["onnxruntime_1_thread"]
    metrics = read_json("metrics/teacher.json", produced_by="-")
    for name in ("validation_accuracy", "test_accuracy", "macs"):
        assert metrics[name] == measured[name]
    # The export may fold batch norm into the biases of the convolutions.
    assert abs(metrics["parameters"] - measured["parameters"]) < 0.02 * measured["parameters"]
    Path("mine.onnx").unlink()
    rebuilt, _ = checkpoint.load(TEACHER.model, produced_by="-")  # of its saved weights alone
    assert list(rebuilt.state_dict()) == ["onnx"]


class _Calibration(CalibrationDataReader):
    def __init__(self):
        self._batches = iter([{"x": np.float32(np.random.default_rng(0).random((4, 3, 8, 8)))}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def constants(model: onnx.ModelProto) -> None:
    """Turn the initializers into nodes."""
    graph = model.graph
    for tensor in reversed(graph.initializer):
        graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
    del graph.initializer[:]


@pytest.mark.parametrize("form", ["constants", "dynamic", "qdq", "qoperator", "optimised"])
def test_weights_are_counted_in_integers_and_in_constants_too(folder, form):
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten()),
        *(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 3)),
    )
    export(network, torch.zeros(4, 3, 8, 8), dynamic=False)
    model = onnx.load("mine.onnx")
    for node in model.graph.node:
        node.input[:] = ["x" if name == model.graph.input[0].name else name for name in node.input]
    model.graph.input[0].name = "x"
    onnx.save(model, "mine.onnx")
    expected = load().cost(3, 8)
    assert expected["parameters"] == sum(p.numel() for p in network.parameters())
    assert expected["macs"] == 64 * 16 * 27 + 64 * 8 * 16 + 512 * 32 + 32 * 3
    match form:
        case "constants":
            constants(model)
            onnx.save(model, "mine.onnx")
        case "dynamic":
            quantize_dynamic("mine.onnx", "mine.onnx")
        case "optimised":  # fused operators
            options = onnxruntime.SessionOptions()
            options.optimized_model_filepath = "fused.onnx"
            level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.graph_optimization_level = level
            onnxruntime.InferenceSession("mine.onnx", options)
            Path("fused.onnx").rename("mine.onnx")
            kinds = {node.op_type for node in onnx.load("mine.onnx").graph.node}
            assert {"FusedConv", "FusedGemm"} <= kinds
        case _:
            quantize_static(
                *("mine.onnx", "mine.onnx", _Calibration()),
                quant_format=QuantFormat.QDQ if form == "qdq" else QuantFormat.QOperator,
            )
    found = load().cost(3, 8)
    assert found["macs"] == expected["macs"]
    said = [remark for remark in load().remarks if "by the range of each batch" in remark]
    assert bool(said) == (form == "dynamic")
    # A few scales are left, of dynamic quantisation.
    assert 0 <= found["parameters"] - expected["parameters"] <= 8


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
    network, _ = foreign_teacher.load_foreign(describe(size, **options), Path("mine.onnx"))
    return network


@pytest.mark.parametrize("name", ["y_of_rows", "y_of_all_classes"])
def test_a_list_of_classes_takes_no_name_that_the_file_has(folder, name):
    nodes = [node("Identity", "x", name), node("ReduceMean", name, "y", keepdims=0)]
    graph(shape=("n", 4, 8, 8), output=("n", 4), nodes=nodes)
    spec = ModelSpec("onnx", "mine", {}, ["a", "b", "c"], InputSpec(4, 8, [0.5] * 4, [0.2] * 4))
    network, _ = foreign_teacher.load_foreign(spec, Path("mine.onnx"), classes=[3, 0, 2])
    images = torch.randn(5, 4, 8, 8)
    torch.testing.assert_close(network(images), images.mean((2, 3))[:, [3, 0, 2]])


@pytest.mark.parametrize("nodes", [None, "softmax"])
@pytest.mark.parametrize("classes", [[3, 0, 2], ["B", "x", "c", "a"]])
def test_a_list_of_classes_selects_the_outputs(folder, nodes, classes):
    if nodes:
        nodes = [node("ReduceMean", "x", "z", keepdims=0), node("Softmax", "z", "y")]
    graph(shape=("n", 4, 8, 8), output=("n", 4), nodes=nodes)
    spec = ModelSpec("onnx", "mine", {}, ["a", "b", "c"], InputSpec(4, 8, [0.5] * 4, [0.2] * 4))
    network, spec = foreign_teacher.load_foreign(spec, Path("mine.onnx"), classes=classes)
    images = torch.randn(5, 4, 8, 8)
    torch.testing.assert_close(network(images), images.mean((2, 3))[:, [3, 0, 2]])
    assert spec.pretrained_classes == [3, 0, 2]
    checkpoint.save(Path(), network, spec)
    again, _ = checkpoint.load(Path(), produced_by="-")
    assert torch.equal(again(images), network(images))
    with pytest.raises(UserError, match="`teacher.checkpoint_key` is set, but family `onnx` takes"):
        foreign_teacher.load_foreign(spec, Path("mine.onnx"), key="model")


def test_the_fingerprint_covers_the_file(folder):
    prints = set()
    for mean in ("ReduceMean", "ReduceSum"):
        graph(nodes=[node(mean, "x", "y", keepdims=0)])
        (folder / mean).mkdir()
        checkpoint.save(folder / mean, load(), describe())
        prints.add(checkpoint.fingerprint(folder / mean, produced_by="-"))
    assert len(prints) == 2


def test_a_file_whose_logits_depend_on_the_batch_is_refused(folder):
    of_batch = [
        onnx.helper.make_node("Constant", [], ["first"], value_ints=[0]),
        onnx.helper.make_node("ReduceMean", ["m", "first"], ["b"], keepdims=1),
        onnx.helper.make_node("Sub", ["m", "b"], ["y"]),
    ]
    graph(nodes=[MEAN, *of_batch])
    with pytest.raises(UserError, match="^`mine.onnx`: .* other logits for an image beside anothe"):
        load()
    shape = onnx.helper.make_node("Constant", [], ["s"], value_ints=[1, 3])
    graph(nodes=[MEAN, shape, onnx.helper.make_node("Reshape", ["m", "s"], ["y"])])
    with pytest.raises(
        UserError, match=r"fails in evaluation, on images \[2, 3, 8, 8\].*batches of"
    ):
        load()


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


# Weights in files beside it.


def export_by_default(network: nn.Module, path: Path = Path("mine.onnx")) -> None:
    """As torch.onnx.export does it: the weights are in mine.onnx.data."""
    images = torch.zeros(2, 3, 16, 16)
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(network.eval(), (images,), path, dynamic_shapes=dynamic, verbose=False)
    assert Path(f"{path}.data").is_file()


def test_an_export_with_external_data_teaches_as_the_whole_file(project, capsys):
    network, _ = checkpoint.load(TEACHER.model, produced_by="-")
    export_by_default(network)
    set_teacher()
    run_stage("teacher")
    assert (
        "its weights are in `mine.onnx.data`, which DVC does not watch" in capsys.readouterr().out
    )
    first = bytes_of(TEACHER.model)
    Path("mine").mkdir()
    for name in ("mine.onnx", "mine.onnx.data"):
        Path(name).rename(Path("mine") / name)
    set_teacher(checkpoint="mine")  # the folder
    assert not check.problems()
    run_stage("teacher")
    assert bytes_of(TEACHER.model) == first
    assert "DVC" not in capsys.readouterr().out
    shutil.rmtree("mine")
    rebuilt, spec = checkpoint.load(TEACHER.model, produced_by="-")  # of its saved weights alone
    images = spec.input.apply(torch.from_numpy(np.array(open_dataset().splits["test"].images)))
    torch.testing.assert_close(rebuilt(images), network(images), rtol=1e-3, atol=1e-3)


def outside(
    location: str = "mine.data", *, size: int = 16, shape=(3,), offset: int = 4, length: int = 12
) -> None:
    """Write mine.onnx with three numbers in another file, and that file with this size."""
    graph(nodes=[node("ReduceMean", "x", "m", keepdims=0), add_numbers()])
    model = onnx.load("mine.onnx")
    tensor = model.graph.initializer.add(name="numbers", data_type=1, dims=shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
    onnx.save(model, "mine.onnx")
    with Path("mine.data").open("wb") as file:
        file.write(np.array([9, 1, 2, 3], np.float32).tobytes())
        file.truncate(size)


def add_numbers() -> onnx.NodeProto:
    return onnx.helper.make_node("Add", ["m", "numbers"], ["y"])


def test_the_digest_and_the_logits_cover_the_external_data(folder):
    images, prints = torch.randn(2, 3, 8, 8), set()
    for last in (3, 4):
        outside()
        numbers = np.array([9, 1, 2, last], np.float32)
        Path("mine.data").write_bytes(numbers.tobytes())
        network = load()
        expected = images.mean((2, 3)) + torch.from_numpy(numbers[1:])
        torch.testing.assert_close(network(images), expected)
        prints.add(checkpoint.state_bytes(network))
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("location", "changed", "message"),
    [
        ("../mine.data", {}, r"keeps weights in `\.\./mine.data`; expected the name of a file in"),
        (
            "/etc/hostname",
            {},
            "keeps weights in `/etc/hostname`; expected the name of a file in its",
        ),
        ("a/mine.data", {}, "keeps weights in `a/mine.data`; expected the name of a file in its"),
        ("..", {}, r"keeps weights in `\.\.`; expected the name of a file in its own folder"),
        ("", {}, "keeps weights in ``; expected the name of a file in its own folder"),
        ("other.data", {}, r"weights in `other.data`, which is not beside it; expected it in `\.`"),
        ("mine.data", {"size": 15}, "expects weights beyond the 15 bytes of `mine.data`"),
        ("mine.data", {"offset": -4}, "expects weights beyond the 16 bytes of `mine.data`"),
        (
            "mine.data",  # a sparse file: no disk is filled
            {"size": 2**31, "offset": 0, "length": 2**31, "shape": (2**29,)},
            r"take 2,147,48\d,\d+ bytes; expected at most 2,147,483,647, .*float16",
        ),
    ],
)
def test_external_data_elsewhere_absent_or_too_large_are_refused(
    folder, location, changed, message
):
    outside(location, **changed)
    with pytest.raises(UserError, match=f"^`mine.onnx`: .*{message}"):
        load()


def test_a_folder_with_two_onnx_files_is_refused(folder):
    graph()
    Path("mine.onnx").rename("a.onnx")
    graph()
    with pytest.raises(UserError, match=r"exactly one .onnx file; found `a.onnx`, `mine.onnx`"):
        foreign_teacher.load_foreign(describe(), Path())


@pytest.mark.slow
def test_dvc_runs_the_teacher_again_for_other_external_data_in_its_folder(tmp_path):
    clone = cloned(tmp_path)
    imported = clone.root / "models/imported/mine"
    imported.mkdir(parents=True)
    torch.manual_seed(0)
    export_by_default(cifar_resnet.build("resnet8", 3, 3), imported / "mine.onnx")
    network = {"family": "onnx", "network": "mine", "weights": "checkpoint"}
    clone.params["teacher"] |= network | {
        "checkpoint": "models/imported/mine",
        "minimum_accuracy": 0.01,
    }
    assert clone.repro("teacher") == {"prepare", "teacher"}
    assert clone.repro("teacher") == set()
    data = imported / "mine.onnx.data"
    numbers = np.frombuffer(data.read_bytes(), np.float32)
    data.write_bytes((numbers * np.float32(1.01)).tobytes())
    assert clone.repro("teacher") == {"teacher"}


# Other inputs and outputs.


def test_a_float16_file_teaches(folder):
    nodes = [
        node("ReduceMean", "x", "z", keepdims=0),
        node("Cast", "z", "y", to=onnx.TensorProto.FLOAT),
    ]
    graph(kind=onnx.TensorProto.FLOAT16, nodes=nodes)
    images = torch.randn(4, 3, 8, 8)
    logits = load()(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, images.mean((2, 3)), rtol=1e-2, atol=1e-3)
    assert load().cost(3, 8)["parameters"] == 0


def test_the_projects_own_export_teaches_another_run_without_double_normalisation(
    project, finished_project
):
    student, spec = checkpoint.load(finished_project / "models/students/small", produced_by="-")
    shutil.copy(finished_project / "models/exported/small.onnx", "mine.onnx")
    change_params("dataset", image_size=20)  # the export takes 16
    run_stage("prepare")
    set_teacher(minimum_accuracy=0.01)
    change_params("dataset", image_size=20)
    run_stage("teacher")
    _, description = checkpoint.load(TEACHER.model, produced_by="-")
    assert description.input == InputSpec(3, 16, [0.0] * 3, [1 / 255] * 3)
    change_params("dataset", image_size=16)
    run_stage("prepare")
    run_stage("teacher")
    network, description = checkpoint.load(TEACHER.model, produced_by="-")
    views = torch.from_numpy(np.array(open_dataset().splits["test"].images))
    expected = student(spec.input.apply(views)).detach()
    torch.testing.assert_close(network(description.input.apply(views)), expected, rtol=0, atol=1e-4)
    run_stage("soft_targets")
    set_teacher(mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(UserError, match="normalises them itself. Remove `mean` and `std` from"):
        run_stage("teacher")


def test_of_several_outputs_the_one_that_fits_or_is_named_is_taken(folder):
    graph(nodes=[node("ReduceMean", "x", "y", keepdims=0), node("ReduceMax", "x", "z", keepdims=0)])
    model = onnx.load("mine.onnx")
    float32, images = onnx.TensorProto.FLOAT, torch.randn(4, 3, 8, 8)
    for name, shape in (("z", ("n", 3)), ("x", ("n", 3, 8, 8))):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, float32, shape))
    onnx.save(model, "mine.onnx")
    with pytest.raises(UserError, match=r"outputs `y` \['n', 3\], `z` \['n', 3\], `x` \['n', 3, 8"):
        load()
    with pytest.raises(UserError, match=r"Name one of them: `options: \{output: NAME\}` in `teac"):
        load()
    torch.testing.assert_close(load(output="z")(images), images.amax((2, 3)))
    torch.testing.assert_close(load(output="y")(images), images.mean((2, 3)))
    with pytest.raises(
        UserError, match="option `output` is 'w'; the ONNX file has the outputs `y`"
    ):
        load(output="w")
    del model.graph.output[1]
    onnx.save(model, "mine.onnx")
    torch.testing.assert_close(load()(images), images.mean((2, 3)))


def test_several_inputs_are_refused_by_name(folder):
    graph()
    model = onnx.load("mine.onnx")
    mask = onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, ("n", 1))
    model.graph.input.append(mask)
    onnx.save(model, "mine.onnx")
    with pytest.raises(UserError, match=r"inputs `x` tensor\(float\), `mask` tensor\(float\); exp"):
        load()


def test_a_file_that_takes_bgr_gets_it(folder):
    graph()
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(load(channels="bgr")(images), images.mean((2, 3)).flip(1))
    with pytest.raises(UserError, match="option `channels` is 'gbr'; expected rgb or bgr"):
        load(channels="gbr")
