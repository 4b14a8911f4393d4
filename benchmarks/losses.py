"""Measure the cost of each method's loss as a fraction of a training step of the student.

    python -m benchmarks.losses

A loss runs forward, and backward to the student's logits. A step is that of a ResNet-20 at 32
pixels (forward, cross-entropy, backward, SGD), batch 128, 100 classes. Both run in alternating
pairs.
"""

import argparse
from collections.abc import Iterator

import torch

from benchmarks.harness import Row, alternate, median, run_benchmark
from benchmarks.precision import CASES, CLASSES, build, stepper
from pipeline.compute.device import default_device
from pipeline.distillation.objective import method_loss
from pipeline.distillation.params import METHODS, DistillationParams

STUDENT = "ResNet-20"  # of benchmarks.precision


def variants() -> dict[str, DistillationParams]:
    """Each method with its defaults, and standardised if it has that option."""
    models = {name: model for name, model in METHODS.items() if not model.needs_pairs}
    plain = {name: model(method=name) for name, model in models.items()}
    standardized = {
        f"{name}, standardize": model(method=name, standardize=True)
        for name, model in models.items()
        if "standardize" in model.model_fields
    }
    return plain | standardized


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    device, batch = default_device(), CASES[STUDENT][-1]
    step = stepper(STUDENT, build(STUDENT), by_rule=True)
    student = torch.randn(batch, CLASSES, device=device, requires_grad=True)
    teacher = 3 * torch.randn(batch, CLASSES, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)
    for name, params in variants().items():
        loss = method_loss(params)
        tensors = {"labels": labels} if params.needs_labels else {}

        def learn(_: int, loss=loss, tensors=tensors) -> None:
            student.grad = None
            loss(student, teacher, **tensors).backward()
            student.grad[0, 0].item()  # waits for the device

        times = alternate({"loss": learn, "step": step}, arguments.pairs)
        yield {"method": name, "fraction of a step": median(times["loss"] / times["step"])}


def main() -> None:
    run_benchmark(__doc__, measure, pairs=(100, "of a loss and a step"))


if __name__ == "__main__":
    main()
