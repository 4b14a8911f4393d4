"""`students`: the networks to train, each with and without the teacher."""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError, did_you_mean
from pipeline.params.loading import PARAMS_FILE, Model, Section, read_params, validate
from pipeline.params.network import Family, Network

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class StudentParams(Section):
    """`{}` for `training` and `distillation` means the defaults of the sections so named."""

    family: Family
    network: Network
    training: dict[str, Any]
    distillation: dict[str, Any]


def student_names() -> list[str]:
    """The students' names, in the order of the file.

    Raises:
        UserError: there are none, or a name cannot be one.
    """
    students = read_params().get("students")
    if not isinstance(students, Mapping) or not students:
        raise UserError(
            f"`{PARAMS_FILE}: students` names no student; expected a mapping of at least one "
            "`NAME: {family, network, training: {}, distillation: {}}`."
        )
    problems = [
        f"`{PARAMS_FILE}: students` has the name {name!r}; expected lower-case letters, "
        "digits, `_` and `-`, the first a letter or a digit."
        for name in students
        if not isinstance(name, str) or not _NAME.fullmatch(name)
    ]
    if problems:
        raise UserError("\n".join(problems))
    return list(students)


def load_student(name: str) -> StudentParams:
    """One student.

    Raises:
        UserError: there is no such student (names the nearest), or it is not valid.
    """
    known = student_names()
    if name not in known:
        raise UserError(
            f"`{PARAMS_FILE}: students` has no `{name}`{did_you_mean(name, known) or '.'} "
            f"Known: {', '.join(known)}."
        )
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
