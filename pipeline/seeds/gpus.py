"""The GPUs of this machine, found without loading torch, and shared among processes."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """List how CUDA_VISIBLE_DEVICES names the GPUs that this process may use.

    Without that variable it numbers them from 0, and only their number is to be found: the driver
    makes a file /dev/nvidiaN for each, and a container has the files of its own GPUs alone. (CUDA's
    order may be another than that of N. Where there are no such files, as in WSL, the stages all
    take the first GPU, as if nothing had been found.)
    """
    named = os.environ.get(_VISIBLE)
    if named is None:
        return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    # CUDA ignores what follows a name that it does not know; -1 is the usual one.
    names = [name.strip() for name in named.split(",")]
    known = names.index("-1") if "-1" in names else len(names)
    return [name for name in names[:known] if name]


class SharedGpus:
    """Gives each job the GPUs with the fewest jobs. Threads may share it."""

    def __init__(self, names: list[str]):
        self._jobs, self._lock = dict.fromkeys(names, 0), Lock()

    @contextmanager
    def taken(self, count: int) -> Iterator[Mapping[str, str]]:
        """Take so many GPUs, or all, for the block; yields the environment that shows them to a
        process: nothing where there are none."""
        with self._lock:
            chosen = sorted(self._jobs, key=self._jobs.__getitem__)[:count]
            for name in chosen:
                self._jobs[name] += 1
        try:
            yield {_VISIBLE: ",".join(chosen)} if chosen else {}
        finally:
            with self._lock:
                for name in chosen:
                    self._jobs[name] -= 1
