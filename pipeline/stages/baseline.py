"""baseline: train one student's network on the labels alone, the opponent of the distilled one.

The same loop, policy and number of optimiser steps, and a fresh view of every image in every pass.
If the student sees unlabelled images, too, the baseline passes over the labelled ones more often.
Of pairs of views it sees both in each step, and learns from the mean of their cross-entropies.
Reads data/prepared/ and `training`, `students.NAME`, `views` of params.yaml; writes
models/baselines/NAME/, metrics/baselines/NAME.json, its history and its predictions. PROCESSES=N
in the environment shares every batch among N processes.
"""

from pipeline.runtime.command import run_command

import argparse

import numpy as np
from torch import Tensor

from pipeline.compute.device import default_device
from pipeline.compute.distributed import ProcessGroup
from pipeline.data.prepared.dataset import open_dataset, verify_dataset
from pipeline.runtime.outputs import ModelOutputs
from pipeline.runtime.params import load_section
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.seeds.command_line import run_seeds
from pipeline.students.label_loss import label_loss
from pipeline.students.loop import TrainingBatch, TrainingData
from pipeline.students.params import load_student, load_training
from pipeline.students.training_run import StudentStage
from pipeline.views.loader import open_views
from pipeline.views.params import ViewsParams


def train_baseline(name: str, group: ProcessGroup, seed: int | None) -> None:
    with group.main_process_first():
        inputs = StageInputs("baseline", name)
        student = load_student(name)
        training = load_training(name, student)
        views = load_section(ViewsParams, "views")
        dataset = open_dataset().resized(views.image_size)
        if group.is_main:  # once is enough
            verify_dataset()

    device, outputs = default_device(), ModelOutputs("baseline", name)
    split = dataset.splits["train"]
    data = TrainingData(
        dataset,
        open_views(split, views.view_policy, views.seed, device),
        lambda number: number - 1,  # a fresh view in every pass; views are numbered from 0
        np.flatnonzero(split.labels >= 0),  # only a teacher knows what the others show
        samples_per_epoch=len(split),  # as its student's
    )

    def loss(logits: Tensor, batch: TrainingBatch) -> Tensor:
        labels = batch.labels, batch.partner_labels, batch.weights
        seen = logits if views.paired else [logits]
        smoothing = training.label_smoothing
        losses = [label_loss(each, *labels, label_smoothing=smoothing) for each in seen]
        return sum(losses) / len(losses)

    defining = {"views": views.model_dump(exclude={"count"})}
    stage = StudentStage(
        outputs, student, training, lambda _: data, loss, defining, inputs, device, group
    )
    stage.run(seed)


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.baseline", description=__doc__)
    run_seeds("pipeline.stages.baseline", parser, train_baseline)


if __name__ == "__main__":
    run_command(main)
