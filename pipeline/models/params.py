"""A network, as a teacher or a student names it."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.runtime.errors import did_you_mean
from pipeline.runtime.params import Section

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


#: A file in pipeline/networks/: one architecture family each.
Family = Annotated[str, AfterValidator(_existing_family)]


class NetworkParams(Section):
    """`network: NAME`, or a mapping where more than the name is to be said."""

    name: str = Field(min_length=1)
    options: dict[str, Any] = Field(default={})  # given to the family's `build`
    input_size: int | None = Field(
        default=None, ge=8, le=LARGEST_INPUT
    )  # pixels; default: the images'
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]; default: the dataset's
    std: list[Annotated[float, Field(gt=0)]] | None = None  # likewise


def _from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Network = Annotated[NetworkParams, BeforeValidator(_from_name)]
