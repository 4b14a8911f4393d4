"""Stages in one process, or in one rank of several, in float32: STAGE[:ARGUMENT] ... on the
command line.

In bfloat16 the order of a sum shows in the third digit, and a few steps of training make it large:
only in float32 can one process and several be compared closely.
"""

import sys
from contextlib import nullcontext

from conftest import run_stage

from pipeline import device, distributed

if __name__ == "__main__":
    device.computes_in_bfloat16 = lambda _: False
    with distributed.joined() as group:
        distributed.joined = lambda: nullcontext(group)  # a process joins once
        for stage in sys.argv[1:]:
            run_stage(*stage.split(":"))
