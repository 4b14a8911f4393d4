"""Say what `dvc repro` would run now, and why, in words. Runs nothing.

    python -m pipeline.commands.plan

Whether the teacher runs comes first. It works in a clone without data, too.
"""

from pipeline.runtime.command import run_command

import argparse

from dvc.exceptions import DvcException
from dvc.repo import Repo

from pipeline.data.prepared.dataset import DatasetDescription
from pipeline.plan.forecast import forecast_stages
from pipeline.plan.words import lines
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import PREPARED
from pipeline.runtime.params import load_section
from pipeline.runtime.validation import read_model
from pipeline.teacher.params import TeacherParams
from pipeline.views.params import ViewsParams


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.commands.plan", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args()
    teacher, views = load_section(TeacherParams, "teacher"), load_section(ViewsParams, "views")
    try:
        with Repo() as repo:
            forecasts, has_remote = forecast_stages(repo), bool(repo.config["remote"])
    except DvcException as error:
        raise UserError(f"DVC cannot say what it would run: {error}") from None
    sizes = None
    if (path := PREPARED / "dataset.json").exists():
        sizes = read_model(path, DatasetDescription, produced_by="dvc repro prepare").splits
    for line in lines(forecasts, teacher, views.num_views, sizes, has_remote):
        print(line)


if __name__ == "__main__":
    run_command(main)
