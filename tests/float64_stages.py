"""Stages in one process, or in one rank of several, in float64: STAGE[:ARGUMENT] ... on the
command line.

The order of a sum moves a float32's last bit, now and then that moves a ReLU's input across 0, and
a few steps of training make it visible. In float64 one process and several stay together closely
enough to be compared.
"""

import sys
from contextlib import nullcontext
from dataclasses import replace

import torch
from conftest import run_stage

from pipeline.compute import device, distributed
from pipeline.stages import student
from pipeline.teacher import accuracy_gate


def relate_rows(run):
    """A student's loss gets a term that relates the rows of a batch, and so tells a whole batch
    from its parts."""

    def related(name, params, training, dataset, lesson, *others):
        def loss(student_logits, teacher_logits, *rest):
            products = student_logits @ student_logits.T - teacher_logits @ teacher_logits.T
            own = lesson.distillation_loss(student_logits, teacher_logits, *rest)
            return own + 0.01 * products.square().mean()

        run(name, params, training, dataset, replace(lesson, distillation_loss=loss), *others)

    return related


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    device.computes_in_bfloat16 = lambda _: False
    accuracy_gate.check = lambda *_, **__: None  # so few steps teach little
    student.run = relate_rows(student.run)
    with distributed.process_group() as group:
        distributed.process_group = lambda: nullcontext(group)  # a process joins once
        for stage in sys.argv[1:]:
            run_stage(*stage.split(":"))
