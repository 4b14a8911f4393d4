"""`training`: how students and baselines are trained."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from pipeline.models.params import Family, Network
from pipeline.runtime.errors import UserError
from pipeline.runtime.params import (
    PARAMS_FILE,
    Model,
    Section,
    check_student,
    read_params,
    validate,
)
from pipeline.training.params import OptimisationParams


class TrainingParams(OptimisationParams):
    """Defaults for every student; `students.NAME.training` overrides them key by key."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)  # baselines: students have a teacher
    seed: int = Field(ge=0, lt=2**63)  # of weights and order


class StudentParams(Section):
    """`{}` for `training` and `distillation` means the defaults of the sections so named."""

    family: Family
    network: Network
    training: dict[str, Any]
    distillation: dict[str, Any]


def load_student(name: str) -> StudentParams:
    """One student.

    Raises:
        UserError: there is no such student (names the nearest), or it is not valid.
    """
    check_student(name)
    return validate(
        StudentParams, read_params()["students"][name], f"{PARAMS_FILE}: students.{name}"
    )


def load_with_overrides(
    model: type[Model],
    section: str,
    overrides: dict[str, Any],
    student: str,
    *,
    inherit: bool = True,
) -> Model:
    """A section's defaults, overridden key by key with those of a student; a key that the student
    sets to null is taken away, so that the model's own default holds.

    Args:
        inherit: False leaves the section's values out.

    Raises:
        UserError: names each bad key where it stands.
    """
    defaults = read_params().get(section)
    if not isinstance(defaults, Mapping):
        raise UserError(f"`{PARAMS_FILE}: {section}` is missing; expected a section of that name.")
    merged = {**(defaults if inherit else {}), **overrides}
    origin = f"{PARAMS_FILE}: students.{student}.{section}"
    return validate(
        model,
        {k: v for k, v in merged.items() if v is not None or k not in overrides},
        f"{PARAMS_FILE}: {section}",
        origins=dict.fromkeys(overrides, origin),
    )
