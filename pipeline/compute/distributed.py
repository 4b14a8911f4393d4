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

from pipeline.runtime.environment import LAUNCHER, process_count
from pipeline.runtime.errors import UserError, first_line, is_out_of_memory

#: How long a rank waits in a collective of the computation. All ranks compute alike, so this is for
#: what differs: rank 0 writes the state of an epoch, and a network compiles. A longer wait is a
#: hang, which ends with an error.
_COMPUTING = timedelta(minutes=30)
#: How long the ranks wait for one another's shares, or for what rank 0 alone does.
_WAITING = timedelta(days=7)
_PATIENCE = 10  # seconds in which the launcher stops this process after another has failed
#: What errors of gloo and NCCL say if another process has ended or does not answer.
_LOST_PEER = ("by peer", "remote worker", "remote process", "imed out", "roken pipe", "aborted")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share a stage. Rank 0, the main process, prints and writes.

    The computation uses torch's default group, of NCCL on GPUs. Waits and Python's objects, such as
    the whole state of a training, use `waiting`: they must not pass through a GPU's memory.
    """

    rank: int
    size: int
    waiting: distributed.ProcessGroup | None = None  # of gloo; None: the default group

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
        the first error is shown. If it does not, raise a UserError. Re-raise this process's own
        error; if all GPUs are out of memory, on the main process first."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or (self.is_main and is_out_of_memory(error)):
                raise
            time.sleep(_PATIENCE)
            if _is_lost_peer(error):
                raise _lost_peer(error) from None
            raise

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        values = [value]
        with self.report_peer_failure():
            distributed.broadcast_object_list(values, group=self.waiting)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value on every rank; also a barrier."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self.report_peer_failure():
            distributed.all_gather_object(values, value, group=self.waiting)
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
            # NCCL aborts its process if a collective fails, and prints why.
            look = (
                "look for its message above" if name == "SIGABRT" else "check the machine's memory"
            )
            raise UserError(
                f"process {rank} of {count} was ended by {name}; expected it to finish its share. "
                f"Finished work is kept: {look} and run the stage again."
            ) from None
        raise SystemExit(failure.exitcode) from None
    return True


def _signal_name(code: int) -> str | None:
    """The signal that ended a process: killed by it (-N), or exited in our handler (128 + N)."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number).name if number in set(signal.Signals) else None


def _process_count() -> int:
    count, devices = process_count(), torch.cuda.device_count()
    if 0 < devices < count:
        raise UserError(
            f"PROCESSES is {count}, but this machine has {devices} CUDA devices; expected at most "
            f"one process per device. Set PROCESSES={devices}."
        )
    return count


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the group of processes, or yield SINGLE_PROCESS if torchrun did not start this one.

    Raises:
        UserError: there is no GPU for each process, PyTorch has no NCCL, or they cannot connect.
    """
    if "RANK" not in os.environ:
        yield SINGLE_PROCESS
        return
    backend, device = "gloo", None
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", _local_rank())
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group(backend, timeout=_COMPUTING, device_id=device)
        waiting = distributed.new_group(backend="gloo", timeout=_WAITING)
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        time.sleep(_PATIENCE)  # another process may have failed first
        raise UserError(
            f"the processes of this run cannot connect by {backend} ({_first_sentence(error)}); "
            "expected each to reach the others. Look for another's message, check the addresses "
            "that `torchrun` got, or unset PROCESSES."
        ) from None
    group = ProcessGroup(distributed.get_rank(), distributed.get_world_size(), waiting)
    yield group
    group.gather(None)  # rank 0 may still write, and NCCL expects all to leave at once
    distributed.destroy_process_group()


def _local_rank() -> int:
    """The number of this process among those of this machine; also of its GPU."""
    rank, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    count = int(os.environ.get("LOCAL_WORLD_SIZE", rank + 1))
    problem = None
    if count > devices:
        problem = (
            f"torchrun started {count} processes on this machine, but it has {devices} CUDA "
            "devices; expected at most one process per device. "
            f"Call it with `--nproc-per-node {devices}`."
        )
    elif not distributed.is_nccl_available():
        problem = (
            "this PyTorch was built without NCCL, by which several processes use GPUs; expected "
            "a build with it, such as PyTorch's own for Linux. Install one, or unset PROCESSES."
        )
    if problem is None:
        return rank
    if rank > 0:  # one is enough to say so
        time.sleep(_PATIENCE)
    raise UserError(problem)


def _is_lost_peer(error: RuntimeError) -> bool:
    return not is_out_of_memory(error) and any(words in str(error) for words in _LOST_PEER)


def _lost_peer(error: RuntimeError) -> UserError:
    return UserError(
        f"another process of this run has ended or does not answer ({_first_sentence(error)}); "
        "expected all to finish their shares. Finished work is kept: look for the other's message "
        "and run the stage again."
    )


def _first_sentence(error: Exception) -> str:
    return first_line(error).partition(". ")[0]
