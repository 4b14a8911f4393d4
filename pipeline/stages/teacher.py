"""teacher: train the teacher, or take or fine-tune one that is trained, and measure it.

Reads data/prepared/ and `teacher` of params.yaml; writes models/teacher/, metrics/teacher.json
and predictions/teacher.safetensors.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pipeline import auxiliary, checkpoint, fine_tuning, gate, pretrained
from pipeline.augment import apply_views, permutation
from pipeline.checkpoint import TEACHER, WEIGHTS, Description, InputSpec
from pipeline.dataset import Dataset, open_dataset
from pipeline.device import default_device, training_autocast
from pipeline.errors import UserError, reported
from pipeline.evaluation import (
    METRICS,
    PREDICTIONS,
    cost,
    measures,
    predict_all,
    write_predictions,
)
from pipeline.files import atomic_directory, write_json
from pipeline.params.loading import load_section
from pipeline.params.teacher import TeacherParams, TeacherTraining
from pipeline.progress import EpochLog, bar

#: What to do about a low accuracy that neither order, normalisation nor size explains.
OTHERWISE = {
    "train": "Train it longer (`teacher.training.epochs`), or at another `learning_rate`.",
    "pretrained": "Look whether the classes that its logits are for are those of the folders, or "
    "train it for longer.",
    "checkpoint": "Look whether `teacher.checkpoint` was trained for these classes and images.",
}


def train(
    network: nn.Module,
    spec: InputSpec,
    dataset: Dataset,
    params: TeacherTraining,
    device: torch.device,
) -> None:
    """Train in place: a fresh view of every sample in every epoch, as the policy has them.

    Raises:
        UserError: the loss is no longer finite.
    """
    split, validation = dataset.splits["train"], dataset.splits["validation"]
    images = torch.from_numpy(split.images).to(device)
    labels = torch.from_numpy(split.labels).to(device)
    validation_labels = torch.from_numpy(validation.labels)
    steps_per_epoch = len(batches(np.arange(len(split)), params.batch_size))
    optimizer = torch.optim.SGD(
        network.parameters(),
        params.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=params.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: cosine_with_warmup(
            step, params.epochs * steps_per_epoch, params.warmup_epochs * steps_per_epoch
        ),
    )
    log = EpochLog(params.epochs)
    for epoch in range(params.epochs):
        network.train()
        fine_tuning.begin_epoch(network, params, epoch)  # hook: what is frozen in this epoch
        total_loss = torch.zeros((), device=device)
        order = permutation(len(split), params.seed, epoch)
        for samples in bar(batches(order, params.batch_size), f"epoch {epoch + 1}"):
            views = apply_views(images[samples], params.policy, params.seed, epoch, samples)
            inputs = spec.apply(views)
            with training_autocast(device):
                logits = network(inputs)
            loss = F.cross_entropy(logits.float(), labels[samples])
            loss = loss + auxiliary.loss(network, labels[samples])  # hook: auxiliary heads
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach() * len(samples)
        train_loss = total_loss.item() / len(split)
        if not math.isfinite(train_loss):
            raise UserError(
                f"the teacher's training loss is {train_loss} in epoch {epoch + 1}. Set a lower "
                "`teacher.training.learning_rate`, or more `warmup_epochs`."
            )
        logits = predict_all(network, spec, validation.images, device=device)
        log.line(
            epoch + 1,
            train_loss=train_loss,
            validation_accuracy=measures(logits, validation_labels, "validation")[
                "validation_accuracy"
            ],
        )


def cosine_with_warmup(step: int, steps: int, warmup_steps: int) -> float:
    """Factor on the peak learning rate: linear up, then a half cosine down to 0 at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def batches(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The order in batches; a last one of a single sample, which batch norm refuses, joins the
    one before it."""
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [np.concatenate(parts[-2:])]
    return parts


def build(params: TeacherParams, dataset: Dataset) -> tuple[nn.Module, Description]:
    """The network with the weights that there are before any training, on the CPU."""
    description = checkpoint.describe(
        params.family, params.network, dataset, pretrained=params.weights == "pretrained"
    )
    if params.weights == "pretrained":
        network, description = pretrained.load(description)
        if description.pretrained_classes is None:
            fine_tuning.mark_last_layer(network, pretrained.last_layer(description))
            print("  its classes are not all among the pretraining's: its last layer is new")
        else:
            print("  its classes are all among the pretraining's: it is taken as it is")
        return network, description
    if params.weights == "checkpoint":
        return checkpoint.bring(description, Path(params.checkpoint)), description
    return checkpoint.build(description), description


def main() -> None:
    argparse.ArgumentParser("python -m pipeline.stages.teacher", description=__doc__).parse_args()
    params = load_section(TeacherParams, "teacher")
    dataset = open_dataset()
    device = default_device()
    torch.manual_seed(params.training.seed)
    print(f"teacher: {params.family}, {params.network.name}, weights: {params.weights}", flush=True)
    network, description = build(params, dataset)
    network.to(device)
    spec = description.input
    if params.weights != "checkpoint" and description.pretrained_classes is None:
        with auxiliary.heads(network, description):
            train(network, spec, dataset, params.training, device)

    metrics: dict[str, float] = {}
    logits = {}
    for name in ("validation", "test"):
        split = dataset.splits[name]
        logits[name] = predict_all(network, spec, split.images, device=device)
        metrics |= measures(logits[name], torch.from_numpy(split.labels), name)
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
        native=checkpoint.native_input(params.family, params.network.name),
        otherwise=OTHERWISE[params.weights],
        device=device,
    )
    with atomic_directory(TEACHER) as directory:
        checkpoint.save(directory, network, description)
    write_predictions(PREDICTIONS / "teacher.safetensors", **logits)
    write_json(
        METRICS / "teacher.json",
        {
            **metrics,
            **cost(network, spec),
            "size_bytes": (TEACHER / WEIGHTS).stat().st_size,
        },
    )
    print(f"  test accuracy {metrics['test_accuracy']:.4f}")


if __name__ == "__main__":
    with reported():
        main()
