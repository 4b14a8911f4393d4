"""What the stage `teacher` writes, and a teacher of imported logits, for which nothing is run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.prepared.dataset import Dataset
from pipeline.models import checkpoint
from pipeline.models.checkpoint import WEIGHTS, LogitSource
from pipeline.models.evaluation import (
    check_imported,
    classification_metrics,
    count_parameters_and_macs,
    write_predictions,
)
from pipeline.models.raw_logits import advice_for_network, check_raw
from pipeline.models.spec import ModelSpec, family_module
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import atomic_directory, write_json
from pipeline.runtime.outputs import TEACHER, NetworkCosts
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.teacher import accuracy_gate
from pipeline.teacher.params import TeacherParams
from pipeline.training.history import write_history

EVALUATED = ("validation", "test")
#: Warn if accuracy is above chance by more than so many times what the softmax's confidence is.
_AS_SURE = 10


def write_teacher(
    model: tuple[nn.Module, ModelSpec] | LogitSource,
    logits: Mapping[str, Tensor],
    dataset: Dataset,
    params: TeacherParams,
    inputs: StageInputs,
    history: Sequence[Mapping[str, float]] = (),
) -> None:
    """Write the weights, the network's description, predictions, metrics and history of a good
    teacher.

    Args:
        logits: [N, C] float32, of each split in EVALUATED.
        history: the figures of each epoch; empty for a teacher that was not trained.

    Raises:
        UserError: a logit is not finite, the numbers are no raw logits, the teacher fails the
            accuracy gate, or an input of the stage changed while it ran: nothing is written.
    """
    if not all(torch.isfinite(values).all() for values in logits.values()):
        raise UserError(
            f"the logits of the teacher `{params.network.name}` are not finite. Check its weights "
            "(`teacher.checkpoint`) and its `mean` and `std`."
        )
    check_raw(
        torch.cat(list(logits.values())).numpy(),
        f"`{TEACHER.model}` is unchanged: the teacher `{params.network.name}` returns",
        advice_for_network(params.family, params.network.name),
    )
    accuracy_gate.check(dataset, logits["validation"], params)
    warn_if_nearly_uniform(logits["validation"], dataset.splits["validation"].labels)
    inputs.check()
    metrics: dict[str, float] = {}
    costs: dict[str, int] = {}
    with atomic_directory(TEACHER.model) as directory:
        if isinstance(model, LogitSource):
            checkpoint.save_source(directory, model)
        else:
            network, spec = model
            checkpoint.save(directory, network, spec)
            size_bytes = (directory / WEIGHTS).stat().st_size
            counts = count_parameters_and_macs(network, spec.input)
            costs = NetworkCosts(**counts, size_bytes=size_bytes).model_dump()
    for name in EVALUATED:
        labels = torch.from_numpy(dataset.splits[name].labels)
        metrics |= classification_metrics(logits[name], labels, name)
    write_predictions(TEACHER.predictions, inputs.params, **logits)
    write_history(TEACHER.history, history, kept_epoch=len(history))
    write_json(TEACHER.metrics, metrics | costs)
    print(f"  test accuracy {metrics['test_accuracy']:.4f}")


def warn_if_nearly_uniform(logits: Tensor, labels: np.ndarray) -> None:
    """Print a warning if the softmax is far less sure than right: of cosines, which CLIP multiplies
    by about 100, or outputs of a tanh. Such soft labels say little.

    Args:
        logits: [N, num_classes].
        labels: [N].
    """
    chance = 1 / logits.shape[1]
    confidence = float(logits.softmax(1).amax(1).mean())
    accuracy = float((logits.argmax(1).numpy() == labels).mean())
    if accuracy - chance > _AS_SURE * (confidence - chance):
        print(
            f"  warning: the teacher is right on {accuracy:.2%} of the validation images, but the "
            f"largest probability of its softmax is {confidence:.2%} on average; expected nearly "
            "as much. If its numbers are cosines, or between -1 and 1, multiply them by the scale "
            "that it was trained with (`logit_scale` of CLIP, about 100)"
        )


def import_logits(params: TeacherParams, dataset: Dataset, inputs: StageInputs) -> None:
    """Write a teacher that is a store of logits from elsewhere.

    Raises:
        UserError: the logits cannot be read, or as `write_teacher`.
    """
    source = family_module(params.family).open_source(Path(params.checkpoint), dataset)
    print(f"teacher: {params.network.name}, the logits of {source.path}", flush=True)
    for name, logits in source.held_out.items():
        check_imported(
            logits,
            dataset.class_names,
            str(source.path),
            lambda row, s=name: f"sample {row} of {s}",
        )
    description = LogitSource(
        family=params.family,
        network=params.network.name,
        class_names=dataset.class_names,
        path=params.checkpoint,
        contents_sha256=source.contents_sha256,
    )
    held_out = {name: torch.from_numpy(source.held_out[name]) for name in EVALUATED}
    write_teacher(description, held_out, dataset, params, inputs)
