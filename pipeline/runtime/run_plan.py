"""Where a stage is in the whole run: the first line of a stage says what is ahead.

`python -m pipeline.commands.repro`, which `make repro` calls, writes the stages that `dvc
repro` will run to a file; each stage then finds itself in it. Without the file, or if it is of
another params.yaml, nothing is said of the run, and times are remembered all the same.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.runtime import stage_times
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.files import read_json, sha256_of_file, write_json
from pipeline.runtime.params import PARAMS_FILE, read_params
from pipeline.runtime.stage_times import known_seconds, split_sizes, work_of
from pipeline.runtime.time_left import about, in_words

FILE = Path(".scratch/run_plan.json")


def write_plan(stages: Sequence[str], all_run: bool) -> None:
    """Write the stages that the run will run, in their order.

    Args:
        all_run: False: some run only if what they read changes.
    """
    content = {"params": sha256_of_file(PARAMS_FILE), "stages": list(stages), "all_run": all_run}
    write_json(FILE, {**content, "sizes": split_sizes()})  # DVC deletes them before `prepare`


class StageOfRun:
    """The stage that this process runs for DVC."""

    def __init__(self, stage: str, start: float):
        """Print what is ahead of the whole run, if that is known.

        Args:
            start: of the process, by `time.perf_counter`.
        """
        self._stage, now = stage, time.perf_counter()
        self._startup, self._loaded = now - start, now
        stage_times.start(stage)
        try:
            self._params = read_params()
        except UserError:  # the stage itself says so
            self._params = {}
        if line := _line(stage, self._params):
            print(f"  {line}", flush=True)

    def finish(self) -> None:
        """Remember how long the stage took, with the number of images that there are now."""
        work = work_of(self._stage, self._params, split_sizes())
        seconds = time.perf_counter() - self._loaded
        stage_times.finish(self._stage, work, self._startup, seconds)
        with suppress(UserError, OSError, KeyError, IndexError, TypeError):
            if read_json(FILE, produced_by="-")["stages"][-1] == self._stage:
                FILE.unlink()  # the run has ended


def _line(stage: str, params: Mapping[str, Any]) -> str | None:
    """`stage 4 of 22; about 6 minutes left`; None if the plan does not have the stage."""
    try:
        plan = read_json(FILE, produced_by="-")
        if plan["params"] != sha256_of_file(PARAMS_FILE):
            return None
        stages, number = plan["stages"], plan["stages"].index(stage)
        total = f"{'' if plan['all_run'] else 'up to '}{len(stages)}"
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None
    sizes = split_sizes() or plan.get("sizes")
    return "; ".join([f"stage {number + 1} of {total}", *ahead(stages[number:], params, sizes)])


def ahead(
    stages: Sequence[str], params: Mapping[str, Any], sizes: Mapping[str, int] | None
) -> list[str]:
    """Say what the stages have ahead: the time left, and, where none was measured, what there is
    to do.

    Args:
        sizes: images of each split; None: not known.
    """
    works = {stage: work_of(stage, params, sizes) for stage in stages}
    seconds = known_seconds(works)
    unknown = [works[stage] for stage in stages if seconds[stage] is None]
    known = sum(value for value in seconds.values() if value is not None)
    if not unknown:
        return [f"{about(known)} left"]
    said = [f"more than {in_words(known)} left"] if known >= 60 else []
    if trainings := [work for work in unknown if work and work.epochs]:
        epochs = counted(sum(work.epochs for work in trainings), "epoch")
        images = f" over {counted(sizes['train'], 'image')}" if sizes else ""
        said.append(f"ahead: {counted(len(trainings), 'training')} of {epochs}{images}")
    if len(unknown) == len(stages):
        said.append("not timed yet")
    else:
        said.append(counted(len(unknown), "stage was not timed yet", "stages were not timed yet"))
    return said
