"""The key `network` of a teacher or a student."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

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


class NetworkParams(Section):
    """`network: NAME`, or a mapping of the name and more."""

    name: str = Field(min_length=1)
    options: dict[str, Any] = Field(default={})  # passed to the family's `build`
    # pixels; default: the images'
    input_size: int | None = Field(default=None, ge=8, le=LARGEST_INPUT)
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]; default: the dataset's
    std: list[Annotated[float, Field(gt=0)]] | None = None  # per channel; default: the dataset's
    # of images without augmentation: the side to which the shorter one is resized, over that of the
    # middle square that is cut out
    resize_ratio: float | None = Field(default=None, ge=1, le=4)
    interpolation: Interpolation | None = None  # of every resizing for this network


def _from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Network = Annotated[NetworkParams, BeforeValidator(_from_name)]
