"""Run stages in float64, in one process or in several ranks, forked when everything is loaded.

    python tests/float64_stages.py [--ranks N] [--relate-rows] STAGE[:ARGUMENT] ...

The order of a sum changes the last bit of a float32; a few training steps can turn that bit into a
visible difference. In float64 the results stay close enough to be compared: one process with
several, one machine or one version of the code with another.
"""

import os
import socket
import sys
from contextlib import nullcontext

import torch
from conftest import run_stage

from pipeline.compute import device, distributed
from pipeline.compute.device import to_device
from pipeline.distillation import objective
from pipeline.teacher import accuracy_gate


def relate_rows(student_loss):
    """Add a term to a student's loss that relates the rows of a batch, so that a whole batch and
    its parts differ."""

    def related(params, soft_targets, device, stored, steps):
        loss = student_loss(params, soft_targets, device, stored, steps)

        def loss_of_rows(logits, batch):
            rows, _ = soft_targets(batch.view, batch.samples)
            teacher_logits = to_device(rows, device).to(logits.dtype)
            products = logits @ logits.T - teacher_logits @ teacher_logits.T
            return loss(logits, batch) + 0.01 * products.square().mean()

        return loss_of_rows

    return related


def fork(ranks: int) -> list[int]:
    """Fork this process, rank 0, into so many; returns the others on rank 0. Rank 0 prints to
    standard output alone, the others to standard error alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    others = []
    for rank in range(1, ranks):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        others.append(os.fork())
        if others[-1] == 0:
            os.dup2(2, 1)
            return []
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    os.dup2(1, 2)
    return others


if __name__ == "__main__":
    device.computes_in_bfloat16 = lambda _: False
    accuracy_gate.check = lambda *_, **__: None  # so few steps teach little
    stages, others = sys.argv[1:], []
    if stages[0] == "--ranks":
        others, stages = fork(int(stages[1])), stages[2:]
    if stages[0] == "--relate-rows":
        objective.student_loss = relate_rows(objective.student_loss)
        stages = stages[1:]
    with distributed.process_group() as group:
        distributed.process_group = lambda: nullcontext(group)  # a process joins once
        for stage in stages:
            exports = stage.startswith("export")  # the file computes in float32
            torch.set_default_dtype(torch.float32 if exports else torch.float64)
            run_stage(*stage.split(":"))
    if any(os.waitpid(process, 0)[1] for process in others):
        sys.exit("another rank failed")
