"""One stage in several processes, each with a rank.

`PROCESSES=N` starts N on this machine, by torchrun's launcher. Call `torchrun` to use several
machines.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from pipeline.runtime.errors import UserError, positive_int
from pipeline.runtime.signals import LAUNCHER

_TIMEOUT = timedelta(days=7)  # how long a rank waits for the slowest one
_PATIENCE = 10  # seconds in which the launcher stops this process after another has failed


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share a stage. Rank 0, the main process, prints and writes."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, and on the others once it has succeeded, so that an error
        is printed once."""
        if not self.is_main:
            self.broadcast(None)
        yield
        if self.is_main:
            self.broadcast(None)

    @contextmanager
    def report_peer_failure(self) -> Iterator[None]:
        """If a peer fails in the block, wait for the launcher to stop this process, so that only
        the first error is shown. Re-raise this process's own error."""
        try:
            yield
        except RuntimeError:
            if self.size > 1:
                time.sleep(_PATIENCE)
            raise

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        values = [value]
        with _explain_peer_failure():
            distributed.broadcast_object_list(values)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value on every rank; also a barrier."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with _explain_peer_failure():
            distributed.all_gather_object(values, value)
        return values


SINGLE_PROCESS = ProcessGroup(0, 1)


def launch(module: str, *arguments: str) -> bool:
    """Run `python -m module arguments` in PROCESSES processes and wait for them.

    Returns False, having done nothing, if PROCESSES is 1 or torchrun started this process; else
    True. If a process fails, which prints why, this one exits with its code.
    """
    count = _process_count()
    if count == 1 or "RANK" in os.environ:
        return False
    # Each process gets its share of the cores, unless the user has set the number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    os.environ[LAUNCHER] = str(os.getpid())
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the rank has printed it
    try:
        options = ["--standalone", "--nproc-per-node", str(count), "--log-dir", os.devnull]
        # torchrun handles no signal: our handler ends this process, and the others end with it.
        options += ["--signals-to-handle", "", "-m"]
        run.run(run.parse_args([*options, module, *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if name := _signal_name(failure.exitcode):
            raise UserError(
                f"process {rank} of {count} was ended by {name}; expected it to finish its share. "
                "Finished work is kept: check the machine's memory and run the stage again."
            ) from None
        raise SystemExit(failure.exitcode) from None
    return True


def _signal_name(code: int) -> str | None:
    """The signal that ended a process: killed by it (-N), or exited in our handler (128 + N)."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number).name if number in set(signal.Signals) else None


def _process_count() -> int:
    text = os.environ.get("PROCESSES") or "1"
    count = positive_int(text, "PROCESSES", "the number of processes to start on this machine")
    devices = torch.cuda.device_count()
    if 0 < devices < count:
        raise UserError(
            f"PROCESSES is {count}, but this machine has {devices} CUDA devices; expected at most "
            f"one process per device. Set PROCESSES={devices}."
        )
    return count


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the group of processes, or yield SINGLE_PROCESS if torchrun did not start this one."""
    if "RANK" not in os.environ:
        yield SINGLE_PROCESS
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with _explain_peer_failure():
        distributed.init_process_group(backend, timeout=_TIMEOUT)
    yield ProcessGroup(distributed.get_rank(), distributed.get_world_size())
    distributed.destroy_process_group()


@contextmanager
def _explain_peer_failure() -> Iterator[None]:
    """If a collective fails, wait for the launcher, which knows who failed first, to stop this
    process. If it does not, raise a UserError."""
    try:
        yield
    except RuntimeError:
        time.sleep(_PATIENCE)
        raise UserError(
            "another process of this run has ended; expected all to finish their shares. Finished "
            "work is kept: look for the other's message and run the stage again."
        ) from None
