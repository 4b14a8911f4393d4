"""The model card of an exported file: a JSON file beside it.

Imports neither torch nor onnxruntime.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from pipeline.export.running.reading import Reading, Side
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.files import read_json, sha256_of_file
from pipeline.runtime.outputs import Precision, Role, Start
from pipeline.runtime.validation import Record, read_model

FORMAT_VERSION = 1


class NoFile(Record):
    """The card of a network that has no file."""

    format_version: Literal[FORMAT_VERSION] = FORMAT_VERSION
    name: str  # of the student; or "teacher"
    role: Role
    precision: Precision
    no_file: str  # the reason, as a sentence
    training: Mapping[str, Any]  # as of a ModelCard
    start: Start | None = None  # as of a ModelCard


class FileFacts(Record):
    name: str
    bytes: PositiveInt
    sha256: str
    opset: int


class NetworkFacts(Record):
    family: str
    name: str
    options: Mapping[str, Any]
    input_size: int  # pixels; the resizing to it is inside the file
    fingerprint: str  # of the trained network, its input and its weights


class Input(Record):
    name: str
    type: str
    channels: Literal[1, 3]  # 3: RGB, 1: greyscale
    image_size: Side


class Output(Record):
    name: str
    type: str


class Accuracy(Record):
    """Shares in [0, 1], with the 95 % interval over the choice of test images."""

    images: PositiveInt
    accuracy: float
    low: float
    high: float


class Int8Facts(Record):
    """What an int8 file lost, in accuracy minus that of the student's float32 file."""

    gain: float
    low: float  # of the 95 % interval
    high: float
    float_operations: Mapping[str, int]  # left in float32: how many of each kind
    trained: bool  # by `int8_training`; else quantised after training alone


class ModelCard(Record):
    """The card of a file that exists."""

    format_version: Literal[FORMAT_VERSION] = FORMAT_VERSION
    task: Literal["image classification"] = "image classification"
    name: str  # of the student; or "teacher"
    role: Role
    precision: Precision
    file: FileFacts
    network: NetworkFacts
    classes: list[str]  # in the order of the logits
    input: Input
    output: Output
    preprocessing: Reading  # from an image file to the input
    description: str  # of input, preprocessing and output, in words
    test: Accuracy
    int8: Int8Facts | None = None
    teacher: Mapping[str, Any] | None = None  # the network behind a distilled student's targets
    training: Mapping[str, Any]  # the parameters of the stage that trained the network
    start: Start | None = None  # of a student or a baseline, before its training
    dataset_fingerprint: str
    licence: str | None = None  # `export.licence` of params.yaml

    def in_words(self) -> str:
        """`resnet8, distilled, int8: accuracy 97.21% (95.26 to 98.89) on 359 test images`"""
        test = self.test
        return (
            f"{self.name}, {self.role}, {self.precision}: accuracy {test.accuracy:.2%} "
            f"({100 * test.low:.2f} to {100 * test.high:.2f}) on "
            f"{counted(test.images, 'test image')}"
        )


def read_card(path: Path, *, produced_by: str) -> ModelCard | NoFile:
    """Read a card. Refuses one that is absent or damaged, and names the command `produced_by`."""
    content = read_json(path, produced_by=produced_by)
    is_empty = isinstance(content, dict) and "no_file" in content
    return read_model(path, NoFile if is_empty else ModelCard, produced_by=produced_by)


def check_card(card: ModelCard | NoFile, file: Path) -> None:
    """Refuse a card that describes another file than `file`, which it is beside."""
    if isinstance(card, NoFile) or card.file.sha256 != sha256_of_file(file):
        raise UserError(
            f"`{file.with_suffix('.json')}` describes another file than `{file}`; expected the "
            "model card that was exported with it. Copy both again, or remove the card: the file "
            "itself holds its classes and its preprocessing."
        )
