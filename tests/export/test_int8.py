"""An int8 file computes the same on every processor, and ships only if it loses little."""

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch
from conftest import PARAMS, prepare, write_images
from import_closure import ROOT
from onnx import TensorProto, helper, numpy_helper

from pipeline.export.int8 import calibration_views, float_operations, to_int8
from pipeline.export.int8_checks import APART, int8_accuracy, verify_kernels
from pipeline.export.running.onnx_model import ExportedNetwork, OnnxMetadata
from pipeline.export.to_onnx import OPSET, NotExportable, to_onnx
from pipeline.models.spec import InputSpec, ModelSpec, build
from pipeline.runtime.errors import UserError
from pipeline.views.loader import make_views
from pipeline.views.params import ViewsParams

INPUT = InputSpec(3, 16, [0.5] * 3, [0.25] * 3)
METADATA = OnnxMetadata(
    name="mine",
    role="distilled",
    precision="float32",
    fingerprint="-",
    class_names=list("abc"),
    opset=OPSET,
    channels=3,
    image_size=16,
    reading={"storage": "pixels", "image_size": 16},
)
INT16 = np.iinfo(np.int16)


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 16, 16), np.uint8)


def calibration() -> Iterator[np.ndarray]:
    return iter(np.split(images(64, 0), 4))


@pytest.fixture(scope="module")
def float32_file() -> bytes:
    torch.manual_seed(0)
    network = build(ModelSpec("cifar_resnet", "resnet8", {}, list("abc"), INPUT))
    with torch.no_grad():
        network.train()(INPUT.apply(torch.from_numpy(images(64, 0))))  # statistics of batch norm
    return to_onnx(network.eval(), INPUT, METADATA)


@pytest.fixture(scope="module")
def int8_file(float32_file) -> bytes:
    return to_int8(float32_file, calibration())


def weights_of(content: bytes) -> list[np.ndarray]:
    """The quantised weights, of the initialisers that DequantizeLinear reads."""
    tensors = [
        numpy_helper.to_array(each) for each in onnx.load_from_string(content).graph.initializer
    ]
    return [each for each in tensors if each.dtype == np.int8 and each.ndim > 1]


def added_in_16_bits(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Two products of uint8 and int8 as VPMADDUBSW adds them, without VNNI: the sum saturates."""
    products = activations.astype(np.int32) * weights.astype(np.int32)
    return (products[..., 0] + products[..., 1]).clip(INT16.min, INT16.max)


def test_sums_of_two_products_fit_in_16_bits_with_weights_of_7_bits_alone():
    assert 2 * 255 * 64 <= INT16.max < 2 * 255 * 127
    brightest = np.array([255, 255], np.uint8)
    for weight, fits in ((64, True), (-64, True), (65, False), (127, False), (-128, False)):
        pair = np.array([weight, weight])
        assert (added_in_16_bits(brightest, pair) == 2 * 255 * weight) == fits


def test_no_kernel_can_saturate_on_the_weights_of_an_int8_file(float32_file, int8_file):
    weights = weights_of(int8_file)
    assert len(weights) == 10  # 9 convolutions and the linear layer
    assert {int(np.abs(each.astype(int)).max()) for each in weights} <= {63, 64}
    full = weights_of(to_int8(float32_file, calibration(), weight_bits=8))
    assert max(np.abs(each.astype(int)).max() for each in full) == 127
    for tensors, saturates in ((weights, False), (full, True)):
        pairs = np.concatenate([np.sort(each, axis=None)[-2:] for each in tensors]).reshape(-1, 2)
        exact = 255 * pairs.astype(int).sum(1)
        assert (
            added_in_16_bits(np.full_like(pairs, 255, np.uint8), pairs) < exact
        ).any() == saturates


def test_an_int8_file_has_its_float32_files_metadata_and_says_that_it_is_int8(
    float32_file, int8_file
):
    assert ExportedNetwork(int8_file, "mine", 1).metadata == METADATA.model_copy(
        update={"precision": "int8"}
    )
    before, after = (onnx.load_from_string(content) for content in (float32_file, int8_file))
    onnx.checker.check_model(after, full_check=True)
    assert after.doc_string == before.doc_string
    assert [entry.key for entry in after.metadata_props] == [
        entry.key for entry in before.metadata_props
    ]
    assert [(o.domain, o.version) for o in after.opset_import] == [("", OPSET)]
    assert len(int8_file) < 0.4 * len(float32_file)


def test_every_weight_has_a_scale_for_each_of_its_output_channels(int8_file):
    graph = onnx.load_from_string(int8_file).graph
    shapes = {each.name: list(each.dims) for each in graph.initializer}
    scales = [
        (shapes[node.input[0]], shapes[node.input[1]])
        for node in graph.node
        if node.op_type == "DequantizeLinear" and len(shapes.get(node.input[0], [])) > 1
    ]
    assert len(scales) == 10
    for weight, scale in scales:
        assert scale == [3 if weight == [64, 3] else weight[0]]  # the linear layer's is transposed


def test_the_preprocessing_stays_in_float32_and_the_rest_becomes_integer_kernels(int8_file):
    nodes = [node.op_type for node in onnx.load_from_string(int8_file).graph.node]
    start = nodes.index("QuantizeLinear")
    assert [kind for kind in nodes[:start] if kind != "DequantizeLinear"] == ["Cast", "Sub", "Mul"]
    assert float_operations(int8_file) == {"Cast": 1, "Mul": 1, "ReduceMean": 1, "Sub": 1}


def test_an_int8_file_gives_nearly_its_float32_files_logits(float32_file, int8_file):
    pixels = images(64, 1)
    expected, actual, as_written = (
        ExportedNetwork(content, "mine", 1, optimised=optimised).logits(pixels)
        for content, optimised in ((float32_file, True), (int8_file, True), (int8_file, False))
    )
    assert 0 < np.abs(actual - expected).max() < 0.2 * np.ptp(expected)
    assert verify_kernels("`mine`", actual, as_written)["kernel_difference"] < APART


def test_other_batches_of_the_same_views_give_the_same_bytes(float32_file, int8_file):
    assert to_int8(float32_file, [images(64, 0)]) == int8_file


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(float32_file, int8_file, tmp_path):
    (tmp_path / "file.onnx").write_bytes(float32_file)
    np.save(tmp_path / "views.npy", images(64, 0))
    program = (
        "import hashlib, sys; import numpy as np; from pathlib import Path\n"
        "from pipeline.export.int8 import to_int8\n"
        "folder = Path(sys.argv[1])\n"
        "content = to_int8((folder / 'file.onnx').read_bytes(), [np.load(folder / 'views.npy')])\n"
        "print(hashlib.sha256(content).hexdigest())"
    )
    for seed in ("1", "2"):
        printed = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        assert printed.strip() == hashlib.sha256(int8_file).hexdigest()


def test_a_network_without_weights_has_no_int8_file():
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["x"], ["logits"], axes=[2, 3], keepdims=0),
        ],
        "mean of each colour",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, METADATA.metadata())
    with pytest.raises(NotExportable, match="student `mine` has no operation that onnxruntime qua"):
        to_int8(model.SerializeToString(), calibration())


def test_the_quantisers_refusal_is_one_line_with_its_reason(float32_file):
    with pytest.raises(NotExportable) as refusal:
        to_int8(float32_file, [])
    assert re.fullmatch(
        r"student `mine` cannot be quantised by onnxruntime: No data is collected\.",
        str(refusal.value),
    )


def test_an_image_that_cannot_be_read_is_not_blamed_on_the_quantiser(float32_file):
    def batches() -> Iterator[np.ndarray]:
        yield images(4, 0)
        raise UserError("`x.png` is damaged")

    with pytest.raises(UserError, match="^`x.png` is damaged$"):
        to_int8(float32_file, batches())


def test_calibration_is_by_the_first_cached_view_of_images_spread_over_training(folder):
    write_images(folder / "images", per_class=6)
    dataset, params = prepare(), ViewsParams(**PARAMS["views"])
    train = dataset.splits["train"]
    every = np.concatenate(list(calibration_views(dataset, params)))
    found = np.concatenate(list(calibration_views(dataset, params, 4)))
    (view,) = make_views(
        torch.from_numpy(np.array(train.images)),
        params.view_policy,
        params.seed,
        0,
        [np.arange(len(train))],
        torch.device("cpu"),
    )
    assert np.array_equal(every, view.pixels.numpy())
    assert len(train) == 12
    assert np.array_equal(found, every[[0, 3, 7, 11]])


# Whether kernels and graph agree.


def logits_of(classes: np.ndarray, margin: float = 8.0) -> np.ndarray:
    return margin * np.eye(4)[classes] + np.random.default_rng(0).normal(size=(len(classes), 4))


@pytest.mark.parametrize(("count", "differ", "refused"), [(200, 2, 0), (200, 3, 1), (12, 1, 0)])
def test_one_image_in_a_hundred_may_get_another_class(count, differ, refused):
    as_written = np.full((count, 2), [1.0, 1.001])
    as_written[: count // 2] *= 100
    kernels = as_written.copy()
    kernels[-differ:] = [1.001, 1.0]
    if not refused:
        figures = verify_kernels("`mine`", kernels, as_written)
        assert figures["kernel_decisions_that_differ"] == differ
        return
    with pytest.raises(NotExportable, match=r"give 3 of 200 test images another class \(tolerance"):
        verify_kernels("`mine`", kernels, as_written)


def test_logits_that_part_are_refused_though_every_class_is_the_same():
    as_written = logits_of(np.arange(200) % 4, margin=50)
    noise = np.random.default_rng(1).normal(size=as_written.shape)
    verify_kernels("`mine`", as_written + 0.5 * noise, as_written)
    with pytest.raises(
        NotExportable, match=r"0 of 200 test .* logits that are 9\.\d% of their spr"
    ):
        verify_kernels("`mine`", as_written + 2 * noise, as_written)
    with pytest.raises(NotExportable):
        verify_kernels("`mine`", as_written * np.nan, as_written)


# Whether it loses little.


def accuracy_of(count: int, lost: int, gained: int, largest_loss: float = 0.5):
    """The float32 file classifies all but `gained` images rightly, int8 all but `lost`."""
    labels = np.zeros(count, int)
    float32, int8 = labels.copy(), labels.copy()
    float32[:gained], int8[gained : gained + lost] = 1, 1
    return int8_accuracy(np.eye(2)[float32], np.eye(2)[int8], labels, largest_loss)


@pytest.mark.parametrize(
    ("count", "lost", "gained", "refused"),
    [
        (359, 0, 0, False),
        (359, 0, 1, False),
        (359, 1, 0, True),  # 0.28 points: the interval reaches 0.84
        (359, 3, 3, True),
        (4_000, 8, 0, False),  # 0.2 points: the interval reaches 0.35
        (4_000, 24, 6, True),  # 0.45 points
        (4_000, 21, 0, True),
    ],
)
def test_a_file_is_refused_where_the_interval_reaches_beyond_the_largest_loss(
    count, lost, gained, refused
):
    found = accuracy_of(count, lost, gained)
    assert found.refused == refused
    assert found.gain.gain == pytest.approx((gained - lost) / count)
    assert found.gain.low <= found.gain.gain <= found.gain.high
    assert found.float32 - found.int8 == pytest.approx((lost - gained) / count)


def test_the_sentence_has_the_numbers_and_what_follows():
    assert accuracy_of(400, 4, 0).sentence == (
        "int8 loses 1.00 points of accuracy against the float32 file (100.00% to 99.00%; 95 % "
        "interval of the difference -2.00 to -0.25) on 400 test images, which leave a loss beyond "
        "`export.largest_loss`, 0.5 points, possible"
    )
    assert accuracy_of(400, 4, 0, largest_loss=3).sentence.endswith(
        "400 test images: within `export.largest_loss`, 3 points"
    )
    assert "int8 gains 0.25 points" in accuracy_of(400, 0, 1).sentence


def test_the_interval_is_of_pairs_so_errors_that_both_files_make_do_not_widen_it():
    labels, guess = np.zeros(400, int), np.arange(400) % 2
    logits = np.eye(2)[guess]  # half are wrong, the same in both
    found = int8_accuracy(logits, logits, labels, 0.5)
    assert (found.gain.low, found.gain.high, found.refused) == (0, 0, False)
