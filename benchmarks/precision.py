"""Compare training steps in bfloat16, if the device computes in it, with the same in float32.

    python -m benchmarks.precision

A step is a forward and backward pass and a step of SGD; the sides alternate. ResNet-8 and ResNet-20
train on 32-pixel images in batches of 128; MobileNets of half width on 64 pixels and of full width
on 224, in batches of 32. MobileNets have depthwise convolutions, whose backward pass is slow in
bfloat16 on CPUs: by the rule these compute in float32 there. Both the rule and bfloat16 throughout
are measured. On a device without bfloat16 arithmetic all sides are float32.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.pairs import median, time_interleaved
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


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    pairs = parser.parse_args().pairs
    found: dict[str, dict[str, list[float]]] = {}
    print(f"{default_device().type}, {torch.get_num_threads()} threads, {pairs} rounds")
    print(
        f"times as fast as float32 (95 %) {'bfloat16 throughout':>26}{'depthwise in float32':>28}"
    )
    for case in CASES:
        sides = {
            "float32": stepper(case, build(case), by_rule=False),
            "bfloat16 throughout": stepper(case, build(case), by_rule=True),
        }
        module = build(case)
        depthwise_in_float32(module, default_device())
        if any(isinstance(m, Float32Conv2d) for m in module.modules()):
            sides["depthwise in float32"] = stepper(case, module, by_rule=True)
        times = time_interleaved(sides, pairs)
        plain = times.pop("float32")
        ratios = {name: median(plain / seconds) for name, seconds in times.items()}
        print(f"{case:<32}{''.join(f'{ratio!s:>26}' for ratio in ratios.values())}", flush=True)
        found[case] = {name: ratio.as_list() for name, ratio in ratios.items()}
    print(json.dumps({"benchmark": "precision", "times_as_fast": found}))


if __name__ == "__main__":
    main()
