"""The training loop of the teacher. It imports nothing of `students/`, so that an edit there never
trains the teacher again."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.compute.device import (
    compile_long_runs,
    depthwise_in_float32,
    to_device,
    training_autocast,
)
from pipeline.compute.distributed import SINGLE_PROCESS, ProcessGroup
from pipeline.data.prepared.dataset import Dataset
from pipeline.models.evaluation import classification_metrics, open_clean_views
from pipeline.models.spec import InputSpec
from pipeline.runtime.derived_random import permutation
from pipeline.runtime.progress import EpochLog
from pipeline.teacher.params import TeacherTraining
from pipeline.training.cuda_graph import capture_long_runs
from pipeline.training.data_parallel import (
    gather_rows,
    local_rows,
    predict_distributed,
    scale_for_ddp,
    seed_rank,
    wrap_ddp,
)
from pipeline.training.divergence import LossMonitor
from pipeline.training.fine_tuning import FineTuning
from pipeline.training.history import write_history
from pipeline.training.optimisation import Optimisation, batches
from pipeline.training.resume import ResumeState
from pipeline.views.loader import open_views
from pipeline.views.policy import ViewPolicy


def fit_teacher(
    network: nn.Module,
    spec: InputSpec,
    dataset: Dataset,
    params: TeacherTraining,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
    *,
    resume: ResumeState | None = None,
    head: Collection[str] = frozenset(),
    history_file: Path | None = None,
) -> list[dict[str, float]]:
    """Train in place on the labels, with a fresh view of every labelled image in every epoch. The
    network ends with the last weights, or with their average if `ema_decay` is set.

    Args:
        resume: keeps the state after each epoch, and continues from it; None keeps nothing.
        head: names of the last layer's parameters, if `params.separates_head`.
        history_file: is written after each epoch, on the main process alone.

    Returns:
        The figures of each epoch, by the columns of `write_history`.

    Raises:
        UserError: the loss is no longer finite.
    """
    split, validation = dataset.splits["train"], dataset.splits["validation"]
    views = open_views(split, ViewPolicy(params.policy), params.seed, device)
    clean_views = open_clean_views(validation, spec, device)  # once: to the device, if they fit
    labels = to_device(split.labels, device)
    labelled = np.flatnonzero(split.labels >= 0)  # only students see the others
    steps = len(batches(labelled, params.batch_size))
    optimisation = Optimisation(network, params, steps, head)
    depthwise_in_float32(network, device)
    fine_tuning = FineTuning(
        network,
        params,
        head,
        lambda it: capture_long_runs(
            wrap_ddp(compile_long_runs(it, device, params.epochs * steps), group),
            *(views, device, params.epochs * steps, group),
        ),
    )
    seed_rank(params.seed, group)
    log = EpochLog(params.epochs)
    history = _resumed(resume, network, optimisation)
    if history:
        if group.is_main:
            log.resume(len(history))
        if history_file is not None:  # DVC has deleted it
            write_history(history_file, history)
    if resume is not None and resume.last_metrics is not None:
        return history
    for epoch in range(len(history) + 1, params.epochs + 1):
        view = epoch - 1  # views are numbered from 0
        forward = fine_tuning.begin_epoch(epoch)
        monitor = LossMonitor(
            "the teacher's training loss",
            epoch,
            optimisation.learning_rate,
            steps=steps,
            device=device,
            is_main=group.is_main,
            state_dir=None if resume is None else resume.folder,
            hint="Set a lower `teacher.training.learning_rate`, more `warmup_epochs`, or "
            "`gradient_clip_norm: 1.0`.",
        )
        order = batches(labelled[permutation(len(labelled), params.seed, view)], params.batch_size)
        targets = labels[to_device(np.concatenate(order), device)].split(list(map(len, order)))
        local_batches = views.batches(view, [local_rows(part, group) for part in order])
        if group.is_main:
            local_batches = log.steps(local_batches, epoch, steps)
        for samples, of_batch, batch in zip(order, targets, local_batches, strict=True):
            inputs = spec.apply(batch.pixels)
            with training_autocast(device):
                local_logits = forward(inputs)
            logits = gather_rows(local_logits.float(), len(samples), group)
            loss = F.cross_entropy(logits, of_batch)
            optimisation.step(scale_for_ddp(loss, group))
            monitor.add(loss.detach(), len(samples))
        figures = {"train_loss": monitor.mean(len(labelled))}
        evaluated = optimisation.evaluated
        predictions = predict_distributed(
            evaluated, spec, validation, device=device, group=group, views=clean_views
        )
        metrics = classification_metrics(
            predictions, torch.from_numpy(validation.labels), "validation"
        )
        figures |= {key: metrics[key] for key in ("validation_accuracy", "validation_nll")}
        monitor.check_validation(figures["validation_nll"])
        history.append(
            {
                "epoch": epoch,
                "view": view,
                "learning_rate": optimisation.learning_rate(epoch * steps - 1),
                **figures,
            }
        )
        _save_epoch(resume, history_file, network, optimisation, history)
        if group.is_main:
            log.line(epoch, **figures)
    if optimisation.evaluated is not network:
        network.load_state_dict(optimisation.evaluated.state_dict())
    return history


def _resumed(
    resume: ResumeState | None, network: nn.Module, optimisation: Optimisation
) -> list[dict[str, float]]:
    """Load the last state, if there is one, and return its history."""
    if resume is None or (state := resume.load()) is None:
        return []
    network.load_state_dict(state["network"])
    if resume.last_metrics is None:  # else it has finished
        optimisation.load_state_dict(state["optimisation"])
    return state["history"]


def _save_epoch(
    resume: ResumeState | None,
    history_file: Path | None,
    network: nn.Module,
    optimisation: Optimisation,
    history: list[dict[str, float]],
) -> None:
    """Keep the state after an epoch, then the history, which a run that resumes writes again."""
    if resume is not None:
        state = {"network": network.state_dict(), "optimisation": optimisation.state_dict()}
        resume.save({**state, "history": history})
    if history_file is not None:
        write_history(history_file, history)
