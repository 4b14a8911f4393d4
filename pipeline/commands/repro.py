"""Run the pipeline, several stages at once; the outputs are those of `dvc repro`.

    python -m pipeline.commands.repro --jobs 2

DVC runs one stage at a time, and parallel `dvc repro` lock one another out; parallel `dvc repro
--single-item` do not. So this asks DVC which stages are not up to date, starts each by a DVC of its
own as soon as the stages that it reads from have finished, leaves the rest to one `dvc repro`, and
prints the comparison. A stage gets the GPU with the fewest stages, or as many as its seeds and
PROCESSES use. Imports no torch.
"""

from pipeline.runtime.command import run_command

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from graphlib import TopologicalSorter

from pipeline.data.prepared.image_decoding import available_cores
from pipeline.plan.forecast import Forecast, forecast_run
from pipeline.runtime.environment import JOBS, REPRO, SEED_JOBS, process_count
from pipeline.runtime.errors import UserError, counted, positive_int
from pipeline.runtime.params import read_params
from pipeline.runtime.run_plan import ahead, write_plan
from pipeline.runtime.stage_times import split_sizes
from pipeline.seeds.gpus import SharedGpus, visible_gpus
from pipeline.seeds.prefixed import run_prefixed
from pipeline.students.params import load_student, load_training

#: Stages of the last `dvc repro`: nothing runs beside `speed`, which would disturb its times.
LAST = ("speed", "compare")
DVC = [sys.executable, "-m", "dvc"]
#: How lines begin that DVC prints after each stage; the last `dvc repro` prints them once.
HINTS = (
    *("Updating lock file", "Generating lock file", "To track the changes", "git add "),
    *("To enable auto staging", "dvc config core.autostage", "Use `dvc push`"),
)


def main() -> None:
    parser = argparse.ArgumentParser("python -m pipeline.commands.repro", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--jobs", help="stages at once; by default one for each GPU, or 2")
    jobs = number_of_jobs(parser.parse_args().jobs)
    run = forecast_run()
    print_ahead(run.stages)
    os.environ[REPRO] = str(os.getpid())
    if jobs > 1:
        run_in_parallel({k: v for k, v in run.waits.items() if k not in LAST}, jobs)
    sys.stdout.flush()
    for command in ([*DVC, "repro"], [sys.executable, "-m", "pipeline.stages.compare", "--show"]):
        if code := subprocess.run(command, check=False).returncode:
            raise SystemExit(code)


def number_of_jobs(text: str | None) -> int:
    """Read how many stages to run at once; by default as many as the GPUs suffice for, or 2 where
    there are none. Two trainings seldom fit one GPU."""
    if text is None:
        gpus = visible_gpus()
        return max(1, len(gpus) // process_count()) if gpus else 2
    return positive_int(text, "JOBS", "the number of stages to run at once")


def print_ahead(forecasts: Sequence[Forecast]) -> None:
    """Print what is ahead, and let the stages count by it."""
    running = [forecast for forecast in forecasts if forecast.outcome in ("runs", "may run")]
    stages = [forecast.stage for forecast in running]
    all_run = all(forecast.outcome == "runs" for forecast in running)
    write_plan(stages, all_run)
    if stages:
        number = f"{'' if all_run else 'up to '}{counted(len(stages), 'stage')}"
        line = "; ".join([number, *ahead(stages, read_params(), split_sizes())])
        print(f"the run: {line}", flush=True)


def run_in_parallel(waits: Mapping[str, set[str]], jobs: int) -> None:
    """Run the stages, `jobs` at once, with a share of the cores each. Where fewer stages are ready
    than jobs, trainings get the free jobs for their seeds. A failure stops only the stages that
    read from the failed one, and is named at the end.

    Args:
        waits: by stage, the stages that must have finished.
    """
    threads = str(max(1, available_cores() // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, JOBS: str(jobs)}
    sorter = TopologicalSorter(waits)
    sorter.prepare()
    behind = stages_behind(waits)  # the teacher starts before a baseline
    gpus, of_job = SharedGpus(visible_gpus()), process_count()
    running: dict[Future[bool], tuple[str, int]] = {}  # the stage, and the jobs that it takes
    ready: list[str] = []
    failed: list[str] = []
    pool, free = ThreadPoolExecutor(jobs), jobs
    try:
        while True:
            ready = sorted([*ready, *sorter.get_ready()], key=lambda stage: -len(behind[stage]))
            while ready and free:
                taken = jobs_of(len(ready), free, seeds_of(ready[0]))
                stage, free = ready.pop(0), free - taken
                of_stage = {**environment, SEED_JOBS: str(taken)}
                visible = gpus.taken(taken * of_job)
                running[pool.submit(run_stage, stage, of_stage, visible)] = stage, taken
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stage, taken = running.pop(future)
                free += taken
                sorter.done(stage) if future.result() else failed.append(stage)
    finally:  # if interrupted, start no further stage
        pool.shutdown(cancel_futures=True)
    if failed:
        raise UserError(
            f"{counted(len(failed), 'stage')} failed: {', '.join(sorted(failed))}. "
            "Lines above that begin with such a name say why. All stages that do not read from a "
            "failed one are recorded. Correct the cause and run the same command again."
        )


def jobs_of(ready: int, free: int, seeds: int) -> int:
    """The jobs that a stage takes: its share of the free ones, but no more than it has seeds.

    Args:
        ready: stages that can start now, with this one.
    """
    return min(seeds, max(1, free // ready))


def seeds_of(stage: str) -> int:
    """The number of seeds that a stage trains; 1 for a stage that trains no student."""
    kind, _, name = stage.partition("@")
    if kind not in ("student", "baseline"):
        return 1
    try:
        return len(load_training(name, load_student(name)).seeds)
    except UserError:  # the stage says so
        return 1


def stages_behind(waits: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Find, by stage, all that cannot start before it has finished."""
    order = list(TopologicalSorter(waits).static_order())
    behind: dict[str, set[str]] = {stage: set() for stage in order}
    for stage in reversed(order):
        for before in waits.get(stage, ()):
            behind[before] |= {stage} | behind[stage]
    return behind


def run_stage(
    stage: str, environment: Mapping[str, str], gpus: AbstractContextManager[Mapping[str, str]]
) -> bool:
    """Run one stage by DVC, on some GPUs, print its lines, each after its name, and return its
    success."""
    command = [*DVC, "--wait-for-lock", "repro", "--single-item", stage]
    with gpus as visible:
        return run_prefixed(stage, command, {**environment, **visible}, HINTS) == 0


if __name__ == "__main__":
    run_command(main)
