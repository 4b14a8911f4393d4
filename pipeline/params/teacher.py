"""`teacher`: the classifier whose knowledge is distilled."""

from typing import Literal

from pydantic import Field

from pipeline.params.loading import Section
from pipeline.params.network import Family, Network


class TeacherTraining(Section):
    """`weights: train`: SGD with Nesterov momentum 0.9 on a cosine schedule, cross-entropy."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    learning_rate: float = Field(gt=0)  # the peak
    warmup_epochs: int = Field(default=0, ge=0)  # of linear increase, within `epochs`
    weight_decay: float = Field(default=0.0, ge=0)
    policy: Literal["none", "crop", "crop_flip"]  # a fresh view of every sample in every epoch
    seed: int = Field(ge=0, lt=2**63)  # of weights, views and order


class TeacherParams(Section):
    family: Family
    network: Network
    weights: Literal["train", "checkpoint"]
    checkpoint: str  # weights: checkpoint: the file (.pt, .pth, .th, .safetensors)
    minimum_accuracy: float | None = Field(default=None, gt=0, le=1)  # on validation, to go on
    training: TeacherTraining
