"""The key `network` of a teacher or a student."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from pipeline.runtime.errors import did_you_mean
from pipeline.runtime.params import Section

Interpolation = Literal["bilinear", "bicubic"]
LARGEST_INPUT = 4096  # pixels
FAMILIES = Path(__file__).parents[1] / "networks"


def _existing_family(family: str) -> str:
    known = sorted(path.stem for path in FAMILIES.glob("*.py") if path.stem != "__init__")
    if family not in known:
        raise ValueError(
            f"there is no `pipeline/networks/{family}.py`{did_you_mean(family, known) or '.'} "
            f"Known: {', '.join(known)}"
        )
    return family


#: The name of a file in pipeline/networks/, which holds one architecture family.
Family = Annotated[str, AfterValidator(_existing_family)]


class WeightsFile(Section):
    """Weights to start a student from."""

    # a checkpoint, or the folder of a network that this pipeline wrote (models/students/NAME)
    path: str = Field(min_length=1)
    # of the file, or of network.json in the folder; with it, DVC sees a change of the weights
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    key: str | None = None  # a checkpoint: the keys, joined by dots, that lead to the weights
    # new: a new last layer, though the file's may be for the same classes
    head: Literal["kept", "new"] = "kept"
    # take the layers whose names and shapes fit; the others are new
    partial: bool = False


def _known_start(value: Any) -> Any:
    if isinstance(value, str) and value not in ("scratch", "pretrained"):
        raise ValueError(
            f"it is {value!r}; expected `scratch`, `pretrained`, or for a file a mapping "
            f"`{{path: {value}, sha256: ...}}`"
        )
    return value


def _kind_of_start(value: Any) -> str:
    return "name" if isinstance(value, str) else "file"


#: What a student's network starts from.
InitialWeights = Annotated[
    Annotated[Literal["scratch", "pretrained"], Tag("name")] | Annotated[WeightsFile, Tag("file")],
    Discriminator(_kind_of_start),
    BeforeValidator(_known_start),
]


def _of_pixels_to_one(values: list[float] | None) -> list[float] | None:
    wrong = [value for value in values or () if not 0 <= value <= 1]
    if wrong:
        raise ValueError(
            f"it has {wrong[0]:g}; expected that of pixels in 0 to 1. If it is of pixels in 0 to "
            "255, divide it by 255"
        )
    return values


class NetworkParams(Section):
    """`network: NAME`, or a mapping of the name and more."""

    name: str = Field(min_length=1)
    weights: InitialWeights = "scratch"  # of students; a teacher has `teacher.weights`
    options: dict[str, Any] = Field(default={})  # passed to the family's `build`
    # pixels; default: the images'
    input_size: int | None = Field(default=None, ge=8, le=LARGEST_INPUT)
    # Both per channel, of pixels in [0, 1]; default: the dataset's.
    mean: Annotated[list[float] | None, AfterValidator(_of_pixels_to_one)] = None
    std: Annotated[
        list[Annotated[float, Field(gt=0)]] | None, AfterValidator(_of_pixels_to_one)
    ] = None
    # of images without augmentation: the side to which the shorter one is resized, over that of the
    # middle square that is cut out
    resize_ratio: float | None = Field(default=None, ge=1, le=4)
    interpolation: Interpolation | None = None  # of every resizing for this network


def _from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Network = Annotated[NetworkParams, BeforeValidator(_from_name)]
