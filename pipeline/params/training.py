"""`training`: how students and baselines are trained."""

from pydantic import Field

from pipeline.params.optimisation import OptimisationParams


class TrainingParams(OptimisationParams):
    """Defaults for every student; `students.NAME.training` overrides them key by key."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)  # baselines: students have a teacher
    seed: int = Field(ge=0, lt=2**63)  # of weights and order
