"""The teacher's network with the weights that it has before any training."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.data.prepared.dataset import Dataset
from pipeline.initial_weights import published
from pipeline.models.checkpoint import state_bytes
from pipeline.models.spec import ModelSpec, build, model_spec, native_input
from pipeline.runtime.errors import UserError
from pipeline.teacher import foreign_teacher
from pipeline.teacher.params import TeacherParams


def build_initial_network(params: TeacherParams, dataset: Dataset) -> tuple[nn.Module, ModelSpec]:
    """Build the network on the CPU, with fresh, published or checkpointed weights. Fresh ones are
    drawn from the training's seed.

    Raises:
        UserError: the network cannot be built, or its weights cannot be loaded.
    """
    if params.training is not None:
        torch.manual_seed(params.training.seed)
    pretrained = params.weights == "pretrained"
    native = (
        native_input(params.family, params.network.name, params.network.options)
        if pretrained
        else None
    )
    spec = model_spec(params.family, params.network, dataset, native=native)
    if pretrained:
        network, spec = published.load(spec)
        if spec.pretrained_classes is None and params.training is None:
            raise UserError(
                f"the pretraining of `{spec.network}` lacks some of the dataset's classes, so that "
                "the teacher is fine-tuned, but `params.yaml: teacher.training` is missing. Add "
                "it, such as `training: {epochs: 10, batch_size: 32, learning_rate: 0.01, policy: "
                "random_resized_crop, seed: 0}`."
            )
        return network, spec
    if params.weights == "checkpoint":
        path = Path(params.checkpoint)
        spec = foreign_teacher.input_of_file(spec, params.network, path)
        return foreign_teacher.load_foreign(
            spec, path, params.checkpoint_key, params.checkpoint_classes
        )
    return build(spec), spec


def is_trained(params: TeacherParams, spec: ModelSpec) -> bool:
    """Whether the stage trains the initial network."""
    return params.weights != "checkpoint" and spec.pretrained_classes is None


def training_inputs(
    params: TeacherParams, network: nn.Module, spec: ModelSpec, dataset: Dataset
) -> dict[str, Any]:
    """List all that a training of the initial network depends on, but for code and machine."""
    return {
        "network": asdict(spec),
        "weights": hashlib.sha256(state_bytes(network)).hexdigest(),
        "training": params.training.model_dump(),
        "dataset": dataset.fingerprint,
    }
