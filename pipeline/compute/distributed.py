"""One stage in several processes: started by torchrun's own machinery, each with a rank.

`PROCESSES=N` starts N on this machine; `torchrun` by hand starts them on many. Contract code: an
edit here runs the teacher again.
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

from pipeline.runtime.errors import UserError
from pipeline.runtime.signals import LAUNCHER

_TIMEOUT = timedelta(days=7)  # how long a rank waits for the slowest one's share
_PATIENCE = 10  # seconds in which the launcher ends this process when another has failed


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share the work; rank 0 speaks for all."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 goes through this block first, and the others after it has succeeded: what it
        refuses is said once."""
        if not self.is_main:
            self.broadcast(None)
        yield
        if self.is_main:
            self.broadcast(None)

    @contextmanager
    def report_peer_failure(self) -> Iterator[None]:
        """Around work with collectives: where another process has failed, the launcher ends this
        one, too, before it complains of that. What fails here by itself is raised as it is."""
        try:
            yield
        except RuntimeError:
            if self.size > 1:
                time.sleep(_PATIENCE)
            raise

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        with _failing_together():
            distributed.broadcast_object_list(values)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank; so nobody goes on before all have come here."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with _failing_together():
            distributed.all_gather_object(values, value)
        return values


SINGLE_PROCESS = ProcessGroup(0, 1)


def launch(module: str, *arguments: str) -> bool:
    """Run `python -m module arguments` in PROCESSES processes and wait for them.

    Returns:
        Whether it did: not where PROCESSES asks for one, and not in a process of torchrun's.

    Raises:
        UserError: PROCESSES is no number of processes, or one of them was killed.
        SystemExit: one of them failed, and has said why.
    """
    count = _process_count()
    if count == 1 or "RANK" in os.environ:
        return False
    # Each its share of the cores, where the user has not said otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    os.environ[LAUNCHER] = str(os.getpid())
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the rank has said it
    try:
        options = ["--standalone", "--nproc-per-node", str(count), "--log-dir", os.devnull]
        # None: a signal ends this process as it ends any of ours, and the others end with it.
        options += ["--signals-to-handle", "", "-m"]
        run.run(run.parse_args([*options, module, *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if name := _signal_name(failure.exitcode):
            raise UserError(
                f"process {rank} of {count} was ended by {name}; expected it to finish its share. "
                "What is finished is kept: look at the machine's memory, and run the stage again."
            ) from None
        raise SystemExit(failure.exitcode) from None
    return True


def _signal_name(code: int) -> str | None:
    """Of the signal that ended a process, by its exit code: outright, or as ours end themselves."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number).name if number in set(signal.Signals) else None


def _process_count() -> int:
    text = os.environ.get("PROCESSES") or "1"
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UserError(
            f"PROCESSES is `{text}`; expected the number of processes to start on this machine, "
            "1 or more. Set it to that, or unset it."
        )
    devices = torch.cuda.device_count()
    if 0 < devices < int(text):
        raise UserError(
            f"PROCESSES is {text}, but this machine has {devices} CUDA devices; expected at most "
            f"one process for each. Set PROCESSES={devices}."
        )
    return int(text)


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """This process's place in the group: alone, where torchrun has not started it."""
    if "RANK" not in os.environ:
        yield SINGLE_PROCESS
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with _failing_together():
        distributed.init_process_group(backend, timeout=_TIMEOUT)
    yield ProcessGroup(distributed.get_rank(), distributed.get_world_size())
    distributed.destroy_process_group()


@contextmanager
def _failing_together() -> Iterator[None]:
    """Let the launcher, which knows who failed first, end this process before it complains."""
    try:
        yield
    except RuntimeError:
        time.sleep(_PATIENCE)
        raise UserError(
            "another process of this run has ended; expected all to finish their shares. What is "
            "finished is kept: look for the other's message, and run the stage again."
        ) from None
