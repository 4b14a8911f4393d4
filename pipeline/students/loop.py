"""The training loop that students and baselines share, and what a run leaves behind."""

import copy
import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.compute.device import (
    compiled,
    default_device,
    depthwise_in_float32,
    to_device,
    training_autocast,
)
from pipeline.compute.distributed import SINGLE_PROCESS, ProcessGroup
from pipeline.data.prepared.dataset import AnySplit, Dataset
from pipeline.models import checkpoint
from pipeline.models.checkpoint import WEIGHTS, InputSpec
from pipeline.models.evaluation import (
    METRICS,
    PREDICTIONS,
    classification_metrics,
    count_parameters_and_macs,
    write_predictions,
)
from pipeline.runtime.derived_random import permutation
from pipeline.runtime.files import atomic_directory, write_bytes, write_json
from pipeline.runtime.locks import exclusive
from pipeline.runtime.progress import EpochLog, bar
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.students.params import StudentParams, TrainingParams
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
from pipeline.views.loader import Batch

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
    label_smoothing: float = 0.0  # of that cross-entropy
    distillation_loss: DistillationLoss | None = None  # both None without a teacher
    soft_targets: SoftTargets | None = None
    # All that the above was made from, as JSON has it: a run of another's is not gone on with.
    inputs: Mapping[str, Any] = field(default_factory=dict)


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
    group: ProcessGroup,
    given: StageInputs,
) -> None:
    """Build a student's network, train it, and write its model, predictions, metrics and history.

    The best epoch is chosen on validation; test is measured once, for the last epoch and for it.
    Every rank of the group calls it; rank 0 writes and prints.

    Args:
        given: as the stage found it: where that has changed, nothing is written.

    Raises:
        UserError: the network cannot be built, its loss is no longer finite, another run trains
            it at this moment, or what it was given has changed.
    """
    device = default_device()
    torch.manual_seed(params.seed)
    with group.main_process_first():
        description = checkpoint.model_spec(student.family, student.network, dataset)
        network, spec = checkpoint.build(description).to(device), description.input
    if group.is_main:
        print(f"{lesson.kind[:-1]} {name}: {student.family}, {student.network.name}", flush=True)
    inputs = {
        "network": asdict(description),
        "training": params.model_dump(),
        "dataset": dataset.fingerprint,
        **lesson.inputs,
    }
    scratch = SCRATCH / lesson.kind / name
    with exclusive(scratch) if group.is_main else nullcontext(), group.report_peer_failure():
        progress = ResumeState(scratch, fingerprint(inputs, device, group), group)
        trained = train(network, spec, params, dataset, lesson, device, group, progress)

        validation, test = dataset.splits["validation"], dataset.splits["test"]
        last = evaluate(network, spec, test, device, group)[1]
        network.load_state_dict(trained.best_state)
        validation_logits, best_validation = evaluate(network, spec, validation, device, group)
        test_logits, best = evaluate(network, spec, test, device, group)
        if not group.is_main:
            return

        given.check()
        model = Path("models") / lesson.kind / name
        with atomic_directory(model) as directory:
            checkpoint.save(directory, network, description)
        write_predictions(
            PREDICTIONS / lesson.kind / f"{name}.safetensors",
            given.params,
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
                **count_parameters_and_macs(network, spec),
                "size_bytes": (model / WEIGHTS).stat().st_size,
            },
        )
        progress.remove()
    print(
        f"  test accuracy {best['test_accuracy']:.4f} (epoch {trained.best_epoch}), "
        f"{last['test_accuracy']:.4f} (last epoch)",
        flush=True,
    )


@dataclass(frozen=True)
class Course:
    """What every step of one training shares."""

    forward: nn.Module  # the network, as every rank calls it
    spec: InputSpec
    optimisation: Optimisation
    lesson: Lesson
    labels: Tensor  # [N] of the split, on the device
    device: torch.device
    group: ProcessGroup = SINGLE_PROCESS

    def step(self, samples: np.ndarray, batch: Batch, view: int, epoch: int) -> Tensor:
        """Learn from one global batch; returns its loss, on the device.

        Args:
            samples: [B], all of the global batch.
            batch: this rank's share of it.
        """
        inputs = self.spec.apply(batch.pixels)
        with training_autocast(self.device):
            own_logits = self.forward(inputs)
        logits = gather_rows(own_logits.float(), len(samples), self.group)
        loss = self.loss(logits, samples, batch, view, epoch)
        self.optimisation.step(scale_for_ddp(loss, self.group))
        return loss.detach()

    def loss(
        self, logits: Tensor, samples: np.ndarray, batch: Batch, view: int, epoch: int
    ) -> Tensor:
        """The loss of a global batch.

        Args:
            logits: [B, C] float32, of all samples.
        """
        lesson, device = self.lesson, self.device
        targets = self.labels[to_device(samples, device)]
        partners = weights = None
        if batch.partners is not None:
            own_partners = to_device(batch.partners, device)
            partners = self.labels[gather_rows(own_partners, len(samples), self.group)]
            weights = gather_rows(batch.weights, len(samples), self.group)
        loss = lesson.hard_label_weight * label_loss(
            logits, targets, partners, weights, label_smoothing=lesson.label_smoothing
        )
        if lesson.distillation_loss is not None:
            rows, mask = lesson.soft_targets(view, samples)
            teacher_logits = to_device(rows, device).float()
            kept = None if mask is None else to_device(mask, device)
            loss += lesson.distillation_loss(logits, teacher_logits, targets, kept, epoch)
        return loss


def train(
    network: nn.Module,
    spec: InputSpec,
    params: TrainingParams,
    dataset: Dataset,
    lesson: Lesson,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
    progress: ResumeState | None = None,
) -> Trained:
    """Train in place; the network ends with the last epoch's weights, or their average where
    `ema_decay` asks for one.

    Args:
        progress: where each epoch's state is kept, and is gone on from; None: nowhere.
    """
    split = dataset.splits["train"]
    labels = torch.from_numpy(split.labels).to(device)
    chosen = np.arange(len(split))
    if lesson.distillation_loss is None:  # only a teacher has an answer without a label
        chosen = np.flatnonzero(split.labels >= 0)
    steps = len(batches(chosen, params.batch_size))
    optimisation = Optimisation(network, params, steps)
    depthwise_in_float32(network, device)
    forward = compiled(wrap_ddp(network, group), device, params.epochs * steps)
    course = Course(forward, spec, optimisation, lesson, labels, device, group)
    seed_rank(params.seed, group)
    trained = Trained([], 0, {})
    if progress is not None and (state := progress.load()) is not None:
        network.load_state_dict(state["network"])
        optimisation.load_state_dict(state["optimisation"])
        trained = Trained(**state["trained"])
        if group.is_main:
            print(f"  resumes after epoch {len(trained.history)} of {params.epochs}", flush=True)
    log = EpochLog(params.epochs)
    for epoch in range(len(trained.history) + 1, params.epochs + 1):
        view = lesson.view_of_epoch(epoch - 1)
        order = chosen[permutation(len(chosen), params.seed, epoch)]
        parts = batches(order, params.batch_size)
        own_batches = lesson.batches(view, [local_rows(samples, group) for samples in parts])
        if group.is_main:
            own_batches = bar(own_batches, f"epoch {epoch}", total=len(parts))
        losses = LossMonitor(
            "the training loss",
            epoch,
            optimisation.learning_rate,
            steps=steps,
            device=device,
            tells=group.is_main,
            kept=None if progress is None else progress.folder,
            advice="Set a lower `learning_rate` for this student, or more `warmup_epochs`.",
        )
        network.train()
        for samples, batch in zip(parts, own_batches, strict=True):
            losses.add(course.step(samples, batch, view, epoch), len(samples))
        train_loss = losses.mean(len(chosen))
        evaluated = optimisation.evaluated
        validation = dataset.splits["validation"]
        measured = evaluate(evaluated, spec, validation, device, group)[1]
        accuracy, nll = measured["validation_accuracy"], measured["validation_nll"]
        losses.check_validation(nll)
        trained.history.append(
            {
                "epoch": epoch,
                "view": view,
                "train_loss": train_loss,
                "validation_accuracy": accuracy,
                "validation_nll": nll,
            }
        )
        if best_epoch(trained.history) == epoch:
            trained = Trained(trained.history, epoch, copy.deepcopy(evaluated.state_dict()))
        if progress is not None:
            progress.save(
                {
                    "network": network.state_dict(),
                    "optimisation": optimisation.state_dict(),
                    "trained": vars(trained),
                }
            )
        if group.is_main:
            log.line(epoch, train_loss=train_loss, validation_accuracy=accuracy, validation_nll=nll)
    if optimisation.evaluated is not network:
        network.load_state_dict(optimisation.evaluated.state_dict())
    return trained


def best_epoch(history: Sequence[Mapping[str, float]]) -> int:
    """The first epoch with the best validation accuracy and, among its equals, NLL."""
    best = max(history, key=lambda entry: (entry["validation_accuracy"], -entry["validation_nll"]))
    return int(best["epoch"])


def label_loss(
    student_logits: Tensor,
    labels: Tensor,
    partners: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy to the labels in nats: summed over the labelled rows, divided by B, so that a
    row's share does not depend on how many beside it are labelled.

    Of mixed images: weight · cross-entropy to the label + (1 - weight) · that to the partner's
    (Zhang et al. 2018, arXiv:1710.09412); of the two, one without a label adds nothing.

    Args:
        student_logits: [B, C] float32 or wider.
        labels: [B] int64; -1 for a sample without one.
        partners: [B] int64, likewise, of the images mixed in.
        weights: [B] float32, of the sample itself.
        label_smoothing: the share of a label's probability that all C classes divide equally
            (Szegedy et al. 2016, arXiv:1512.00567).
    """
    cross_entropy = partial(
        F.cross_entropy, student_logits, ignore_index=-1, label_smoothing=label_smoothing
    )
    if partners is None:
        return cross_entropy(labels, reduction="sum") / len(labels)
    own, others = (cross_entropy(of, reduction="none") for of in (labels, partners))  # [B]
    return (weights * own + (1 - weights) * others).sum() / len(labels)


def evaluate(
    network: nn.Module,
    spec: InputSpec,
    split: AnySplit,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[Tensor, dict[str, float]]:
    """Logits [N, num_classes] and measures of a split, its images without
    augmentation; on every rank."""
    logits = predict_distributed(network, spec, split, device=device, group=group)
    return logits, classification_metrics(logits, torch.from_numpy(split.labels), split.name)


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_bytes(path, text.getvalue().encode())
