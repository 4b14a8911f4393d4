"""Time one student's stage in a fresh process, by part, to the end of its first step.

    python -m benchmarks.cold_start NAME STARTED

`benchmarks.parts` starts this in a project whose `soft_targets` has run; STARTED is the start by
`time.monotonic`. It runs the real stage, times its functions from outside, and ends it after some
steps. It prints these times and the peak memory, in MiB, as one line of JSON, and imports no large
module itself. Linux only.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice

STEPS = 20  # memory has then reached its peak


class Enough(Exception):
    """Raised to end the training after STEPS."""


class Clock:
    """Seconds by part; the rest is `else`."""

    def __init__(self, started: float):
        self._started, self.seconds = started, {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin

    def around(self, owner: object, attribute: str, name: str) -> None:
        """Time every call of `owner.attribute` as a part."""
        function: Callable = getattr(owner, attribute)

        def timed(*arguments, **options):
            with self.part(name):
                return function(*arguments, **options)

        setattr(owner, attribute, timed)

    def stop(self) -> None:
        total = time.monotonic() - self._started
        self.seconds["else"] = total - sum(self.seconds.values())
        self.seconds["in all"] = total


class ShortViews:
    """Views that end after some batches. The loop takes a batch when it has finished the one
    before, so the second request ends the first step."""

    def __init__(self, views: object, clock: Clock):
        self._views, self._clock = views, clock

    def batches(self, view: int, order: list) -> Iterator:
        with self._clock.part("first step"):
            source = iter(self._views.batches(view, order))
            yield next(source)
        self._clock.stop()
        yield from islice(source, STEPS)
        raise Enough


def main() -> None:
    _, name, started = sys.argv
    clock = Clock(float(started))
    clock.seconds["interpreter"] = time.monotonic() - float(started)
    with clock.part("import torch"):
        import torch  # noqa: F401, PLC0415  (its import is timed)
    with clock.part("import the stage"):
        stage = importlib.import_module("pipeline.stages.student")
    with clock.part("import the network's family"):
        importlib.import_module(f"pipeline.networks.{stage.load_student(name).family}")
    clock.around(stage, "open_dataset", "open the dataset")
    clock.around(stage, "open_store", "open the store")
    clock.around(
        importlib.import_module("pipeline.store.reading.store").Store, "verify", "verify the store"
    )
    training_run = importlib.import_module("pipeline.students.training_run")
    clock.around(training_run, "build_initial_network", "build the network")
    # The first optimiser of a process makes torch import its compiler.
    optimisation = importlib.import_module("pipeline.training.optimisation")
    clock.around(optimisation, "make_optimizer", "make the optimiser")
    clock.around(stage, "open_views", "take the images")
    open_views = stage.open_views
    stage.open_views = lambda *arguments: ShortViews(open_views(*arguments), clock)
    sys.argv = ["student", name]
    with suppress(Enough):
        stage.main()
    from benchmarks.harness import memory_bytes  # noqa: PLC0415  (it loads NumPy)

    seconds = {f"{part}, s": round(taken, 3) for part, taken in clock.seconds.items()}
    print(json.dumps(seconds | {"peak memory, MiB": memory_bytes("VmHWM") / 2**20}))


if __name__ == "__main__":
    main()
