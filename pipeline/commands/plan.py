"""Say what `dvc repro` would run now, and why, in words. Runs nothing.

    python -m pipeline.commands.plan
    python -m pipeline.commands.plan --ahead

Whether the teacher runs comes first. It works in a clone without data, too. `--ahead` prints one
line, and the stages of the next `dvc repro` say how much of this plan is left.
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Sequence

from dvc.exceptions import DvcException
from dvc.repo import Repo

from pipeline.plan.forecast import Forecast, forecast_stages
from pipeline.plan.words import lines
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.params import load_section, read_params
from pipeline.runtime.run_plan import ahead, write_plan
from pipeline.runtime.stage_times import split_sizes
from pipeline.teacher.params import TeacherParams
from pipeline.views.params import ViewsParams


def print_ahead(forecasts: Sequence[Forecast]) -> None:
    """Write the plan for the stages, and print what is ahead."""
    running = [forecast for forecast in forecasts if forecast.outcome in ("runs", "may run")]
    stages = [forecast.stage for forecast in running]
    all_run = all(forecast.outcome == "runs" for forecast in running)
    write_plan(stages, all_run)
    if stages:
        number = f"{'' if all_run else 'up to '}{counted(len(stages), 'stage')}"
        print(f"the run: {'; '.join([number, *ahead(stages, read_params(), split_sizes())])}")


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.commands.plan", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--ahead", action="store_true", help="print one line, and let the stages count by the plan"
    )
    arguments = parser.parse_args()
    teacher, views = load_section(TeacherParams, "teacher"), load_section(ViewsParams, "views")
    try:
        with Repo() as repo:
            forecasts, has_remote = forecast_stages(repo), bool(repo.config["remote"])
    except DvcException as error:
        raise UserError(f"DVC cannot say what it would run: {error}") from None
    if arguments.ahead:
        print_ahead(forecasts)
        return
    for line in lines(forecasts, teacher, views.num_views, split_sizes(), has_remote):
        print(line)


if __name__ == "__main__":
    run_command(main)
