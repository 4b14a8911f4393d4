"""An exported network: one ONNX file, and its metadata. Imports no torch.

The texts of the metadata are part of the file: a change of one changes every export.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.data.prepared.image_decoding import available_cores
from pipeline.export.running.reading import Reading, Side
from pipeline.runtime.errors import UserError, first_line
from pipeline.runtime.outputs import Precision, Role
from pipeline.runtime.validation import Record, validate

# Before the import: by default onnxruntime reports its use.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime

FORMAT_VERSION = 2
IMAGE, LOGITS = "image", "logits"  # the names of the graph's input and output
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_VERSION_KEY = "teach_once_format_version"
_TEXTS = ("name", "role", "precision", "fingerprint")  # the other entries of the metadata are JSON


def inference_threads() -> int:
    """The threads in which a stage runs files: one per core, or fewer by OMP_NUM_THREADS, which
    onnxruntime does not read. Idle threads wait in loops: two stages at once, with a thread per
    core each, take one another's cores."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    cores = available_cores()
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) else cores


class OnnxMetadata(Record):
    """The metadata of an exported file."""

    name: str  # of the student; or "teacher"
    role: Role
    precision: Precision
    fingerprint: str  # of the trained network, its input and its weights
    class_names: list[str]  # in the order of the logits
    opset: int
    channels: Literal[1, 3]  # 3: RGB, 1: greyscale
    image_size: Side  # of the square images that the graph takes
    reading: Reading

    @property
    def described(self) -> str:
        """``student `resnet8` ``, for messages."""
        if self.role == "teacher":
            return "the teacher"
        return f"{'the baseline of' if self.role == 'baseline' else 'student'} `{self.name}`"

    def metadata(self) -> dict[str, str]:
        texts = {
            key: value if key in _TEXTS else json.dumps(value, ensure_ascii=False)
            for key, value in self.model_dump(exclude_none=True).items()
        }
        return {_VERSION_KEY: str(FORMAT_VERSION), **texts}

    def in_words(self) -> str:
        """Human-readable description of inputs, preprocessing and outputs."""
        side, colour = self.image_size, "RGB" if self.channels == 3 else "greyscale"
        return (
            f"{IMAGE}: uint8 [batch, {self.channels}, {side}, {side}], {colour}, 0 to 255; the "
            "network's own size and normalisation are inside. An image becomes it so: upright by "
            f"its EXIF orientation, 8 bits a channel{self._depth_in_words()}, transparent pixels "
            f"white, {colour}; "
            f"{self._square_in_words()}. {LOGITS}: float32 [batch, {len(self.class_names)}], one "
            "for each of class_names; their softmax gives probabilities."
        )

    def _depth_in_words(self) -> str:
        bits = self.reading.bit_depth
        return "" if bits is None else f" (white is {2**bits - 1:,} where it has more)"

    def _square_in_words(self) -> str:
        side, stored = self.image_size, self.reading.image_size
        if self.reading.storage == "pixels":
            again = (
                ""
                if stored == side
                else f", which is resized to {side} pixels (bicubic, antialiased)"
            )
            return (
                f"its shorter side resized to {stored} pixels (bicubic, antialiased) and the "
                f"middle square cut out{again}"
            )
        quality = self.reading.quality
        kept = (
            ""
            if quality == "original"
            else f"its shorter side reduced to {stored} pixels where it is longer (bicubic, "
            f"antialiased), and encoded as JPEG of quality {quality}; "
        )
        return (
            f"{kept}the middle {side} x {side} pixels, after its shorter side was resized to "
            f"{round(side * self.reading.resize_ratio)} "
            f"({self.reading.interpolation}, antialiased)"
        )


class ExportedNetwork:
    """An exported network in onnxruntime."""

    def __init__(
        self,
        content: bytes,
        origin: str,
        threads: int,
        *,
        provider: str = CPU,
        optimised: bool = True,
    ):
        """Load the bytes of a file, and refuse one that `export` did not write.

        Args:
            origin: the name of the file, for messages.
            provider: CUDA runs the file on a GPU, where onnxruntime can.
            optimised: False runs the graph node by node as it is written: of an int8 file in
                float32 between its roundings, without integer kernels.
        """
        settings = onnxruntime.SessionOptions()
        if not optimised:
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.intra_op_num_threads = threads
        # Else threads spin for over 20 ms after a run, and take the core of another file's run.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        settings.log_severity_level = 3  # errors alone
        providers: list[Any] = [CPU]
        if provider == CUDA:
            # Else float32 has 10 bits of mantissa, and a timing chooses the algorithms.
            providers.insert(0, (CUDA, {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}))
        try:
            self._session = onnxruntime.InferenceSession(content, settings, providers)
        except Exception as error:  # onnxruntime's errors have no common class
            raise UserError(
                f"`{origin}` cannot be loaded by onnxruntime ({first_line(error)}). {_EXPECTED}"
            ) from None
        self._origin = origin
        self.metadata = _read_metadata(self._session.get_modelmeta().custom_metadata_map, origin)
        _check_graph(self._session, self.metadata, origin)

    @property
    def provider(self) -> str:
        """The provider that runs the file: CPU if another cannot be loaded."""
        return self._session.get_providers()[0]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Run the network: [B, C, S, S] uint8 -> [B, num_classes] float32, S = `image_size`."""
        try:
            logits = self._session.run([LOGITS], {IMAGE: images})[0]
            if logits.shape == (len(images), len(self.metadata.class_names)):
                return logits
            problem = f"its output is {list(logits.shape)}"
        except Exception as error:  # onnxruntime's errors have no common class
            problem = first_line(error)
        raise UserError(f"`{self._origin}` fails on images ({problem}). {_EXPECTED}")


def open_file(path: Path, threads: int, *, provider: str = CPU) -> ExportedNetwork:
    """Open an exported file. Refuses one that cannot be read, or that `export` did not write."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"`{path}` cannot be read ({error.strerror}). {_EXPECTED}") from None
    return ExportedNetwork(content, str(path), threads, provider=provider)


_EXPECTED = (
    "Expected a file that `dvc repro export@NAME` wrote, such as `models/exported/NAME.onnx`."
)


def _check_graph(
    session: onnxruntime.InferenceSession, metadata: OnnxMetadata, origin: str
) -> None:
    """Refuse inputs or outputs that are not those of the metadata."""
    pixels = [metadata.channels, metadata.image_size, metadata.image_size]
    classes = [len(metadata.class_names)]
    expected = [(IMAGE, "tensor(uint8)", pixels), (LOGITS, "tensor(float)", classes)]
    actual = [*session.get_inputs(), *session.get_outputs()]
    if [(each.name, each.type, list(each.shape)[1:]) for each in actual] != expected:
        raise UserError(
            f"`{origin}` has the inputs and outputs "
            f"{' and '.join(f'{each.name} {each.shape}' for each in actual)}, but its metadata say "
            f"{IMAGE} {pixels} and {LOGITS} {classes} for each image. {_EXPECTED}"
        )


def _read_metadata(metadata: Mapping[str, str], origin: str) -> OnnxMetadata:
    if _VERSION_KEY not in metadata:
        raise UserError(
            f"`{origin}` was not written by `export`: its metadata have neither its preprocessing "
            f"nor its classes. {_EXPECTED}"
        )
    if metadata[_VERSION_KEY] != str(FORMAT_VERSION):
        raise UserError(
            f"`{origin}` has format version {metadata[_VERSION_KEY]}; expected {FORMAT_VERSION}. "
            "Export the network again with this version of the project, or read it with that one."
        )
    try:
        content = {
            key: text if key in _TEXTS else json.loads(text)
            for key, text in metadata.items()
            if key in OnnxMetadata.model_fields
        }
        return validate(OnnxMetadata, content, f"{origin}: metadata")
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(f"`{origin}` has damaged metadata. {error} {_EXPECTED}") from None
