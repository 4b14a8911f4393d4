"""Quantisation-aware training of a distilled student on the cached soft targets, without the
teacher: some epochs more of the student's own training, with the network as its int8 file computes.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.compute.device import default_device
from pipeline.compute.distributed import SINGLE_PROCESS
from pipeline.data.prepared.dataset import open_dataset, verify_dataset
from pipeline.distillation.objective import loss_over_epochs, seen_views
from pipeline.distillation.params import load_distillation
from pipeline.export.params import Int8TrainingParams
from pipeline.int8_training.fake_quantisation import FakeQuantized, float_state
from pipeline.models import checkpoint
from pipeline.runtime.files import atomic_directory
from pipeline.runtime.outputs import TEACHER, ModelOutputs
from pipeline.runtime.params import load_section
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.store.reading.store import open_store, view_of_epoch
from pipeline.students.loop import Loss, TrainingBatch, TrainingData, TrainingResult, fit
from pipeline.students.params import (
    TrainingParams,
    TrainingSection,
    load_student,
    load_training,
)
from pipeline.students.training_run import write_network
from pipeline.training.resume import ResumeState, fingerprint
from pipeline.views.loader import open_views
from pipeline.views.params import ViewsParams


def train_for_int8(name: str, params: Int8TrainingParams, inputs: StageInputs) -> None:
    """Train, and write the weights in float32, in the network as the student's stage wrote it.

    The state is kept after each epoch, and a run with equal inputs resumes from it. One process
    trains, whatever PROCESSES says.

    Raises:
        UserError: the network has no layer to round at, the loss is no longer finite, or an input
            of the stage changed while it ran.
    """
    outputs = ModelOutputs("distilled", name)
    student = load_student(name)
    produced_by = f"dvc repro {outputs.stage}"
    own = own_training(load_training(name, student), outputs.model, produced_by)
    distillation = load_distillation(student.distillation, name)
    views = load_section(ViewsParams, "views")
    dataset = open_dataset().resized(views.image_size)
    verify_dataset()
    teacher = checkpoint.fingerprint(TEACHER.model, produced_by="dvc repro teacher")
    store = open_store(dataset, views, teacher)
    store.verify(dataset)
    network, spec = checkpoint.load(outputs.model, produced_by=produced_by)
    training, device = continued(own, params), default_device()
    torch.manual_seed(training.seed)  # of dropout
    rounding = FakeQuantized(copy.deepcopy(network).to(device), spec.network)
    split = dataset.splits["train"]
    opened = open_views(split, views.view_policy, views.seed, device)
    seen = seen_views(distillation, opened)
    data = TrainingData(
        dataset,
        seen,
        lambda number: view_of_epoch(own.epochs + number, views.views_or_pairs, own.seed),
        np.arange(len(split)),
    )
    fields: Mapping[str, Any] = {
        "student": checkpoint.fingerprint(outputs.model, produced_by=produced_by),
        "training": training.model_dump(),
        "epochs_before": own.epochs,
        "dataset": dataset.fingerprint,
        "views": views.model_dump(),
        "distillation": distillation.model_dump(),
        "store": store.index.content(),
        "rows": store.rows_sha256,
    }
    print(f"int8_training {name}: {student.family}, {student.network.name}", flush=True)
    of_training = fingerprint(fields, device, SINGLE_PROCESS)
    resume = ResumeState(outputs.int8_scratch, of_training, SINGLE_PROCESS)
    loss = loss_over_epochs(
        distillation,
        lambda temperature: store.decoded_at(temperature).gather,
        device,
        own.epochs,
        stored=(store.num_views, len(split)),
        paired=views.paired,
    )
    loss = continued_loss(loss, own.epochs)
    result = fit(rounding, spec.input, data, loss, training, device, resume=resume)
    inputs.check()
    if resume.last_metrics is None:
        resume.finish({"trained": vars(result)}, result.history[-1])
    network.load_state_dict(float_state(result.kept_state))
    with atomic_directory(outputs.int8_model) as directory:
        write_network(directory, network, spec)
    print(_summary(result), flush=True)


def own_training(section: TrainingSection, model: Path, produced_by: str) -> TrainingParams:
    """The training behind the student's network: of its seeds, the best on validation."""
    start = checkpoint.read_start(model, produced_by=produced_by)
    seed = None if start is None else start.seed
    return next((it for it in section.trainings if it.seed == seed), section.trainings[0])


def continued(own: TrainingParams, params: Int8TrainingParams) -> TrainingParams:
    """The student's training parameters for some epochs more: half a cosine from a share of its
    peak learning rate to 0. No average of the weights (EMA): so few steps need none. All layers
    train: the last one is no longer new, so it has the backbone's learning rate, too."""
    rate = own.learning_rate * own.backbone_learning_rate_factor
    return own.model_copy(
        update={
            "epochs": params.epochs,
            "learning_rate": rate * params.learning_rate_factor,
            "schedule": "cosine",
            "milestones": None,
            "warmup_epochs": 0,
            "ema_decay": None,
            "freeze_epochs": 0,
            "backbone_learning_rate_factor": 1.0,
        }
    )


def continued_loss(loss: Loss, epochs_before: int) -> Loss:
    """The loss with epochs counted on from the student's, so that no warm-up of the method and no
    schedule of its temperature begins again."""

    def counted_on(logits: Tensor, batch: TrainingBatch) -> Tensor:
        return loss(logits, replace(batch, epoch=epochs_before + batch.epoch))

    return counted_on


def _summary(result: TrainingResult) -> str:
    kept = result.history[result.kept_epoch - 1]
    return (
        f"  validation accuracy {kept['validation_accuracy']:.4f} with rounding as in int8 "
        f"(epoch {result.kept_epoch})"
    )
