"""teacher: train the teacher, or take or fine-tune one that is trained, and measure it; or take
the logits of one that is elsewhere.

Reads data/prepared/ and `teacher` of params.yaml; writes models/teacher/, metrics/teacher.json
and predictions/teacher.safetensors. Each epoch's state is kept in .scratch/training/teacher/: a
killed run goes on from it. PROCESSES=N in the environment shares every batch among N processes.
"""

from pipeline.runtime.command import run_command

import argparse
import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.compute import distributed
from pipeline.compute.device import (
    compiled,
    default_device,
    depthwise_in_float32,
    to_device,
    training_autocast,
)
from pipeline.compute.distributed import SINGLE_PROCESS, ProcessGroup
from pipeline.data.prepared.dataset import Dataset, open_dataset, verify_dataset
from pipeline.models import checkpoint
from pipeline.models.checkpoint import WEIGHTS
from pipeline.models.evaluation import (
    METRICS,
    PREDICTIONS,
    classification_metrics,
    count_parameters_and_macs,
    write_predictions,
)
from pipeline.models.spec import (
    InputSpec,
    LogitSource,
    ModelSpec,
    build,
    family_module,
    model_spec,
    native_input,
)
from pipeline.runtime.derived_random import permutation
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import atomic_directory, write_json
from pipeline.runtime.locks import exclusive
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.params import load_section
from pipeline.runtime.progress import EpochLog, bar
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.teacher import accuracy_gate as gate
from pipeline.teacher import auxiliary_heads as auxiliary
from pipeline.teacher import fine_tuning, foreign_checkpoint, pretrained
from pipeline.teacher.params import TeacherParams, TeacherTraining
from pipeline.training.data_parallel import (
    gather_rows,
    local_rows,
    predict_distributed,
    scale_for_ddp,
    seed_rank,
    wrap_ddp,
)
from pipeline.training.divergence import LossMonitor
from pipeline.training.optimisation import Optimisation, batches
from pipeline.training.resume import SCRATCH, ResumeState, fingerprint
from pipeline.views.loader import open_views
from pipeline.views.plan import ViewPolicy

MEASURED = ("validation", "test")
#: What to do about a low accuracy that neither order, normalisation nor size explains.
OTHERWISE = {
    "train": "Train it longer (`teacher.training.epochs`), or at another `learning_rate`.",
    "pretrained": "Look whether the classes that its logits are for are those of the folders, or "
    "train it for longer.",
    "checkpoint": "Look whether `teacher.checkpoint` was trained for these classes and images.",
    "logits": "Look whether its rows stand at the ids of their own images, and are of the same "
    "classes.",
}


def train(
    network: nn.Module,
    spec: InputSpec,
    dataset: Dataset,
    params: TeacherTraining,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
    progress: ResumeState | None = None,
) -> None:
    """Train in place: a fresh view of every labelled sample in every epoch, as the policy has them.
    The network ends with the last weights, or their average where `ema_decay` asks for one.

    Args:
        progress: where each epoch's state is kept, and is gone on from; None: nowhere.

    Raises:
        UserError: the loss is no longer finite.
    """
    split, validation = dataset.splits["train"], dataset.splits["validation"]
    views = open_views(split, ViewPolicy(params.policy), params.seed, device)
    labels = torch.from_numpy(split.labels).to(device)
    validation_labels = torch.from_numpy(validation.labels)
    labelled = np.flatnonzero(split.labels >= 0)  # the others are for students alone
    steps_per_epoch = len(batches(labelled, params.batch_size))
    optimisation = Optimisation(network, params, steps_per_epoch)
    depthwise_in_float32(network, device)
    forward = compiled(wrap_ddp(network, group), device, params.epochs * steps_per_epoch)
    seed_rank(params.seed, group)
    finished = 0
    if progress is not None and (state := progress.load()) is not None:
        network.load_state_dict(state["network"])
        optimisation.load_state_dict(state["optimisation"])
        finished = state["epochs"]
        if group.is_main:
            print(f"  resumes after epoch {finished} of {params.epochs}", flush=True)
    log = EpochLog(params.epochs)
    for epoch in range(finished, params.epochs):
        network.train()
        fine_tuning.begin_epoch(network, params, epoch)
        losses = LossMonitor(
            "the teacher's training loss",
            epoch + 1,
            optimisation.learning_rate,
            steps=steps_per_epoch,
            device=device,
            is_main=group.is_main,
            state_dir=None if progress is None else progress.folder,
            hint="Set a lower `teacher.training.learning_rate`, or more `warmup_epochs`.",
        )
        order = labelled[permutation(len(labelled), params.seed, epoch)]
        parts = batches(order, params.batch_size)
        own_batches = views.batches(epoch, [local_rows(samples, group) for samples in parts])
        if group.is_main:
            own_batches = bar(own_batches, f"epoch {epoch + 1}", total=len(parts))
        for samples, batch in zip(parts, own_batches, strict=True):
            inputs = spec.apply(batch.pixels)
            with training_autocast(device):
                own_logits = forward(inputs)
            logits = gather_rows(own_logits.float(), len(samples), group)
            targets = labels[to_device(samples, device)]
            loss = F.cross_entropy(logits, targets)
            loss = loss + auxiliary.loss(
                network, targets, partial(gather_rows, count=len(samples), group=group)
            )
            optimisation.step(scale_for_ddp(loss, group))
            losses.add(loss.detach(), len(samples))
        train_loss = losses.mean(len(labelled))
        evaluated = optimisation.evaluated
        logits = predict_distributed(evaluated, spec, validation, device=device, group=group)
        measured = classification_metrics(logits, validation_labels, "validation")
        losses.check_validation(measured["validation_nll"])
        if progress is not None:
            progress.save(
                {
                    "network": network.state_dict(),
                    "optimisation": optimisation.state_dict(),
                    "epochs": epoch + 1,
                }
            )
        if group.is_main:
            log.line(
                epoch + 1,
                train_loss=train_loss,
                validation_accuracy=measured["validation_accuracy"],
            )
    if optimisation.evaluated is not network:
        network.load_state_dict(optimisation.evaluated.state_dict())


def initial_network(params: TeacherParams, dataset: Dataset) -> tuple[nn.Module, ModelSpec]:
    """The network with the weights that there are before any training, on the CPU."""
    description = model_spec(
        params.family, params.network, dataset, pretrained=params.weights == "pretrained"
    )
    if params.weights == "pretrained":
        network, description = pretrained.load(description)
        if description.pretrained_classes is None:
            fine_tuning.mark_last_layer(network, pretrained.last_layer(description))
        return network, description
    if params.weights == "checkpoint":
        return foreign_checkpoint.load_foreign(description, Path(params.checkpoint)), description
    return build(description), description


def take_logits(params: TeacherParams, dataset: Dataset, inputs: StageInputs) -> None:
    """A teacher that is a table or a store of logits: nothing is run."""
    source = family_module(params.family).open_source(Path(params.checkpoint), dataset)
    print(f"teacher: {params.network.name}, the logits of {source.path}", flush=True)
    for line in source.told:
        print(f"  {line}", flush=True)
    logits = {
        name: torch.from_numpy(source.rows(name, 0, np.arange(len(dataset.splits[name]))))
        for name in MEASURED
    }
    gate.check(
        None,
        None,
        dataset,
        logits["validation"],
        minimum_accuracy=params.minimum_accuracy,
        native=None,
        otherwise=OTHERWISE[params.weights],
        device=torch.device("cpu"),
    )
    described = LogitSource(
        params.family, params.network.name, dataset.class_names, params.checkpoint, source.sha256
    )
    inputs.check()
    with atomic_directory(TEACHER.model) as directory:
        checkpoint.save_source(directory, described)
    write_outcome(dataset, inputs, logits, {})


def write_outcome(
    dataset: Dataset,
    inputs: StageInputs,
    logits: Mapping[str, torch.Tensor],
    costs: Mapping[str, int],
) -> None:
    """The teacher's answers and measures. Args: logits: of MEASURED, [N, C] float32."""
    metrics: dict[str, float] = {}
    for name in MEASURED:
        metrics |= classification_metrics(
            logits[name], torch.from_numpy(dataset.splits[name].labels), name
        )
    write_predictions(PREDICTIONS / "teacher.safetensors", inputs.params, **logits)
    write_json(METRICS / "teacher.json", {**metrics, **costs})
    print(f"  test accuracy {metrics['test_accuracy']:.4f}")


def name_of_progress(
    network: nn.Module,
    description: ModelSpec,
    params: TeacherTraining,
    dataset: Dataset,
    device: torch.device,
    group: ProcessGroup,
) -> str:
    """Of all that the training's bytes depend on, the weights that it begins with, too."""
    first = hashlib.sha256()
    for value in network.state_dict().values():
        first.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    inputs = {
        "network": asdict(description),
        "weights": first.hexdigest(),
        "training": params.model_dump(),
        "dataset": dataset.fingerprint,
    }
    return fingerprint(inputs, device, group)


def make_teacher(group: ProcessGroup) -> None:
    device = default_device()
    with group.main_process_first():
        inputs = StageInputs("teacher")
        params = load_section(TeacherParams, "teacher")
        dataset = open_dataset()
        if group.is_main:  # once is enough
            verify_dataset()
        if params.weights == "logits":
            if group.is_main:
                take_logits(params, dataset, inputs)
            return
        if params.training.freeze_epochs and group.size > 1:
            raise UserError(
                "`teacher.training.freeze_epochs` trains parts of the network in turns, which "
                f"{group.size} processes cannot do; expected one. Unset PROCESSES, or set "
                "freeze_epochs: 0."
            )
        torch.manual_seed(params.training.seed)
        network, description = initial_network(params, dataset)
        spec = description.input
        if dataset.encoded:  # decoded at the size that the network takes
            dataset = dataset.resized(spec.size)
        network.to(device)
    learns = params.weights != "checkpoint" and description.pretrained_classes is None
    if group.is_main:
        print(
            f"teacher: {params.family}, {params.network.name}, weights: {params.weights}",
            flush=True,
        )
        if params.weights == "pretrained":
            print(
                "  its classes are not all among the pretraining's: its last layer is new"
                if learns
                else "  its classes are all among the pretraining's: it is taken as it is",
                flush=True,
            )
    progress = None
    if learns:
        name = name_of_progress(network, description, params.training, dataset, device, group)
        progress = ResumeState(SCRATCH / "teacher", name, group)
        with group.report_peer_failure(), auxiliary.heads(network, description):
            train(network, spec, dataset, params.training, device, group, progress)

    logits = {
        name: predict_distributed(network, spec, dataset.splits[name], device=device, group=group)
        for name in MEASURED
    }
    if not group.is_main:
        return
    if not all(torch.isfinite(values).all() for values in logits.values()):
        raise UserError(
            f"the teacher `{params.network.name}` answers with numbers that are not finite. Look "
            "at its weights (`teacher.checkpoint`) and its `mean` and `std`."
        )
    gate.check(
        network,
        spec,
        dataset,
        logits["validation"],
        minimum_accuracy=params.minimum_accuracy,
        native=native_input(params.family, params.network.name),
        otherwise=OTHERWISE[params.weights],
        device=device,
    )
    inputs.check()
    with atomic_directory(TEACHER.model) as directory:
        checkpoint.save(directory, network, description)
    size_bytes = (TEACHER.model / WEIGHTS).stat().st_size
    write_outcome(
        dataset,
        inputs,
        logits,
        {**count_parameters_and_macs(network, spec), "size_bytes": size_bytes},
    )
    if progress is not None:  # kept until now: what the gate refused need not be trained again
        progress.remove()


def main() -> None:
    argparse.ArgumentParser("python -m pipeline.stages.teacher", description=__doc__).parse_args()
    if distributed.launch("pipeline.stages.teacher"):
        return
    with (
        distributed.process_group() as group,
        exclusive(SCRATCH / "teacher") if group.is_main else nullcontext(),
    ):
        make_teacher(group)


if __name__ == "__main__":
    run_command(main)
