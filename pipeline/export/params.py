"""`export`: which files a network ships as, and what int8 may cost."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pipeline.runtime.params import (
    Section,
    check_student,
    load_section,
    load_with_overrides,
    read_params,
)
from pipeline.runtime.validation import none_or_mapping


class Int8TrainingParams(Section):
    """Quantisation-aware training of a distilled student's weights, before its int8 file."""

    epochs: int = Field(default=2, ge=1)
    # The peak, as a share of the student's own `learning_rate`.
    learning_rate_factor: float = Field(default=0.1, gt=0, le=1)


class ExportParams(Section):
    """Defaults for every student; `students.NAME.export` overrides them key by key."""

    # The first and the last are required: DVC refuses a stage whose parameter is absent.
    precision: Literal["float32", "int8"]  # int8: an int8 file beside the float32 file
    # Points of accuracy on test that an int8 file may lose, by the interval's lower end.
    largest_loss: float = Field(default=0.5, ge=0, le=100)
    licence: str | None = None  # text of the model card
    int8_training: Annotated[Int8TrainingParams | None, BeforeValidator(none_or_mapping)]


def load_export(student: str | None = None) -> ExportParams:
    """Load the section, overridden key by key by a student's values; with None the section alone,
    which holds for the teacher. A key that the student sets to null is removed, so the model's
    default holds.

    Raises:
        UserError: names each bad key by the place where it is written.
    """
    section = load_section(ExportParams, "export")
    if student is None:
        return section
    check_student(student)
    definition = read_params()["students"][student]
    overrides = definition.get("export", {}) if isinstance(definition, Mapping) else {}
    return load_with_overrides(ExportParams, "export", overrides, student)
