"""Start the training of one student or baseline: in this process, in several that share it, or
seed by seed side by side.

Side by side, each seed has a process of its own, on the GPU with the fewest of them, and leaves its
finished training in .scratch, where the stage then finds it. `SEED_JOBS=N` in the environment
trains N at once; `python -m pipeline.commands.repro --jobs N` sets it where jobs are free.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from pipeline.compute import distributed
from pipeline.compute.distributed import ProcessGroup
from pipeline.runtime.environment import LAUNCHER, OF_STAGE, SEED_JOBS, process_count
from pipeline.runtime.errors import UserError, positive_int
from pipeline.runtime.stage_times import does_all, start
from pipeline.seeds.gpus import SharedGpus, visible_gpus
from pipeline.seeds.prefixed import run_prefixed
from pipeline.students.params import load_student, load_training


def run_seeds(
    module: str,
    parser: argparse.ArgumentParser,
    train: Callable[[str, ProcessGroup, int | None], None],
) -> None:
    """Read the command line of a stage, and train.

    Args:
        train: takes the student, the processes, and the seed to train alone, if only one.
    """
    parser.add_argument("name", help="a student in params.yaml")
    parser.add_argument(
        "--seed", help="train with this one of its seeds, and write nothing but its state"
    )
    arguments = parser.parse_args()
    name, words, did_all = arguments.name, [], False
    seeds = load_training(name, load_student(name)).seeds
    if arguments.seed is not None:
        if arguments.seed not in map(str, seeds):
            raise UserError(
                f"--seed is {arguments.seed!r}; expected one of the seeds of {name} in "
                f"params.yaml: {', '.join(map(str, seeds))}."
            )
        words = ["--seed", arguments.seed]
    elif len(seeds) > 1:
        did_all = train_side_by_side(module, name, seeds)
    if not distributed.launch(module, name, *words):
        with distributed.process_group() as group:
            train(name, group, int(arguments.seed) if words else None)
    if did_all:  # what the stage found finished was its own work
        start(os.environ["DVC_STAGE"])


def train_side_by_side(module: str, name: str, seeds: Sequence[int]) -> bool:
    """Run `python -m module NAME --seed SEED` for each seed, SEED_JOBS at once. Does nothing if
    that is 1, or in a process that torchrun started. If one fails, which prints why, this process
    exits with its status, once the others have ended.

    Returns:
        Whether these processes trained every epoch of a stage that DVC runs.
    """
    jobs = positive_int(os.environ.get(SEED_JOBS) or "1", SEED_JOBS, "the seeds to train at once")
    jobs = min(jobs, len(seeds))
    if jobs == 1 or "RANK" in os.environ:
        return False
    # Equal numbers of threads here and there: the last bits of a training depend on it.
    threads = max(1, torch.get_num_threads() // jobs)
    given = os.environ.get("OMP_NUM_THREADS", "")
    if not given.isdecimal() or not int(given):  # OpenMP reads lists, too: `2,1`
        os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    environment = {**os.environ, LAUNCHER: str(os.getpid())}
    environment[OF_STAGE] = environment.pop("DVC_STAGE", "")  # its time is this process's
    gpus, of_one = SharedGpus(visible_gpus()), process_count()

    def train(seed: int) -> int:
        command = [sys.executable, "-m", module, name, "--seed", str(seed)]
        with gpus.taken(of_one) as visible:
            return run_prefixed(f"seed {seed}", command, {**environment, **visible})

    pool = ThreadPoolExecutor(jobs)
    try:
        statuses = list(pool.map(train, seeds))
    finally:  # if interrupted, start no further training
        pool.shutdown(cancel_futures=True)
    if failed := next(filter(None, statuses), 0):
        raise SystemExit(failed)
    return does_all(environment[OF_STAGE])
