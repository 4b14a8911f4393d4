"""What the stage `teacher` writes, and a teacher of imported logits, for which nothing is run."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from pipeline.data.prepared.dataset import Dataset
from pipeline.models import checkpoint
from pipeline.models.checkpoint import WEIGHTS
from pipeline.models.evaluation import (
    check_imported,
    classification_metrics,
    count_parameters_and_macs,
    write_predictions,
)
from pipeline.models.spec import LogitSource, ModelSpec, family_module
from pipeline.runtime.files import atomic_directory, write_json
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.teacher import accuracy_gate
from pipeline.teacher.params import TeacherParams

EVALUATED = ("validation", "test")
#: What to do about a low accuracy that nothing else explains.
FALLBACK_HINTS = {
    "train": "Train it longer (`teacher.training.epochs`), or with another `learning_rate`.",
    "pretrained": "Check that its logits are for the classes of the folders, or train it longer.",
    "checkpoint": "Check that `teacher.checkpoint` was trained for these classes and images.",
    "logits": "Check that each row has the id of its own image, and that the classes are the same.",
}


def write_network(
    network: nn.Module,
    spec: ModelSpec,
    dataset: Dataset,
    logits: Mapping[str, torch.Tensor],
    inputs: StageInputs,
) -> None:
    """Write the weights, the network's description, predictions and metrics.

    Args:
        logits: [N, C] float32, of each split in EVALUATED.

    Raises:
        UserError: an input of the stage changed while it ran: nothing is written.
    """
    inputs.check()
    with atomic_directory(TEACHER.model) as directory:
        checkpoint.save(directory, network, spec)
    costs = count_parameters_and_macs(network, spec.input)
    size_bytes = (TEACHER.model / WEIGHTS).stat().st_size
    _write_measurements(dataset, inputs, logits, {**costs, "size_bytes": size_bytes})


def import_logits(params: TeacherParams, dataset: Dataset, inputs: StageInputs) -> None:
    """Write a teacher that is a store of logits from elsewhere.

    Raises:
        UserError: the logits cannot be read, or fail the accuracy gate.
    """
    family = family_module(params.family)
    source = family.open_source(Path(params.checkpoint), dataset)
    print(f"teacher: {params.network.name}, the logits of {source.path}", flush=True)
    for name, logits in source.held_out.items():
        check_imported(
            logits,
            dataset.class_names,
            str(source.path),
            lambda row, s=name: f"sample {row} of {s}",
        )
    logits = {name: torch.from_numpy(source.held_out[name]) for name in EVALUATED}
    accuracy_gate.check(
        dataset,
        logits["validation"],
        minimum_accuracy=params.minimum_accuracy,
        fallback_hint=FALLBACK_HINTS["logits"],
        imported=True,
    )
    description = LogitSource(
        params.family,
        params.network.name,
        dataset.class_names,
        params.checkpoint,
        source.contents_sha256,
    )
    inputs.check()
    with atomic_directory(TEACHER.model) as directory:
        checkpoint.save_source(directory, description)
    _write_measurements(dataset, inputs, logits, {})


def _write_measurements(
    dataset: Dataset,
    inputs: StageInputs,
    logits: Mapping[str, torch.Tensor],
    costs: Mapping[str, int],
) -> None:
    metrics: dict[str, float] = {}
    for name in EVALUATED:
        labels = torch.from_numpy(dataset.splits[name].labels)
        metrics |= classification_metrics(logits[name], labels, name)
    write_predictions(TEACHER.predictions, inputs.params, **logits)
    write_json(TEACHER.metrics, {**metrics, **costs})
    print(f"  test accuracy {metrics['test_accuracy']:.4f}")
