"""Say what `dvc repro` would run now, and why, in words. Runs nothing.

    python -m pipeline.commands.plan

Whether the teacher runs comes first. It works in a clone without data, too.
"""

from pipeline.runtime.command import run_command

import argparse

import numpy as np

from pipeline.plan.forecast import forecast_run
from pipeline.plan.words import lines
from pipeline.runtime.outputs import PREPARED
from pipeline.runtime.params import load_section
from pipeline.runtime.stage_times import split_sizes
from pipeline.teacher.params import TeacherParams
from pipeline.views.params import ViewsParams


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.commands.plan", description=__doc__)
    parser.parse_args()
    teacher, views = load_section(TeacherParams, "teacher"), load_section(ViewsParams, "views")
    run = forecast_run()
    sizes, labels = split_sizes(), PREPARED / "train_labels.npy"
    if sizes and labels.is_file():
        sizes["labelled"] = int((np.load(labels) >= 0).sum())
    for line in lines(run.stages, teacher, views.num_views, sizes, run.has_remote):
        print(line)


if __name__ == "__main__":
    run_command(main)
