"""student: train one student from the cached soft targets, without the teacher.

Reads data/prepared/, data/soft_targets/, the teacher's description (to refuse another teacher's
store) and `views`, `training`, `distillation`, `students.NAME` of params.yaml; writes
models/students/NAME/, metrics/students/NAME.json, its history and its predictions. PROCESSES=N in
the environment shares every batch among N processes.
"""

from pipeline.runtime.command import run_command

import argparse
import math

import numpy as np

from pipeline.compute.device import default_device
from pipeline.compute.distributed import ProcessGroup
from pipeline.data.prepared.dataset import open_dataset, verify_dataset
from pipeline.distillation.objective import loss_over_epochs, seen_views
from pipeline.distillation.params import check_method, load_distillation
from pipeline.models import checkpoint
from pipeline.runtime.outputs import TEACHER, ModelOutputs
from pipeline.runtime.params import load_section
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.seeds.command_line import run_seeds
from pipeline.store.reading.store import open_store, view_of_epoch
from pipeline.students.loop import TrainingData
from pipeline.students.params import load_student, load_training
from pipeline.students.training_run import StudentStage
from pipeline.views.loader import open_views
from pipeline.views.params import ViewsParams


def train_student(name: str, group: ProcessGroup, seed: int | None) -> None:
    with group.main_process_first():
        inputs = StageInputs("student", name)
        student = load_student(name)
        training = load_training(name, student)
        distillation = load_distillation(student.distillation, name)
        views = load_section(ViewsParams, "views")
        dataset = open_dataset().resized(views.image_size)
        teacher = checkpoint.fingerprint(TEACHER.model, produced_by="dvc repro teacher")
        store = open_store(dataset, views, teacher)
        split = dataset.splits["train"]
        check_method(
            distillation,
            name,
            encoding=store.identity.encoding,
            mixed=views.mix is not None,
            paired=views.paired,
            labels=split.labels,
            num_classes=dataset.num_classes,
        )
        if group.is_main:  # once is enough
            verify_dataset()
            store.verify(dataset)

    device, outputs = default_device(), ModelOutputs("distilled", name)
    opened = open_views(split, views.view_policy, views.seed, device)
    seen = seen_views(distillation, opened)

    def data(seed: int) -> TrainingData:
        def view_of_pass(number: int) -> int:  # a pass is an epoch
            return view_of_epoch(number, views.views_or_pairs, seed)

        return TrainingData(dataset, seen, view_of_pass, np.arange(len(split)))

    loss = loss_over_epochs(
        distillation,
        lambda temperature: store.decoded_at(temperature).gather,
        device,
        training.epochs,
        stored=(store.num_views, len(split)),
        paired=views.paired,
        steps=training.epochs * math.ceil(len(split) / training.batch_size),
    )
    defining = {
        "views": views.model_dump(),
        "distillation": distillation.model_dump(),
        "store": store.index.content(),
        "rows": store.rows_sha256,
    }
    stage = StudentStage(outputs, student, training, data, loss, defining, inputs, device, group)
    stage.run(seed)


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.student", description=__doc__)
    run_seeds("pipeline.stages.student", parser, train_student)


if __name__ == "__main__":
    run_command(main)
