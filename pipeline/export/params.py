"""`export`: the precisions in which students are exported, and what an int8 file may lose."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pipeline.runtime.outputs import Precision
from pipeline.runtime.params import Section
from pipeline.students.params import load_student, load_with_overrides


class Int8TrainingParams(Section):
    """Quantisation-aware training of a student, from its trained weights."""

    epochs: int = Field(default=2, ge=1)
    # The peak, as a share of the student's own peak learning rate.
    learning_rate_share: float = Field(default=0.1, gt=0, le=1)


def _none_or_mapping(value: Any) -> Any:
    if value == "none":
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"it is {value!r}; expected `none`, or a mapping of its parameters")
    return value


class ExportParams(Section):
    """Defaults for every student; `students.NAME.export` overrides them key by key."""

    precision: Precision  # int8: the float32 file, and an int8 file beside it
    largest_loss: float = Field(ge=0, le=100)  # points of accuracy that an int8 file may lose
    int8_training: Annotated[Int8TrainingParams | None, BeforeValidator(_none_or_mapping)]
    licence: str | None  # of the files, for their model cards


def load_export(name: str) -> ExportParams:
    """Load the export parameters of one student."""
    return load_with_overrides(ExportParams, "export", load_student(name).export, name)
