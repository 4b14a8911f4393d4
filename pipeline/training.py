"""The training loop that students and baselines share, and what a run leaves behind."""

import copy
import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import checkpoint
from pipeline.augment import permutation
from pipeline.checkpoint import WEIGHTS, InputSpec
from pipeline.dataset import AnySplit, Dataset
from pipeline.device import default_device, training_autocast
from pipeline.errors import UserError
from pipeline.evaluation import (
    METRICS,
    PREDICTIONS,
    cost,
    measures,
    predict_all,
    write_predictions,
)
from pipeline.files import atomic_directory, atomic_file, write_json
from pipeline.params.students import StudentParams
from pipeline.params.training import TrainingParams
from pipeline.progress import EpochLog, bar
from pipeline.views import Batch

#: (student_logits [B, C], teacher_logits [B, C], labels [B], kept [B, C] or None, epoch counted
#: from 1) -> mean over B.
DistillationLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]
#: (view, samples [B]) -> (teacher_logits [B, C], kept [B, C] bool or None: every class).
SoftTargets = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class Lesson:
    """What sets a student apart from its baseline."""

    kind: str  # students | baselines: where the outputs go
    view_of_epoch: Callable[[int], int]  # epochs counted from 0
    batches: Callable[[int, Sequence[np.ndarray]], Iterator[Batch]]  # (view, samples of each)
    hard_label_weight: float = 1.0  # of the cross-entropy to the labels
    distillation_loss: DistillationLoss | None = None  # both None without a teacher
    soft_targets: SoftTargets | None = None


@dataclass(frozen=True)
class Trained:
    history: list[dict[str, float]]  # one entry per epoch
    best_epoch: int  # counted from 1, by validation accuracy, then NLL
    best_state: dict[str, Tensor]


def run(
    name: str,
    student: StudentParams,
    params: TrainingParams,
    dataset: Dataset,
    lesson: Lesson,
) -> None:
    """Build a student's network, train it, and write its model, predictions, metrics and history.

    The best epoch is chosen on validation; test is measured once, for the last epoch and for it.

    Raises:
        UserError: the network cannot be built, or its loss is no longer finite.
    """
    device = default_device()
    torch.manual_seed(params.seed)
    description = checkpoint.describe(student.family, student.network, dataset)
    network, spec = checkpoint.build(description).to(device), description.input
    print(f"{lesson.kind[:-1]} {name}: {student.family}, {student.network.name}", flush=True)
    trained = train(network, spec, params, dataset, lesson, device)

    validation, test = dataset.splits["validation"], dataset.splits["test"]
    last = evaluate(network, spec, test, device)[1]
    network.load_state_dict(trained.best_state)
    validation_logits, best_validation = evaluate(network, spec, validation, device)
    test_logits, best = evaluate(network, spec, test, device)

    model = Path("models") / lesson.kind / name
    with atomic_directory(model) as directory:
        checkpoint.save(directory, network, description)
    write_predictions(
        PREDICTIONS / lesson.kind / f"{name}.safetensors",
        validation=validation_logits,
        test=test_logits,
    )
    write_history(METRICS / "history" / lesson.kind / f"{name}.csv", trained.history)
    write_json(
        METRICS / lesson.kind / f"{name}.json",
        {
            **best,
            **{f"last_epoch_{key}": value for key, value in last.items()},
            **best_validation,
            "best_epoch": trained.best_epoch,
            **cost(network, spec),
            "size_bytes": (model / WEIGHTS).stat().st_size,
        },
    )
    print(
        f"  test accuracy {best['test_accuracy']:.4f} (epoch {trained.best_epoch}), "
        f"{last['test_accuracy']:.4f} (last epoch)",
        flush=True,
    )


def train(
    network: nn.Module,
    spec: InputSpec,
    params: TrainingParams,
    dataset: Dataset,
    lesson: Lesson,
    device: torch.device,
) -> Trained:
    """Train in place; the network ends with the last epoch's weights."""
    split = dataset.splits["train"]
    labels = torch.from_numpy(split.labels).to(device)
    steps = len(batches(np.arange(len(split)), params.batch_size))
    optimizer = make_optimizer(network, params)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(
            step, params.epochs * steps, params.warmup_epochs * steps
        ),
    )
    history: list[dict[str, float]] = []
    best_epoch, best_score, best_state = 0, (-math.inf, -math.inf), {}
    log = EpochLog(params.epochs)
    for epoch in range(1, params.epochs + 1):
        view = lesson.view_of_epoch(epoch - 1)
        order = permutation(len(split), params.seed, epoch)
        total_loss = torch.zeros((), device=device)
        network.train()
        parts = batches(order, params.batch_size)
        for batch in bar(lesson.batches(view, parts), f"epoch {epoch}", total=len(parts)):
            inputs = spec.apply(batch.pixels)
            with training_autocast(device):
                logits = network(inputs)
            logits, targets = logits.float(), labels[batch.samples]
            loss = lesson.hard_label_weight * label_loss(logits, targets)
            if lesson.distillation_loss is not None:
                rows, mask = lesson.soft_targets(view, batch.samples)
                teacher_logits = torch.from_numpy(rows).to(device, torch.float32)
                kept = None if mask is None else torch.from_numpy(mask).to(device)
                loss += lesson.distillation_loss(logits, teacher_logits, targets, kept, epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach() * len(batch.samples)
        train_loss = total_loss.item() / len(split)
        if not math.isfinite(train_loss):
            raise UserError(
                f"the training loss is {train_loss} in epoch {epoch}. Set a lower "
                "`learning_rate` for this student, or more `warmup_epochs`."
            )
        measured = evaluate(network, spec, dataset.splits["validation"], device)[1]
        score = (measured["validation_accuracy"], -measured["validation_nll"])
        if score > best_score:
            best_epoch, best_score = epoch, score
            best_state = copy.deepcopy(network.state_dict())
        accuracy, nll = measured["validation_accuracy"], measured["validation_nll"]
        log.line(epoch, train_loss=train_loss, validation_accuracy=accuracy, validation_nll=nll)
        history.append(
            {
                "epoch": epoch,
                "view": view,
                "train_loss": train_loss,
                "validation_accuracy": accuracy,
                "validation_nll": nll,
            }
        )
    return Trained(history, best_epoch, best_state)


def label_loss(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy to the labels in nats: summed over the labelled rows, divided by B, so that a
    row's share does not depend on how many beside it are labelled.

    Args:
        student_logits: [B, C] float32 or wider.
        labels: [B] int64; -1 for a sample without one.
    """
    total = F.cross_entropy(student_logits, labels, ignore_index=-1, reduction="sum")
    return total / len(labels)


def evaluate(
    network: nn.Module, spec: InputSpec, split: AnySplit, device: torch.device
) -> tuple[Tensor, dict[str, float]]:
    """Logits [N, num_classes] and measures of a split, its images without augmentation."""
    logits = predict_all(network, spec, split, device=device)
    return logits, measures(logits, torch.from_numpy(split.labels), split.name)


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    with atomic_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


def make_optimizer(network: nn.Module, params: TrainingParams) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": params.learning_rate, "weight_decay": params.weight_decay}
    if params.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), **common)
    return torch.optim.SGD(
        network.parameters(), momentum=params.momentum, nesterov=params.momentum > 0, **common
    )


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Of the peak: linear up over the warm-up, then a half cosine down to 0 at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def batches(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The order in batches; a last one of a single sample, which batch norm refuses, joins the
    one before it."""
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [np.concatenate(parts[-2:])]
    return parts
