"""How an image file becomes the square that an exported file takes."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.data.sources.params import Quality
from pipeline.models.params import Interpolation
from pipeline.runtime.validation import Record

Side = Annotated[int, Field(ge=1, le=4096)]  # pixels


class Reading(Record):
    """How an image file becomes a square, by the keys of `dataset`."""

    storage: Literal["pixels", "encoded"]
    image_size: Side
    quality: Quality | Literal["original"] | None = None  # of `encoded`
    bit_depth: int | None = Field(default=None, ge=8, le=16)  # used of deeper images; None: 16
    #: Of `encoded`: the shorter side is resized to this times the square's side, and the middle
    #: square is cut out.
    resize_ratio: float | None = Field(default=None, ge=1, le=4)
    interpolation: Interpolation | None = None  # of `encoded`, of that resizing

    @model_validator(mode="after")
    def _complete(self) -> Self:
        of_encoded = (self.quality, self.resize_ratio, self.interpolation)
        if self.storage == "encoded" and None in of_encoded:
            raise ValueError("`encoded` needs quality, resize_ratio and interpolation")
        return self
