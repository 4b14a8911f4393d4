"""`training`: how students and baselines are trained."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.params.loading import Section


class TrainingParams(Section):
    """Defaults for every student; `students.NAME.training` overrides them key by key."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    optimizer: Literal["sgd", "adamw"]  # sgd: with Nesterov momentum
    learning_rate: float = Field(gt=0)  # the peak of a cosine schedule that ends at 0
    warmup_epochs: int = Field(default=0, ge=0)  # of linear increase, within `epochs`
    momentum: float = Field(default=0.9, ge=0, lt=1)  # sgd only
    weight_decay: float = Field(default=0.0, ge=0)
    seed: int = Field(ge=0, lt=2**63)  # of weights and order

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "TrainingParams":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs}, but training ends after "
                f"{self.epochs} epochs: set fewer"
            )
        return self
