"""Measure the cost of each method's loss as a fraction of a training step of the student.

    python -m benchmarks.losses

A loss runs forward, and backward to the student's logits. A step is that of a ResNet-20 at 32
pixels (forward, cross-entropy, backward, SGD), batch 128, 100 classes. Both run in alternating
pairs.
"""

import argparse
import json

import torch

from benchmarks.pairs import alternate, median
from benchmarks.precision import CASES, CLASSES, build, stepper
from pipeline.compute.device import default_device
from pipeline.distillation.objective import method_loss
from pipeline.distillation.params import METHODS, DistillationParams

STUDENT = "ResNet-20"  # of benchmarks.precision


def variants() -> dict[str, DistillationParams]:
    """Each method with its defaults, and standardised if it has that option."""
    plain = {name: model(method=name) for name, model in METHODS.items()}
    standardized = {
        f"{name}, standardize": model(method=name, standardize=True)
        for name, model in METHODS.items()
        if "standardize" in model.model_fields
    }
    return plain | standardized


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.losses", description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    pairs = parser.parse_args().pairs
    device, found = default_device(), {}
    batch = CASES[STUDENT][-1]
    step = stepper(STUDENT, build(STUDENT), by_rule=True)
    student = torch.randn(batch, CLASSES, device=device, requires_grad=True)
    teacher = 3 * torch.randn(batch, CLASSES, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)
    print(f"{device.type}, {torch.get_num_threads()} threads, {pairs} alternating pairs")
    print("loss and gradient as a fraction of a ResNet-20 step (95 %)")
    for name, params in variants().items():
        loss = method_loss(params)
        tensors = {"labels": labels} if params.needs_labels else {}

        def learn(_: int, loss=loss, tensors=tensors) -> None:
            student.grad = None
            loss(student, teacher, **tensors).backward()
            student.grad[0, 0].item()  # waits for the device

        learn(0)
        times, steps = alternate(learn, step, pairs)
        ratio = median(times / steps)
        print(f"{name:>20} {ratio}", flush=True)
        found[name] = ratio.as_list()
    print(json.dumps({"benchmark": "losses", "fraction_of_a_step": found}))


if __name__ == "__main__":
    main()
