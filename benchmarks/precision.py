"""Training in bfloat16 where the device computes in it: steps beside the same steps in float32.

    python -m benchmarks.precision

ResNet-8 and ResNet-20 on 32-pixel images, batches of 128, one forward and backward pass and one
step of SGD, alternating. On a device without bfloat16 arithmetic both sides are float32.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn import functional as F

from benchmarks.pairs import alternate, median
from pipeline.device import default_device, training_autocast
from pipeline.networks import cifar_resnet

BATCH, CLASSES = 128, 100


def stepper(network: str, device: torch.device, *, by_rule: bool) -> Callable[[int], None]:
    torch.manual_seed(0)
    module = cifar_resnet.build(network, CLASSES, 3).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)
    images = torch.rand(BATCH, 3, 32, 32, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (BATCH,), device=device)

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
    device, found = default_device(), {}
    print(f"{device.type}, {torch.get_num_threads()} threads, {pairs} alternating pairs")
    print("times as fast as float32 (95 %)")
    for network in ("resnet8", "resnet20"):
        ruled, plain = (stepper(network, device, by_rule=rule) for rule in (True, False))
        ours, theirs = alternate(ruled, plain, pairs)
        ratio = median(theirs / ours)
        print(f"{network:>9} {ratio}", flush=True)
        found[network] = ratio.as_list()
    print(json.dumps({"benchmark": "precision", "times_as_fast": found}))


if __name__ == "__main__":
    main()
