"""The parameters of optimisation, which `teacher.training` and the students' `training` share."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.runtime.errors import counted
from pipeline.runtime.params import Section

_SGD, _STEP = ("momentum", "nesterov"), ("milestones", "decay_factor")
_FINE_TUNING = ("freeze_epochs", "freeze_batch_norm", "backbone_learning_rate_factor")


class OptimisationParams(Section):
    """Optimizer, learning rate schedule, and options of every step."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2)  # of one step, divided among the processes
    optimizer: Literal["sgd", "adamw"]
    learning_rate: float = Field(gt=0)  # the peak
    schedule: Literal["cosine", "step", "constant"] = "cosine"  # cosine ends at 0
    milestones: list[int] | None = None  # step: epochs, from 1, after which the rate falls
    decay_factor: float = Field(default=0.1, gt=0, lt=1)  # step: the factor of each fall
    warmup_epochs: int = Field(default=0, ge=0)  # of linear increase, within `epochs`
    momentum: float = Field(default=0.9, ge=0, lt=1)  # sgd only
    nesterov: bool = True  # sgd only
    weight_decay: float = Field(default=0.0, ge=0)
    weight_decay_exclusions: Literal["none", "norm_and_bias"] = "none"
    gradient_clip_norm: float | None = Field(default=None, gt=0)  # L2, of all gradients together
    ema_decay: float | None = Field(default=None, gt=0, lt=1)  # per step, of the weights' average
    # Of networks that start from weights:
    freeze_epochs: int = Field(default=0, ge=0)  # the first ones, which train the last layer alone
    freeze_batch_norm: bool = False  # keep its statistics
    # of the learning rate of all parameters but those of the last layer
    backbone_learning_rate_factor: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _check_choices(self) -> "OptimisationParams":
        self._refuse(_SGD, "optimizer", self.optimizer, "sgd")
        self._refuse(_STEP, "schedule", self.schedule, "step")
        if self.momentum == 0 and "nesterov" in self.model_fields_set and self.nesterov:
            raise ValueError(
                "nesterov is true, but momentum is 0: set a momentum, or nesterov: false"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs}, but training ends after "
                f"{counted(self.epochs, 'epoch')}: set fewer"
            )
        if self.freeze_epochs > self.epochs:
            raise ValueError(
                f"freeze_epochs is {self.freeze_epochs}, but training ends after "
                f"{counted(self.epochs, 'epoch')}: set as many at most"
            )
        if self.schedule == "step":
            self._check_milestones()
        return self

    @property
    def separates_head(self) -> bool:
        """Whether the training must know which parameters are those of the last layer."""
        return self.freeze_epochs > 0 or self.backbone_learning_rate_factor < 1

    def _refuse(self, keys: tuple[str, ...], choice: str, chosen: str, owner: str) -> None:
        """Refuse keys that belong to another choice than the chosen one."""
        foreign = [key for key in keys if key in self.model_fields_set] if chosen != owner else []
        if foreign:
            verb, them = ("belongs", "it") if len(foreign) == 1 else ("belong", "them")
            raise ValueError(
                f"{' and '.join(foreign)} {verb} to {choice} `{owner}`, but {choice} is "
                f"`{chosen}`: remove {them} (in a student, "
                f"`{foreign[0]}: null` removes a default)"
            )

    def _check_milestones(self) -> None:
        milestones = self.milestones
        if not milestones:
            raise ValueError(
                "schedule `step` needs `milestones`, the epochs after which the learning rate "
                "falls: set milestones: [150, 180, 210]"
            )
        first, last = max(1, self.warmup_epochs), self.epochs - 1
        if milestones != sorted(set(milestones)) or milestones[0] < first or milestones[-1] > last:
            raise ValueError(
                f"milestones are {milestones}; expected rising epochs from {first} (the end "
                f"of the warm-up, at least 1) to {last} (the last epoch but one)"
            )


def fine_tuning_keys(params: OptimisationParams) -> list[str]:
    """The keys that treat weights from a pretraining with care, of those that are set away from
    their defaults. A network that starts from scratch has no use for them."""
    fields = OptimisationParams.model_fields
    return [key for key in _FINE_TUNING if getattr(params, key) != fields[key].default]
