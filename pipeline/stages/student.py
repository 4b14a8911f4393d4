"""student: train one student from the cached soft targets, without the teacher.

Reads data/prepared/, data/soft_targets/, the teacher's description (to refuse another teacher's
store) and `views`, `training`, `distillation`, `students.NAME` of params.yaml; writes
models/students/NAME/, metrics/students/NAME.json, its history and its predictions. PROCESSES=N in
the environment shares every batch among N processes.
"""

from pipeline.runtime.command import run_command

import argparse
from dataclasses import asdict

from pipeline.compute import distributed
from pipeline.compute.device import default_device
from pipeline.compute.distributed import ProcessGroup
from pipeline.data.prepared.dataset import open_dataset, verify_dataset
from pipeline.distillation.objective import distillation_loss
from pipeline.distillation.params import check_method, load_distillation
from pipeline.models import checkpoint
from pipeline.models.checkpoint import TEACHER
from pipeline.runtime.params import load_section
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.store.reading.store import open_store, view_of_epoch
from pipeline.students.loop import Lesson, run
from pipeline.students.params import TrainingParams, load_student, load_with_overrides
from pipeline.views.loader import open_views
from pipeline.views.params import ViewsParams


def train_student(name: str, group: ProcessGroup) -> None:
    with group.main_process_first():
        given = StageInputs("student", name)
        student = load_student(name)
        training = load_with_overrides(TrainingParams, "training", student.training, name)
        distillation = load_distillation(student.distillation, name)
        views = load_section(ViewsParams, "views")
        dataset = open_dataset().resized(views.image_size)
        teacher = checkpoint.fingerprint(TEACHER, produced_by="dvc repro teacher")
        store = open_store(dataset, views, teacher).decoded_at(distillation.decoding_temperature)
        check_method(
            distillation,
            name,
            encoding=store.contents.encoding,
            mixed=views.mix is not None,
            labels=dataset.splits["train"].labels,
        )
        if group.is_main:  # once is enough
            verify_dataset()
            store.verify(dataset)
    train = open_views(dataset.splits["train"], views.plan, views.seed, default_device())
    lesson = Lesson(
        kind="students",
        view_of_epoch=lambda epoch: view_of_epoch(epoch, store.num_views, training.seed),
        batches=train.batches,
        hard_label_weight=distillation.hard_label_weight,
        distillation_loss=distillation_loss(distillation),
        soft_targets=store.gather,
        inputs={
            "views": views.model_dump(),
            "distillation": distillation.model_dump(),
            "store": asdict(store.index),
        },
    )
    run(name, student, training, dataset, lesson, group, given)


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.student", description=__doc__)
    parser.add_argument("name", help="a student in params.yaml")
    name = parser.parse_args().name
    if distributed.launch("pipeline.stages.student", name):
        return
    with distributed.process_group() as group:
        train_student(name, group)


if __name__ == "__main__":
    run_command(main)
