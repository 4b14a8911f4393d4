"""Compare several trainings at once, each with a share of the cores, with the same trainings one
after the other, each with all cores.

    python -m benchmarks.side_by_side

Each training is the loop that students run, from cached soft targets, batches of 64, in its own
process as in `make repro`. A slice has equally many steps on both sides. Starting up is not
measured; it also runs side by side.
"""

from pipeline.runtime.command import run_command

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import loops
from benchmarks.harness import Row, alternate, median, run_benchmark
from benchmarks.loops import Loop
from benchmarks.reading import random_logits, write_store
from pipeline.compute.device import default_device
from pipeline.runtime.errors import UserError

CLASSES, SAMPLES, BATCH = 100, 10_000, 64


def train_on_order(network: str, orders: Connection) -> None:
    """Receive a number of steps, train for these steps, and send the number back; 0 ends."""
    dataset = loops.noise(SAMPLES, 32, CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store", *random_logits(dataset), None)
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


def compare(network: str, jobs: int, cores: int, pairs: int, steps: int) -> Row:
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

        times = alternate({"at once": at_once, "in turn": in_turn}, pairs)
    ratio = median(times["in turn"] / times["at once"])
    return {"network": network, "at once": jobs, "cores": cores, "speed-up at once": ratio}


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    cores, jobs = torch.get_num_threads(), arguments.jobs
    if not 1 <= jobs <= cores:
        raise UserError(
            f"--jobs is {jobs}; expected 1 to {cores}, the number of threads (OMP_NUM_THREADS), "
            "so that each training has at least one."
        )
    for network in ("resnet8", "resnet20"):
        yield compare(network, jobs, cores, arguments.pairs, arguments.steps)


def main() -> None:
    run_benchmark(
        __doc__,
        measure,
        pairs=(100, "rounds"),
        steps=(10, "of each training, in a slice"),
        jobs=(2, "trainings at once"),
    )


if __name__ == "__main__":
    run_command(main)
