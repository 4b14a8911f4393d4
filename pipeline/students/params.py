"""`students` and `training`: the networks to train, and how to train them and their baselines."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pipeline.models.params import Family, Network
from pipeline.runtime.errors import UserError
from pipeline.runtime.params import (
    PARAMS_FILE,
    Section,
    check_student,
    load_with_overrides,
    read_params,
)
from pipeline.runtime.validation import validate
from pipeline.training.params import OptimisationParams, fine_tuning_keys


class _Training(OptimisationParams):
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)  # of baselines alone
    # The epoch whose weights are kept, by accuracy on validation; latest_not_worse: the latest that
    # is not significantly worse than the best. A teacher keeps its last.
    keep: Literal["latest_not_worse", "best", "last"] = "latest_not_worse"


Seed = Annotated[int, Field(ge=0, lt=2**63)]


class TrainingParams(_Training):
    """One training of a student or a baseline."""

    seed: Seed  # of weights and order


class TrainingSection(_Training):
    """Defaults for every student; `students.NAME.training` overrides them key by key."""

    seeds: list[Seed] = Field(description="Add `seeds: 0`, or a list for a training of each")

    @field_validator("seeds", mode="before")
    @classmethod
    def _of_one_number(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, value: list[int]) -> list[int]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"it is {value}; expected a number, or a list of different numbers")
        return value

    @property
    def trainings(self) -> list[TrainingParams]:
        """One training for each seed."""
        shared = self.model_dump(exclude={"seeds"}, exclude_unset=True)
        return [TrainingParams(**shared, seed=seed) for seed in self.seeds]


class StudentParams(Section):
    """One student. `training: {}` and `distillation: {}` mean the defaults, the sections of these
    names; `export`, which no training reads, may be left out."""

    family: Family
    network: Network
    # DVC reads these two keys for stages of their own, and has no defaults.
    training: dict[str, Any] = Field(description="Add `training: {}`, which means the defaults")
    distillation: dict[str, Any] = Field(
        description="Add `distillation: {}`, which means the defaults"
    )
    export: dict[str, Any] = {}  # noqa: RUF012  (pydantic copies it)


def load_student(name: str) -> StudentParams:
    """Load one student; UserError if there is none of this name, or it is not valid."""
    check_student(name)
    section = read_params()["students"][name]
    return validate(StudentParams, section, f"{PARAMS_FILE}: students.{name}")


def load_training(name: str, student: StudentParams) -> TrainingSection:
    """Load how a student and its baseline are trained; UserError if it is not valid."""
    params = load_with_overrides(TrainingSection, "training", student.training, name)
    keys = fine_tuning_keys(params)
    if keys and student.network.weights == "scratch":
        verb, them = ("treats", "it") if len(keys) == 1 else ("treat", "them")
        raise UserError(
            f"`{PARAMS_FILE}: students.{name}`: {' and '.join(keys)} of its training {verb} the "
            "weights that a network starts from with care, but it starts from scratch: set "
            f"`network.weights`, or remove {them} (`training: {{{keys[0]}: null}}` removes a "
            "default)."
        )
    return params
