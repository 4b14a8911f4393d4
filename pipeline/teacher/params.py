"""The section `teacher`: the classifier whose knowledge is distilled."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.models.params import Family, Network, NetworkParams
from pipeline.runtime.params import Section
from pipeline.training.params import OptimisationParams, fine_tuning_keys
from pipeline.views.params import Geometry


class TeacherTraining(OptimisationParams):
    """Training on the cross-entropy: for `weights: train`, and for `pretrained` if the pretraining
    lacks some of the classes."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    policy: Geometry  # of the views: a fresh one of every sample in every epoch
    seed: int = Field(ge=0, lt=2**63)  # of weights, views and order


class TeacherParams(Section):
    family: Family
    network: Network
    weights: Literal["train", "checkpoint", "pretrained", "logits"]
    # checkpoint: the file (PyTorch, safetensors, .onnx); logits: the folder of a store
    checkpoint: str = Field(description="Add `checkpoint: models/imported/none` if there is none")
    # checkpoint: the keys, joined by dots, that lead to the weights in the file
    checkpoint_key: str | None = None
    # checkpoint: the output of each class of the dataset, or the name of each output
    checkpoint_classes: list[int | str] | None = Field(default=None, min_length=1)
    minimum_accuracy: float | None = Field(default=None, gt=0, le=1)  # on validation
    # train: required; pretrained: needed if the pretraining lacks some of the classes
    training: TeacherTraining | None = None

    @model_validator(mode="after")
    def _trains_by_parameters(self) -> "TeacherParams":
        if self.weights == "train" and self.training is None:
            raise ValueError(
                "training is missing, but weights is `train`: add it, such as `training: {epochs: "
                "60, batch_size: 64, learning_rate: 0.05, policy: crop_flip, seed: 0}`"
            )
        return self

    @model_validator(mode="after")
    def _freezes_what_is_pretrained(self) -> "TeacherParams":
        keys = fine_tuning_keys(self.training) if self.weights == "train" else []
        if keys:
            verb, them = ("is", "it") if len(keys) == 1 else ("are", "them")
            raise ValueError(
                f"{' and '.join(f'training.{key}' for key in keys)} {verb} for pretrained weights, "
                f"but weights is `train`: remove {them}, or set weights: pretrained"
            )
        return self

    @model_validator(mode="after")
    def _starts_by_its_own_key(self) -> "TeacherParams":
        if self.network.weights != "scratch":
            raise ValueError(
                "network.weights is for students: remove it, and set `teacher.weights`"
            )
        return self

    @model_validator(mode="after")
    def _describes_a_checkpoint(self) -> "TeacherParams":
        for name in ("checkpoint_key", "checkpoint_classes"):
            if getattr(self, name) is not None and self.weights != "checkpoint":
                raise ValueError(
                    f"{name} describes a checkpoint, but weights is `{self.weights}`: remove it, "
                    "or set weights: checkpoint"
                )
        if len({type(value) for value in self.checkpoint_classes or ()}) > 1:
            raise ValueError(
                "checkpoint_classes has numbers and names: give the number of the output of each "
                "class, or the name of each output (in quotes if it is a number)"
            )
        return self

    @model_validator(mode="after")
    def _logits_have_no_network(self) -> "TeacherParams":
        if (self.family == "logits") != (self.weights == "logits"):
            raise ValueError(
                f"family is `{self.family}` and weights is `{self.weights}`, but a teacher that is "
                "a store of logits has `logits` for both: set both, or neither"
            )
        if self.weights == "logits" and self.network != NetworkParams(name=self.network.name):
            raise ValueError(
                "network has more than a name, but weights is `logits`, which runs no network: set "
                "network to a name alone"
            )
        return self
