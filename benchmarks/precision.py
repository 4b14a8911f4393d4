"""Compare training steps in bfloat16, if the device computes in it, with the same in float32.

    python -m benchmarks.precision

A step is a forward and backward pass and a step of SGD; the sides alternate. ResNet-8 and ResNet-20
train on 32-pixel images in batches of 128; MobileNets of half width on 64 pixels and of full width
on 224, in batches of 32. MobileNets have depthwise convolutions, whose backward pass is slow in
bfloat16 on CPUs: by the rule these compute in float32 there. Both the rule and bfloat16 throughout
are measured. On a device without bfloat16 arithmetic all sides are float32.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.harness import Row, alternate, median, run_benchmark
from pipeline.compute.device import (
    Float32Conv2d,
    default_device,
    depthwise_in_float32,
    training_autocast,
)
from pipeline.networks import cifar_resnet, torchvision

CLASSES = 100
#: name -> (family, network, its options, pixels, batch size)
CASES = {
    "ResNet-8": (cifar_resnet, "resnet8", {}, 32, 128),
    "ResNet-20": (cifar_resnet, "resnet20", {}, 32, 128),
    "MobileNetV2 x 0.5, 64 pixels": (torchvision, "mobilenet_v2", {"width_mult": 0.5}, 64, 32),
    "MobileNetV3-small, 224 pixels": (torchvision, "mobilenet_v3_small", {}, 224, 32),
}


def build(case: str) -> nn.Module:
    family, network, options, _, _ = CASES[case]
    torch.manual_seed(0)
    module = family.build(network, CLASSES, 3, **options)
    return module.to(default_device(), memory_format=torch.channels_last)


def stepper(case: str, module: nn.Module, *, by_rule: bool) -> Callable[[int], None]:
    (_, _, _, size, batch), device = CASES[case], default_device()
    optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)
    images = torch.rand(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,), device=device)

    def step(_: int = 0) -> None:
        with training_autocast(device) if by_rule else nullcontext():
            logits = module(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device

    for _ in range(3):
        step()
    return step


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    for case in CASES:
        sides = {
            "float32": stepper(case, build(case), by_rule=False),
            "bfloat16": stepper(case, build(case), by_rule=True),
        }
        module = build(case)
        depthwise_in_float32(module, default_device())
        if any(isinstance(m, Float32Conv2d) for m in module.modules()):
            sides["by rule"] = stepper(case, module, by_rule=True)
        times = alternate(sides, arguments.pairs)
        ruled = times.get("by rule")
        yield {
            "times as fast as float32": case,
            "bfloat16 throughout": median(times["float32"] / times["bfloat16"]),
            "by the rule": "the same" if ruled is None else median(times["float32"] / ruled),
        }


def main() -> None:
    run_benchmark(__doc__, measure, pairs=(100, "rounds"))


if __name__ == "__main__":
    main()
