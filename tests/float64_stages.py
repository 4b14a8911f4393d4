"""Stages in one process, or in one rank of several, in float64: STAGE[:ARGUMENT] ... on the
command line.

The order of a sum moves a float32's last bit, now and then that moves a ReLU's input across 0, and
a few steps of training make it visible. In float64 one process and several stay together closely
enough to be compared.
"""

import sys
from contextlib import nullcontext

import torch
from conftest import run_stage

from pipeline.compute import device, distributed
from pipeline.compute.device import to_device
from pipeline.stages import student
from pipeline.teacher import accuracy_gate


def relate_rows(student_loss):
    """Add a term to a student's loss that relates the rows of a batch, so that a whole batch and
    its parts differ."""

    def related(params, soft_targets, device):
        loss = student_loss(params, soft_targets, device)

        def loss_of_rows(logits, batch):
            rows, _ = soft_targets(batch.view, batch.samples)
            teacher_logits = to_device(rows, device).to(logits.dtype)
            products = logits @ logits.T - teacher_logits @ teacher_logits.T
            return loss(logits, batch) + 0.01 * products.square().mean()

        return loss_of_rows

    return related


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    device.computes_in_bfloat16 = lambda _: False
    accuracy_gate.check = lambda *_, **__: None  # so few steps teach little
    student.student_loss = relate_rows(student.student_loss)
    with distributed.process_group() as group:
        distributed.process_group = lambda: nullcontext(group)  # a process joins once
        for stage in sys.argv[1:]:
            run_stage(*stage.split(":"))
