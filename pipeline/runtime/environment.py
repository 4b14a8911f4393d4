"""Environment variables by which users and the pipeline's own processes set how work is shared."""

import os

from pipeline.runtime.errors import positive_int

#: The number of seeds that a stage trains at once.
SEED_JOBS = "SEED_JOBS"
#: The number of stages that run at once on this machine.
JOBS = "TEACH_ONCE_JOBS"
#: The stage of which this process trains one seed.
OF_STAGE = "TEACH_ONCE_STAGE"
#: The process of `pipeline.commands.repro`, for those it starts.
REPRO = "TEACH_ONCE_REPRO"
#: The process that launched the ones that share a stage, or its seeds.
LAUNCHER = "TEACH_ONCE_LAUNCHER"


def process_count() -> int:
    """Read PROCESSES, the number of processes that share a training on this machine.

    Raises:
        UserError: it is no number, or less than 1.
    """
    text = os.environ.get("PROCESSES") or "1"
    return positive_int(text, "PROCESSES", "the number of processes to start on this machine")
