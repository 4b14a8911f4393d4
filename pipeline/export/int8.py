"""Quantise an exported float32 file to int8, by onnxruntime's own static quantiser.

Weights and activations are rounded where QuantizeLinear and DequantizeLinear stand in the graph
(QDQ); onnxruntime replaces what is between them by integer kernels. Weights have a scale for each
output channel: with one for each tensor, MobileNetV2 loses most of its accuracy.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch

from pipeline.data.prepared.dataset import Dataset
from pipeline.export.running.file_images import evenly_spread, open_images
from pipeline.export.running.onnx_model import IMAGE, ExportedNetwork
from pipeline.export.running.reading import Reading
from pipeline.export.to_onnx import NotExportable, quiet
from pipeline.runtime.errors import UserError, first_line
from pipeline.views.loader import batches_of, open_views
from pipeline.views.params import ViewsParams

# Before the import: by default onnxruntime reports its use.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

#: Training images behind the ranges of activations. From 128 on, more made no difference for the
#: students of the first run; datasets of many classes need more.
CALIBRATION_IMAGES = 512
#: Operations with weights. What is before the first of them prepares the image, and stays float32.
_WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def calibration_views(
    dataset: Dataset,
    params: ViewsParams,
    count: int = CALIBRATION_IMAGES,
    *,
    clean: Reading | None = None,
) -> Iterator[np.ndarray]:
    """Yield the first cached view of training images spread evenly over the split: batches of
    [B, C, S, S] uint8, `count` images in all, or all there are.

    Args:
        dataset: of images of the side that the file takes.
        clean: the reading of a file that cuts the middle out of its images: then they have no
            augmentation. A view's middle is no view of the training.
    """
    train = dataset.splits["train"]
    samples = evenly_spread(len(train), count)
    if clean is None:
        views = open_views(train, params.view_policy, params.seed, torch.device("cpu"))
    else:
        views = open_images(train, clean)
    for batch in views.batches(0, batches_of(samples, 64)):
        yield batch.pixels.numpy()


class _Calibration(CalibrationDataReader):
    def __init__(self, batches: Iterable[np.ndarray]):
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {IMAGE: batch}


def to_int8(
    float32_file: bytes, calibration: Iterable[np.ndarray], *, weight_bits: Literal[7, 8] = 7
) -> bytes:
    """Quantise a file that `to_onnx` wrote to the bytes of an int8 file, of the same input and
    output. Equal files and batches give equal bytes, with one version of onnxruntime.

    Activations are uint8, in the range that they have on the calibration's images; weights are
    symmetric int8.

    Args:
        calibration: batches of training images, [B, C, S, S] uint8; CALIBRATION_IMAGES in all.
        weight_bits: 7: weights from -64 to 64. Kernels for AVX2 and for AVX-512 without VNNI add
            two products of 8 bits in 16: 2 * 255 * 64 = 32,640 fits in them, 2 * 255 * 127 does
            not, and is cut off. 8: to measure what that costs, and what VNNI would allow.

    Raises:
        NotExportable: onnxruntime cannot quantise it, with the reason.
    """
    described = ExportedNetwork(float32_file, "the float32 file", 1).metadata.described
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            source, prepared, result = (Path(folder, f"{n}.onnx") for n in ("a", "b", "c"))
            source.write_bytes(float32_file)
            # Merges batch norm and constants. Symbolic shapes would take seconds to import sympy.
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                result,
                _Calibration(calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=weight_bits == 7,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_preprocessing(onnx.load(prepared)),
            )
            model = onnx.load(result)
    except UserError:  # of the calibration's images
        raise
    except Exception as error:  # onnxruntime's errors have no common class
        raise NotExportable(
            f"{described} cannot be quantised by onnxruntime: {first_line(error).rstrip('.')}."
        ) from None
    if "QuantizeLinear" not in {node.op_type for node in model.graph.node}:
        raise NotExportable(f"{described} has no operation that onnxruntime quantises.")
    _take_metadata(model, onnx.load_from_string(float32_file))
    return model.SerializeToString(deterministic=True)


def _preprocessing(model: onnx.ModelProto) -> list[str]:
    """The names of the nodes before the network's first one with weights, in the order of
    execution. (A resizing that shrinks is a product with weights of its own.)"""
    names = []
    for node in model.graph.node:
        resizes = any(name.startswith("preprocessing.") for name in node.input)
        if node.op_type in _WITH_WEIGHTS and not resizes:
            break
        names.append(node.name)
    return names


def _take_metadata(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Describe the quantised file as the original is described, and as int8."""
    del model.metadata_props[:]
    properties = {entry.key: entry.value for entry in original.metadata_props}
    onnx.helper.set_model_props(model, properties | {"precision": "int8"})
    model.doc_string = original.doc_string
    domains = {node.domain for node in model.graph.node}
    used = [entry for entry in model.opset_import if entry.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(used)


def float_operations(content: bytes) -> dict[str, int]:
    """Count what onnxruntime computes in float32 in an int8 file, by kind, in alphabetical order.

    Counted in the graph that onnxruntime makes of it for the CPU, where integer kernels have
    replaced the operations between DequantizeLinear and QuantizeLinear.
    """
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors alone
    # The next level lays tensors out for this machine's processor.
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "optimised.onnx")
        settings.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
        graph = onnx.load(path).graph
    types = {
        value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)
    }
    integers = {name for name, kind in types.items() if kind != onnx.TensorProto.FLOAT}
    counts: Counter[str] = Counter()
    for node in graph.node:  # in the order of execution
        (first, *_), (output, *_) = [*node.input, ""], node.output
        if node.op_type.startswith("Q") or (output not in types and first in integers):
            integers.add(output)
        elif output not in integers and node.op_type != "DequantizeLinear":
            counts[node.op_type] += 1
    return dict(sorted(counts.items()))
