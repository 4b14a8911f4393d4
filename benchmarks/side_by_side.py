"""Compare several trainings at once, each with a share of the cores, with the same trainings one
after the other, each with all cores.

    python -m benchmarks.side_by_side

Each training is the loop that students run, from cached soft targets, batches of 64, in its own
process as in `make students`. A slice has equally many steps on both sides. Starting up is not
measured; it also runs side by side.
"""

from pipeline.runtime.command import run_command

import argparse
import json
import multiprocessing
import os
import tempfile
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from benchmarks import loops
from benchmarks.loops import Loop
from benchmarks.pairs import alternate, median
from benchmarks.reading import write_store
from pipeline.compute.device import default_device
from pipeline.runtime.errors import UserError

CLASSES, SAMPLES, BATCH = 100, 10_000, 64


def train_on_order(network: str, orders: Connection) -> None:
    """Receive a number of steps, train for these steps, and send the number back; 0 ends."""
    dataset = loops.noise(SAMPLES, 32, CLASSES)
    logits = 3 * np.random.default_rng(0).standard_normal((SAMPLES, CLASSES), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        labels = dataset.splits["train"].labels
        store = write_store(Path(folder) / "store", logits, labels, None)
        device = default_device()
        setup = loops.cached(loops.training_views(dataset, device), store.gather, device)
        loop = Loop("cifar_resnet", network, dataset, setup, BATCH, device)
        orders.send(torch.get_num_threads())
        while steps := orders.recv():
            loop.run(steps)
            orders.send(steps)


class Process:
    """A training in a process of `threads` threads."""

    def __init__(self, network: str, threads: int):
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._process = context.Process(target=train_on_order, args=(network, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.threads = self._orders.recv()

    def begin(self, steps: int) -> None:
        self._orders.send(steps)

    def wait(self) -> None:
        self._orders.recv()

    def close(self) -> None:
        self._orders.send(0)
        self._process.join()


def measure(network: str, jobs: int, cores: int, pairs: int, steps: int) -> dict:
    with ExitStack() as stack:
        several = [Process(network, cores // jobs) for _ in range(jobs)]
        alone = Process(network, cores)
        for process in (*several, alone):
            stack.callback(process.close)
        if [process.threads for process in (*several, alone)] != [cores // jobs] * jobs + [cores]:
            raise UserError("OMP_NUM_THREADS does not set the threads of this torch.")

        def at_once(_: int) -> None:
            for process in several:
                process.begin(steps)
            for process in several:
                process.wait()

        def in_turn(_: int) -> None:
            for _ in range(jobs):
                alone.begin(steps)
                alone.wait()

        alternate(at_once, in_turn, 1)  # the first passes set things up
        ours, theirs = alternate(at_once, in_turn, pairs)
    ratio = median(theirs / ours)
    print(f"{network:>9} {ratio}", flush=True)
    return {"times_as_fast": ratio.as_list()}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.side_by_side", description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10, help="of each training, in a slice")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    arguments = parser.parse_args()
    cores, jobs = torch.get_num_threads(), arguments.jobs
    if not 1 <= jobs <= cores:
        raise UserError(
            f"--jobs is {jobs}; expected 1 to {cores}, the number of threads (OMP_NUM_THREADS), "
            "so that each training has at least one."
        )
    print(
        f"{jobs} at once of {cores // jobs} threads, against one after the other of {cores}; "
        f"{arguments.pairs} alternating pairs of {arguments.steps} steps each\n"
        "speed-up at once (95 %)"
    )
    found = {
        network: measure(network, jobs, cores, arguments.pairs, arguments.steps)
        for network in ("resnet8", "resnet20")
    }
    print(json.dumps({"benchmark": "side_by_side", "jobs": jobs, "cores": cores, **found}))


if __name__ == "__main__":
    run_command(main)
