"""A network that is an ONNX file, of any framework: a teacher that cannot be trained.

The file's bytes are the network's only tensor, so its saved weights contain them and its
fingerprint covers them. Weights in files beside it (external data) are put into these bytes.
"""

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import Message
from onnx import helper, numpy_helper
from torch import Tensor, nn

from pipeline.runtime.errors import UserError, first_line
from pipeline.runtime.files import START_BYTES, describe_text

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime reports its use when loaded
import onnxruntime

_LAYOUTS = ("nchw", "nhwc")
_CHANNELS = ("rgb", "bgr")
_LARGEST_BATCH = 4096
_LARGEST_FILE = 2**31 - 1  # bytes, of a protobuf message
#: Nodes of convolutions and matrix products -> the place of the second factor among their inputs.
_FACTORS = {
    **dict.fromkeys(("Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul"), 1),
    **dict.fromkeys(("ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul"), 1),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), 3),
}
#: Nodes -> the places of inputs that are weights, as integers; and of numbers that are no weights:
#: scales of integers, and what batch norm has measured.
_INTEGER_WEIGHTS = {
    **dict.fromkeys(("ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul"), (1,)),
    **{"DequantizeLinear": (0,), "QLinearConv": (3, 8), "QLinearMatMul": (3,), "QGemm": (3, 6)},
}
_NO_WEIGHTS = {
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), (1,)),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QLinearAdd"), (1, 4, 6)),
    **{"QGemm": (1, 4, 7), "BatchNormalization": (3, 4), "DynamicQuantizeMatMul": (2,)},
}
_INPUTS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


def build(network: str, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    raise UserError(
        f"network `{network}` of family `onnx` is a file that cannot be trained. It can be a "
        "teacher: set `weights: checkpoint` and `teacher.checkpoint` to the .onnx file."
    )


def read_file(path: Path) -> dict[str, Tensor]:
    """Read the file, and the weights in files beside it, as the state of a network.

    Args:
        path: the file, or the folder with it and the files of its weights.

    Raises:
        UserError: it is no ONNX file, or a file of its weights is absent, elsewhere or too large.
    """
    file = _file_in(path)
    content = np.fromfile(file, np.uint8)
    model = _parsed(content.tobytes())
    names = _include_weights(model, file)
    if names:
        content = np.frombuffer(model.SerializeToString(deterministic=True), np.uint8).copy()
        if file == path:
            print(
                f"  {path}: its weights are in `{'`, `'.join(names)}`, which DVC does not watch: "
                "put all into a folder, and name the folder in `teacher.checkpoint`",
                flush=True,
            )
    return {"onnx": torch.from_numpy(content)}


def fixed_input(
    path: Path, in_channels: int, layout: str | None = None, **_: object
) -> tuple[int | None, bool]:
    """The side of the only images that the file takes, in pixels (None: any), and whether it takes
    pixels as they are, uint8 in 0 to 255, and normalises them itself."""
    graph = _parsed(_file_in(path).read_bytes()).graph
    weights = {tensor.name for tensor in graph.initializer}
    kinds = [i.type.tensor_type for i in graph.input if i.name not in weights]
    if len(kinds) != 1 or len(kinds[0].shape.dim) != 4:
        return None, False  # refused when it is built
    shape = [dim.dim_value for dim in kinds[0].shape.dim]
    last = layout == "nhwc" or (layout is None and shape[3] == in_channels != shape[1])
    height, width = shape[1:3] if last else shape[2:]
    side = height if height == width and height > 0 else None
    return side, kinds[0].elem_type == onnx.TensorProto.UINT8


def build_from_file(
    state: Mapping[str, Tensor],
    num_classes: int,
    in_channels: int,
    layout: str | None = None,
    output: str | None = None,
    channels: str = "rgb",
) -> nn.Module:
    """Build the network that the file is, from the state of `read_file`.

    Args:
        layout: of the input, nchw or nhwc, if its shape leaves both possible.
        output: the name of the output that has the logits, if several could.
        channels: the order that it takes, rgb or bgr.

    Raises:
        UserError: it is no ONNX file, one in several parts, or one with other inputs or outputs.
    """
    return OnnxNetwork(state["onnx"], num_classes, in_channels, layout, output, channels)


class OnnxNetwork(nn.Module):
    """Runs in onnxruntime, in the file's precision, in batches of the file's size if that is fixed.

    If the file ends in a softmax or a sigmoid, the logits are its input.
    """

    def __init__(
        self,
        file: Tensor,
        num_classes: int,
        in_channels: int,
        layout: str | None,
        output: str | None,
        channels: str,
    ):
        super().__init__()
        self.register_buffer("onnx", file)
        self._model = _parsed(file.numpy().tobytes())
        if any(_external(self._model)):
            raise UserError("the ONNX file keeps its weights in other files; expected one file.")
        _choose_output(self._model, num_classes, output)
        self.remarks = _use_logits(self._model)
        if self.quantises_by_batch:
            self.remarks.append(
                "the ONNX file is quantised by the range of each batch: the logits of an image "
                "depend on the other images of its batch, too"
            )
        self._session = _session(self._model)
        (self._input,) = self._session.get_inputs()
        self._dtype = _INPUTS[self._input.type]
        batch = self._input.shape[0] if self._input.shape else None
        if isinstance(batch, int) and not 1 <= batch <= _LARGEST_BATCH:
            raise UserError(
                f"the ONNX file takes {batch:,} images at a time; expected any number "
                f"up to {_LARGEST_BATCH:,}. Export it for batches of any size."
            )
        self._layout = layout or _layout_of(self._input.shape, in_channels)
        self._reverses = channels == "bgr"
        for name, value, known in (
            ("layout", self._layout, _LAYOUTS),
            ("channels", channels, _CHANNELS),
        ):
            if value not in known:
                raise UserError(f"option `{name}` is {value!r}; expected {' or '.join(known)}.")

    def _apply(self, *_: Any, **__: Any) -> "OnnxNetwork":
        """Stay where it is: onnxruntime has its own copy of the weights on a GPU."""
        return self

    @property
    def batch_size(self) -> int | None:
        """The only number of images that the file takes at a time; None: any."""
        size = self._input.shape[0]
        return size if isinstance(size, int) else None

    @property
    def quantises_by_batch(self) -> bool:
        """Whether ranges of activations are those of the batch (dynamic quantisation)."""
        return any(node.op_type.startswith("DynamicQuantize") for node in self._model.graph.node)

    @property
    def graph(self) -> onnx.ModelProto:
        """A copy of the file whose only output are the logits."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self._model)
        return copy

    @property
    def input_format(self) -> dict[str, Any]:
        """Type, layout and order of channels of the images that the file takes."""
        return {
            "dtype": self._dtype,
            "channels_last": self._layout == "nhwc",
            "bgr": self._reverses,
        }

    @property
    def takes_pixels(self) -> bool:
        """Whether its input is uint8 in 0 to 255, which it normalises itself."""
        return self._dtype == np.uint8

    def forward(self, inputs: Tensor) -> Tensor:  # [B, C, H, W] -> [B, num_classes]
        if torch.is_autocast_enabled(inputs.device.type):
            raise UserError(
                "an ONNX teacher computes in float32: set soft_targets.precision to it."
            )
        images = inputs.detach().cpu().numpy()
        if self._reverses:
            images = images[:, ::-1]
        if self.takes_pixels:
            images = np.rint(images).clip(0, 255)
        images = images.astype(self._dtype, copy=False)
        if self._layout == "nhwc":
            images = images.transpose(0, 2, 3, 1)
        self._check_size(images.shape)
        return torch.from_numpy(self._logits(np.ascontiguousarray(images))).to(inputs.device)

    def _check_size(self, shape: tuple[int, ...]) -> None:
        sides = slice(2, 4) if self._layout == "nchw" else slice(1, 3)
        expected, actual = self._input.shape[sides], list(shape[sides])
        if any(isinstance(e, int) and e != a for e, a in zip(expected, actual, strict=True)):
            raise UserError(
                f"the ONNX file takes images of {expected[0]} x {expected[1]} pixels, but gets "
                f"{actual[0]} x {actual[1]}. Set `input_size: {expected[0]}` in `teacher.network`."
            )

    def _logits(self, images: np.ndarray) -> np.ndarray:
        size = self._input.shape[0]
        size = size if isinstance(size, int) else len(images)
        logits = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            if missing := size - len(batch):
                batch = np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)])
            logits.append(_run(self._session, {self._input.name: batch})[0][: size - missing])
        return np.concatenate(logits).astype(np.float32, copy=False)

    def cost(self, channels: int, size: int) -> dict[str, int]:
        """Count the numbers in the file's weights, and the multiply-accumulates of convolutions and
        matrix products for one image, from the shapes of a run."""
        graph = self._model.graph
        shapes = {name: tuple(tensor.dims) for name, tensor in _constants(graph)}
        numbers = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
        integers, others = _names(graph, _INTEGER_WEIGHTS), _names(graph, _NO_WEIGHTS)
        parameters = sum(
            math.prod(tensor.dims)
            for name, tensor in _constants(graph)
            if name in integers or (tensor.data_type in numbers and name not in others)
        )
        products = [n for n in graph.node if n.op_type in _FACTORS]
        batch = self._input.shape[0] if isinstance(self._input.shape[0], int) else 1
        shape = (channels, size, size) if self._layout == "nchw" else (size, size, channels)
        blank = np.zeros((batch, *shape), self._dtype)
        shapes[self._input.name] = blank.shape
        names = {
            name
            for n in products
            for name in (n.input[0], n.input[_FACTORS[n.op_type]], n.output[0])
        } - shapes.keys()
        traced = onnx.ModelProto()
        traced.CopyFrom(self._model)
        present = {output.name for output in graph.output}
        traced.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names - present)
        session = _session(traced)
        outputs = [output.name for output in session.get_outputs()]
        arrays = _run(session, {self._input.name: blank})
        shapes |= {name: array.shape for name, array in zip(outputs, arrays, strict=True)}
        macs = sum(math.prod(shapes[n.output[0]]) * _depth(n, shapes) for n in products)
        return {"parameters": parameters, "macs": macs // batch}


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """The tensors of the file by name: initializers, and values of nodes `Constant`."""
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], attribute.t


def _names(graph: onnx.GraphProto, places: Mapping[str, Sequence[int]]) -> set[str]:
    """The inputs of nodes at these places, by the nodes' type."""
    return {
        node.input[place]
        for node in graph.node
        for place in places.get(node.op_type, ())
        if place < len(node.input)
    }


def _unused(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _depth(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Multiply-accumulates per number of the output."""
    if "Conv" in node.op_type:
        return math.prod(shapes[node.input[_FACTORS[node.op_type]]][1:])
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return shapes[node.input[0]][0 if transposed else -1]


def _parsed(content: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # protobuf raises many classes
        if text := describe_text(content[:START_BYTES]):
            raise UserError(f"it is not an ONNX file, but {text}") from None
        raise UserError(
            f"it is not an ONNX file, or is cut short ({first_line(error)}). Export it, or copy "
            "it again."
        ) from None
    if not model.graph.node:
        raise UserError("it is not an ONNX file: it has no graph.")
    return model


def _file_in(path: Path) -> Path:
    """The file itself, or the one in a folder."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.onnx"))
    if len(files) != 1:
        found = ", ".join(f"`{file.name}`" for file in files) or "none"
        raise UserError(f"the folder must have exactly one .onnx file; found {found}.")
    return files[0]


def _external(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The tensors whose numbers are in other files."""
    return (t for t in _tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL)


def _include_weights(model: onnx.ModelProto, path: Path) -> list[str]:
    """Read the weights in files beside the model's into the model; return the files' names.

    A name with a folder in it is refused: it could lead to any file of this machine.
    """
    names: dict[str, int] = {}
    parts = []
    for tensor in _external(model):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = PurePosixPath(entries.get("location", ""))
        file = path.parent / location.name
        if location.name != str(location) or location.name in ("", ".."):
            raise UserError(
                f"the ONNX file keeps weights in `{entries.get('location', '')}`; expected the "
                "name of a file in its own folder. Export it again, or without external data."
            )
        if not file.is_file():
            raise UserError(
                f"the ONNX file keeps its weights in `{file.name}`, which is not beside it; "
                f"expected it in `{path.parent}`. Put it there, or export without external data "
                "(`torch.onnx.export(..., external_data=False)`)."
            )
        size = names.setdefault(file.name, file.stat().st_size)
        start, length = _range_of(entries, size, file.name)
        parts.append((tensor, file, start, length))
    total = path.stat().st_size + sum(length for *_, length in parts)
    if parts and total > _LARGEST_FILE:
        raise UserError(
            f"the ONNX file and its weights take {total:,} bytes; expected at most "
            f"{_LARGEST_FILE:,}, which is what one ONNX file can hold. Export it with float16 "
            "weights, or import its logits (`weights: logits`)."
        )
    for tensor, file, start, length in parts:
        with file.open("rb") as opened:
            opened.seek(start)
            tensor.raw_data = opened.read(length)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return list(names)


def _range_of(entries: Mapping[str, str], size: int, name: str) -> tuple[int, int]:
    """The first byte and the number of bytes of a tensor in a file of this size."""
    try:
        start = int(entries.get("offset", 0))
        length = int(entries.get("length", size - start))
    except ValueError:
        start = length = -1
    if min(start, length) < 0 or start + length > size:
        raise UserError(
            f"the ONNX file expects weights beyond the {size:,} bytes of `{name}`; expected the "
            "file that was exported with it. Copy both again."
        )
    return start, length


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, in graphs, attributes and functions."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type:
            for part in (value,) if isinstance(value, Message) else value:
                yield from _tensors(part)


def _choose_output(model: onnx.ModelProto, num_classes: int, name: str | None) -> None:
    """Keep the output of this name, or the only one that could have one number per class."""
    outputs = {output.name: output for output in model.graph.output}
    shapes = {
        key: [dim.dim_value or dim.dim_param for dim in output.type.tensor_type.shape.dim]
        for key, output in outputs.items()
    }
    listed = ", ".join(f"`{key}` {shape}" for key, shape in shapes.items())
    if name is not None and name not in outputs:
        raise UserError(f"option `output` is {name!r}; the ONNX file has the outputs {listed}.")
    fitting = [key for key, s in shapes.items() if len(s) == 2 and s[1] in (num_classes, "")]
    fitting += [key for key, s in shapes.items() if len(s) == 2 and isinstance(s[1], str) and s[1]]
    if name is None and len(fitting) != 1:
        hint = " Name one of them: `options: {output: NAME}` in `teacher.network`."
        raise UserError(
            f"the ONNX file has the outputs {listed}; expected exactly one of [batch, "
            f"{num_classes}], the dataset's classes.{hint if fitting else ''}"
        )
    kept = outputs[name or fitting[0]]
    del model.graph.output[:]
    model.graph.output.append(kept)


def _use_logits(model: onnx.ModelProto) -> list[str]:
    """Take the input of a last softmax or sigmoid, and of what scales it, as the only output.

    Returns:
        what was left out, in sentences.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    output = logits = name = model.graph.output[0].name
    activation = ""
    while node := makers.pop(name, None):  # once: a damaged graph may lead back to it
        source = node.input[0] if node.input else ""
        if node.op_type in ("Mul", "Div") and not activation:
            source = _scaled(node, model)  # percentages of a softmax
        elif node.op_type == "Softmax" or (node.op_type == "Sigmoid" and not activation):
            activation = activation or node.op_type
        elif node.op_type != "Identity":
            break
        name = source
        if activation:
            logits = name
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=logits))
    if activation == "Sigmoid":
        return [
            f"the ONNX file ends in a Sigmoid (`{output}`): its input is the logits, and the "
            "probabilities of a row are their softmax"
        ]
    return [f"the ONNX file ends in a Softmax (`{output}`): its input is the logits"] * bool(
        activation
    )


def _scaled(node: onnx.NodeProto, model: onnx.ModelProto) -> str:
    """The input of a product or quotient by one positive number; empty for any other."""
    numbers = dict(_constants(model.graph))
    for constant in (each for each in model.graph.node if each.op_type == "Constant"):
        for attribute in constant.attribute:
            if attribute.name == "value_float":
                number = numpy_helper.from_array(np.float32(attribute.f).reshape(()))
                numbers[constant.output[0]] = number
    inputs = list(node.input)
    if node.op_type == "Mul" and inputs and inputs[0] in numbers:
        inputs.reverse()
    if len(inputs) != 2 or inputs[1] not in numbers:
        return ""
    factor = numpy_helper.to_array(numbers[inputs[1]])
    return inputs[0] if factor.size == 1 and (factor > 0).all() else ""


def _layout_of(shape: list[Any], channels: int) -> str:
    if len(shape) == 4 and (shape[1] == channels) != (shape[3] == channels):
        return "nchw" if shape[1] == channels else "nhwc"
    raise UserError(
        f"the ONNX file takes an input of {shape}; expected [batch, {channels}, height, width] or "
        f"[batch, height, width, {channels}]. If it is one of these, set "
        "`options: {layout: nchw}` or `nhwc` in `teacher.network`."
    )


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3  # errors only
    providers: list[Any] = ["CPUExecutionProvider"]
    fast = "CUDAExecutionProvider"
    if torch.cuda.is_available() and fast in onnxruntime.get_available_providers():
        # By default the first GPU, for every process, float32 with 10 bits of mantissa, and
        # algorithms that are chosen by timing, so that the last bits would vary.
        settings_of_gpu = {
            "device_id": str(torch.cuda.current_device()),
            "use_tf32": "0",
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        providers.insert(0, (fast, settings_of_gpu))
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers)
    except Exception as error:  # its errors share no class
        raise UserError(f"onnxruntime cannot load the ONNX file ({first_line(error)}).") from None
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in _INPUTS:
        raise UserError(
            f"the ONNX file has the inputs {', '.join(f'`{i.name}` {i.type}' for i in inputs)}; "
            f"expected one of {' or '.join(_INPUTS)}, the images. Export it with these alone."
        )
    return session


def _run(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    try:
        return session.run(None, feed)
    except Exception as error:
        raise RuntimeError(first_line(error)) from None


def select_outputs(
    state: Mapping[str, Tensor],
    rows_of: Callable[[int], list[int]],
    output: str | None = None,
    **_: Any,
) -> tuple[dict[str, Tensor], list[int]]:
    """Make the file's logits those of some classes, in another order.

    Args:
        rows_of: returns the numbers of the logits to keep, from their number.
        output: the name of the output that has the logits, if several could.

    Returns:
        The state of the changed file, and the numbers.

    Raises:
        UserError: it is no ONNX file, or does not say how many logits it has.
    """
    model = _parsed(state["onnx"].numpy().tobytes())
    graph = model.graph
    outputs = [
        o
        for o in graph.output
        if output in (None, o.name) and len(o.type.tensor_type.shape.dim) == 2
    ]
    numbers = {o.type.tensor_type.shape.dim[1].dim_value for o in outputs}
    if len(outputs) != 1 or numbers == {0}:
        raise UserError(
            "`teacher.checkpoint_classes` needs an ONNX file with one output of [batch, classes], "
            f"whose number is fixed; this has {len(outputs)} outputs of two dimensions."
        )
    (number,), kind = numbers, outputs[0].type.tensor_type.elem_type
    name = outputs[0].name
    taken = {tensor.name for tensor in (*graph.initializer, *graph.input, *graph.output)}
    taken = taken.union(*((*node.input, *node.output) for node in graph.node))
    all_logits, classes = (_unused(f"{name}_of_{what}", taken) for what in ("all_classes", "rows"))
    for node in graph.node:  # the output keeps its name
        for names in (node.input, node.output):
            names[:] = [all_logits if each == name else each for each in names]
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(all_logits, kind, ["batch", number]))
    _use_logits(model)
    rows = rows_of(number)
    graph.initializer.append(numpy_helper.from_array(np.array(rows, np.int64), classes))
    inputs = [graph.output[0].name, classes]
    graph.node.append(helper.make_node("Gather", inputs, [name], axis=1))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(name, kind, ["batch", len(rows)]))
    content = np.frombuffer(model.SerializeToString(deterministic=True), np.uint8).copy()
    return {"onnx": torch.from_numpy(content)}, rows
