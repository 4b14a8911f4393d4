"""The teacher's network with the weights that it has before any training."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from pipeline.data.prepared.dataset import Dataset
from pipeline.models.spec import ModelSpec, build, model_spec
from pipeline.teacher import fine_tuning, foreign_checkpoint, pretrained
from pipeline.teacher.params import TeacherParams


def build_initial_network(params: TeacherParams, dataset: Dataset) -> tuple[nn.Module, ModelSpec]:
    """Build the network on the CPU, with fresh, published or checkpointed weights.

    Raises:
        UserError: the network cannot be built, or its weights cannot be loaded.
    """
    spec = model_spec(
        params.family, params.network, dataset, pretrained=params.weights == "pretrained"
    )
    if params.weights == "pretrained":
        network, spec = pretrained.load(spec)
        if spec.pretrained_classes is None:
            fine_tuning.mark_last_layer(network, pretrained.last_layer(spec))
        return network, spec
    if params.weights == "checkpoint":
        return foreign_checkpoint.load_foreign(spec, Path(params.checkpoint)), spec
    return build(spec), spec


def sha256_of_weights(network: nn.Module) -> str:
    """SHA-256 of the state dict's bytes."""
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
