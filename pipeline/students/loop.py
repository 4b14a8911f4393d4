"""The training loop that students and baselines share. It knows nothing of distillation."""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.compute.device import (
    compile_long_runs,
    depthwise_in_float32,
    to_device,
    training_autocast,
)
from pipeline.compute.distributed import SINGLE_PROCESS, ProcessGroup
from pipeline.data.prepared.dataset import AnySplit, Dataset
from pipeline.models.evaluation import classification_metrics, open_clean_views
from pipeline.models.spec import InputSpec
from pipeline.runtime.progress import EpochLog
from pipeline.students.kept_epoch import is_best, is_kept
from pipeline.students.params import TrainingParams
from pipeline.students.passes import draw_batches, epoch_order
from pipeline.training.cuda_graph import capture_long_runs
from pipeline.training.data_parallel import (
    gather_rows,
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
from pipeline.views.loader import AnyViews, Batch, PairedViews


@dataclass(frozen=True)
class TrainingBatch:
    """One batch as the loss sees it: all B samples, of every process."""

    epoch: int  # counted from 1
    view: int | None  # or the pair of views; None: of a baseline's batch that joins two passes
    samples: np.ndarray  # [B] sample numbers
    labels: Tensor  # [B] int64; -1 for an unlabelled sample
    partner_labels: Tensor | None = None  # [B] int64, of the images mixed in
    weights: Tensor | None = None  # [B] float32, the share of the sample itself
    rows: Tensor | None = None  # [B] int64, the sample numbers on the device


#: (logits [B, C] float32, batch) -> mean over B. Of pairs of views, logits [2, B, C]: weak, strong.
Loss = Callable[[Tensor, TrainingBatch], Tensor]


@dataclass(frozen=True)
class TrainingData:
    """The images of a training, how many of them an epoch shows, and in which views."""

    dataset: Dataset  # for the training labels and the validation split
    views: AnyViews  # of the training split; of pairs, a step makes two forward passes
    view_of_pass: Callable[[int], int]  # passes counted from 1
    samples: np.ndarray  # sample numbers of the training split, to train on
    samples_per_epoch: int | None = None  # None: one pass, each sample once

    @property
    def epoch_length(self) -> int:
        """Samples that an epoch shows."""
        return self.samples_per_epoch or len(self.samples)


@dataclass(frozen=True)
class TrainingResult:
    history: list[dict[str, float]]  # of each epoch, by the columns of `write_history`
    kept_epoch: int  # counted from 1, by `training.keep`
    kept_state: dict[str, Tensor]
    best_correct: Tensor  # [N] bool: the validation images that the best epoch classifies correctly
    optimiser_steps: int  # of the whole training


def fit(
    network: nn.Module,
    spec: InputSpec,
    data: TrainingData,
    loss: Loss,
    params: TrainingParams,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
    *,
    resume: ResumeState | None = None,
    head: Collection[str] = frozenset(),
    history_file: Path | None = None,
) -> TrainingResult:
    """Train in place. The network ends with the last epoch's weights, or with their average if
    `ema_decay` is set. `resume` keeps the state after each epoch; a later run continues from it.
    `head`: names of the last layer's parameters, if `params.separates_head`. `history_file` is
    written after each epoch, on the main process alone.

    Raises:
        UserError: the loss is no longer finite.
    """
    labels = to_device(data.dataset.splits["train"].labels, device)
    length = data.epoch_length
    validation = data.dataset.splits["validation"]
    validation_labels = torch.from_numpy(validation.labels)
    clean_views = open_clean_views(validation, spec, device)  # once: to the device, if they fit
    steps = len(batches(np.arange(length), params.batch_size))
    optimisation = Optimisation(network, params, steps, head)
    depthwise_in_float32(network, device)
    fine_tuning = FineTuning(
        network,
        params,
        head,
        lambda it: capture_long_runs(
            wrap_ddp(
                _for_views(data.views, compile_long_runs(it, device, params.epochs * steps)), group
            ),
            *(data.views, device, params.epochs * steps, group),
        ),
    )
    seed_rank(params.seed, group)
    result = TrainingResult(
        [], 0, {}, torch.zeros(len(validation), dtype=torch.bool), params.epochs * steps
    )
    log = EpochLog(params.epochs)
    if resume is not None and (state := resume.load()) is not None:
        result = TrainingResult(**state["trained"])
        if resume.last_metrics is None:  # else it has finished
            network.load_state_dict(state["network"])
            optimisation.load_state_dict(state["optimisation"])
        if group.is_main:
            log.resume(len(result.history))
        _write_history(history_file, result)  # DVC has deleted it
    for epoch in range(len(result.history) + 1, params.epochs + 1):
        order, passes = epoch_order(data.samples, length, params.seed, epoch)
        planned = list(
            zip(*(batches(it, params.batch_size) for it in (order, passes)), strict=True)
        )
        rows = to_device(order, device).split([len(samples) for samples, _ in planned])
        local_batches = draw_batches(data.views, data.view_of_pass, planned, group)
        if group.is_main:
            local_batches = log.steps(local_batches, epoch, steps)
        monitor = LossMonitor(
            "the training loss",
            epoch,
            optimisation.learning_rate,
            steps=steps,
            device=device,
            is_main=group.is_main,
            state_dir=None if resume is None else resume.folder,
            hint="Set a lower `learning_rate` for this student, more `warmup_epochs`, or "
            "`gradient_clip_norm: 1.0`.",
        )
        forward = fine_tuning.begin_epoch(epoch)
        for (samples, numbers), of_batch, local in zip(planned, rows, local_batches, strict=True):
            view = data.view_of_pass(int(numbers[0])) if numbers[0] == numbers[-1] else None
            batch = whole_batch(epoch, view, samples, of_batch, local, labels, group)
            step_loss = train_step(forward, spec, local, batch, loss, optimisation, device, group)
            monitor.add(step_loss, len(samples))
        figures = {"train_loss": monitor.mean(length)}
        evaluated = optimisation.evaluated
        logits, metrics = evaluate(evaluated, spec, validation, device, group, clean_views)
        figures |= {key: metrics[key] for key in ("validation_accuracy", "validation_nll")}
        monitor.check_validation(figures["validation_nll"])
        result.history.append(
            {
                "epoch": epoch,
                "view": data.view_of_pass(int(passes[0])),
                "learning_rate": optimisation.learning_rate(epoch * steps - 1),
                **figures,
            }
        )
        correct = logits.argmax(1) == validation_labels
        if is_best(result.history):
            result = replace(result, best_correct=correct)
        if is_kept(params.keep, result.history, correct, result.best_correct):
            kept_state = copy.deepcopy(evaluated.state_dict())
            result = replace(result, kept_epoch=epoch, kept_state=kept_state)
        save_epoch(resume, history_file, network, optimisation, result)
        if group.is_main:
            log.line(epoch, **figures)
    if optimisation.evaluated is not network:
        network.load_state_dict(optimisation.evaluated.state_dict())
    return result


def save_epoch(
    resume: ResumeState | None,
    history_file: Path | None,
    network: nn.Module,
    optimisation: Optimisation,
    result: TrainingResult,
) -> None:
    """Keep the state after an epoch, then the history, which a run that resumes writes again."""
    if resume is not None:
        state = {"network": network.state_dict(), "optimisation": optimisation.state_dict()}
        resume.save({**state, "trained": vars(result)})
    _write_history(history_file, result)


def _write_history(path: Path | None, result: TrainingResult) -> None:
    if path is not None:
        write_history(path, result.history)


class OneByOne(nn.Module):
    """A network that takes both views of a pair, each in a forward pass of its own: so batch norm
    has statistics of each view, as in two calls, but several processes exchange gradients once."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, weak: Tensor, strong: Tensor) -> tuple[Tensor, Tensor]:
        """[b, C, S, S] float32 each -> logits [b, num_classes] each."""
        return self.network(weak), self.network(strong)


def _for_views(views: AnyViews, network: nn.Module) -> nn.Module:
    return OneByOne(network) if isinstance(views, PairedViews) else network


def train_step(
    forward: nn.Module,
    spec: InputSpec,
    local: Batch,
    batch: TrainingBatch,
    loss: Loss,
    optimisation: Optimisation,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Tensor:
    """Take one optimiser step with `local`, this process's part of the batch; returns the loss of
    the whole batch, detached, on the device. `forward`: of pairs, a `OneByOne`.
    """
    inputs = spec.apply(local.pixels)
    if local.strong_pixels is None:
        with training_autocast(device):
            local_logits = forward(inputs)
        logits = gather_rows(local_logits.float(), len(batch.samples), group)
    else:
        strong_inputs = spec.apply(local.strong_pixels)
        with training_autocast(device):
            both = forward(inputs, strong_inputs)
        logits = torch.stack([gather_rows(it.float(), len(batch.samples), group) for it in both])
    batch_loss = loss(logits, batch)
    optimisation.step(scale_for_ddp(batch_loss, group))
    return batch_loss.detach()


def whole_batch(
    epoch: int,
    view: int | None,
    samples: np.ndarray,
    rows: Tensor,
    local: Batch,
    labels: Tensor,
    group: ProcessGroup = SINGLE_PROCESS,
) -> TrainingBatch:
    """The batch of all processes, `samples` [B], with its labels.

    Args:
        rows: the same sample numbers, on the device.
        local: this process's part of it.
        labels: [N] int64, of the split, on the device.
    """
    if local.partners is None:
        return TrainingBatch(epoch, view, samples, labels[rows], rows=rows)
    partners = gather_rows(local.partners, len(samples), group)
    weights = gather_rows(local.weights, len(samples), group)
    return TrainingBatch(epoch, view, samples, labels[rows], labels[partners], weights, rows)


def evaluate(
    network: nn.Module,
    spec: InputSpec,
    split: AnySplit,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
    views: AnyViews | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Logits [N, num_classes] and metrics of a split's images without augmentation, on every
    rank. `views`: as for `predict_all`."""
    logits = predict_distributed(network, spec, split, device=device, group=group, views=views)
    return logits, classification_metrics(logits, torch.from_numpy(split.labels), split.name)
