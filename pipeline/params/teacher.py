"""`teacher`: the classifier whose knowledge is distilled."""

from typing import Literal

from pydantic import Field

from pipeline.params.loading import Section
from pipeline.params.network import Family, Network
from pipeline.params.optimisation import OptimisationParams


class TeacherTraining(OptimisationParams):
    """`weights: train`: as students are trained, on the cross-entropy."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    # A fresh view of every sample in every epoch.
    policy: Literal["none", "crop", "crop_flip", "random_resized_crop"]
    seed: int = Field(ge=0, lt=2**63)  # of weights, views and order


class TeacherParams(Section):
    family: Family
    network: Network
    weights: Literal["train", "checkpoint"]
    checkpoint: str  # weights: checkpoint: the file (.pt, .pth, .th, .safetensors)
    training: TeacherTraining
