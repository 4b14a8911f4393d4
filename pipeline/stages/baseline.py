"""baseline: train one student's network on the labels alone, the opponent of its distilled twin.

The same loop, policy and budget, and a fresh view of every image in every epoch. Reads
data/prepared/ and `training`, `students.NAME`, `views` of params.yaml; writes
models/baselines/NAME/, metrics/baselines/NAME.json, its history and its predictions. PROCESSES=N
in the environment shares every batch among N processes.
"""

from pipeline.runtime.command import run_command

import argparse

from pipeline.compute import distributed
from pipeline.compute.device import default_device
from pipeline.compute.distributed import ProcessGroup
from pipeline.data.prepared.dataset import open_dataset, verify_dataset
from pipeline.runtime.params import load_section
from pipeline.runtime.stage_inputs import StageInputs
from pipeline.students.loop import Lesson, run
from pipeline.students.params import TrainingParams, load_student, load_with_overrides
from pipeline.views.loader import open_views
from pipeline.views.params import ViewsParams


def train_baseline(name: str, group: ProcessGroup) -> None:
    with group.main_process_first():
        given = StageInputs("baseline", name)
        student = load_student(name)
        training = load_with_overrides(TrainingParams, "training", student.training, name)
        views = load_section(ViewsParams, "views")
        dataset = open_dataset().resized(views.image_size)
        if group.is_main:  # once is enough
            verify_dataset()
    train = open_views(dataset.splits["train"], views.plan, views.seed, default_device())
    lesson = Lesson(
        kind="baselines",
        view_of_epoch=lambda epoch: epoch,
        batches=train.batches,
        label_smoothing=training.label_smoothing,
        inputs={"views": views.model_dump(exclude={"count"})},
    )
    run(name, student, training, dataset, lesson, group, given)


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.stages.baseline", description=__doc__)
    parser.add_argument("name", help="a student in params.yaml")
    name = parser.parse_args().name
    if distributed.launch("pipeline.stages.baseline", name):
        return
    with distributed.process_group() as group:
        train_baseline(name, group)


if __name__ == "__main__":
    run_command(main)
