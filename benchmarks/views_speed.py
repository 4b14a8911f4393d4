"""Compare making views, whole batches in exact arithmetic, with torchvision image by image.

    OMP_NUM_THREADS=1 python -m benchmarks.views_speed

Each policy at 32 and at 224 pixels, from uint8 images of that size in memory to one batch of views.
torchvision runs its v2 transforms of the same name on uint8 tensors, one image at a time like a
dataset in a DataLoader, and stacks them; it runs MixUp and CutMix on the whole batch.
"""

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torchvision.transforms import v2

from benchmarks.harness import Row, alternate, median, run_benchmark
from pipeline.compute.device import default_device
from pipeline.views.loader import make_views
from pipeline.views.policy import ViewPolicy

BATCH = {32: 256, 224: 32}  # by the side in pixels
POLICIES = (
    "crop_flip",
    "random_resized_crop",
    "crop_flip+rand_augment(2,9)",
    "random_resized_crop+rand_augment(2,9)",
    "random_resized_crop+mixup(0.2)",
    "random_resized_crop+cutmix(1.0)",
)


def ours(policy: ViewPolicy, images: torch.Tensor, device: torch.device) -> Callable[[int], None]:
    samples = np.arange(len(images))

    def make(number: int = 0) -> None:
        (batch,) = make_views(images, policy, 0, number, [samples], device)
        batch.pixels[0].sum().item()  # waits

    return make


def theirs(policy: ViewPolicy, images: torch.Tensor) -> Callable[[int], None]:
    size = images.shape[-1]
    crop = {
        "crop_flip": lambda: v2.RandomCrop(size, padding=4),
        "random_resized_crop": lambda: v2.RandomResizedCrop(size, antialias=True),
    }[policy.geometry]
    augment = [v2.RandAugment(*policy.rand_augment)] if policy.rand_augment else []
    transform = v2.Compose([crop(), v2.RandomHorizontalFlip(), *augment])
    labels = torch.zeros(len(images), dtype=torch.int64)
    mix = None
    if policy.mix is not None:
        method, alpha = policy.mix
        mix = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[method](alpha=alpha, num_classes=2)

    def make(_: int = 0) -> None:
        views = torch.stack([transform(image) for image in images])
        if mix is not None:
            mix(views.float(), labels)

    return make


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    device = default_device()
    torch.manual_seed(0)
    for size, batch in BATCH.items():
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
        for text in POLICIES:
            policy = ViewPolicy.parse(text)
            sides = {
                "ours": ours(policy, images.to(device), device),
                "theirs": theirs(policy, images),
            }
            times = alternate(sides, arguments.pairs)
            yield {
                "policy": text,
                "pixels": size,
                "images/s": batch / median(times["ours"]).median,
                "over torchvision": median(times["theirs"] / times["ours"]),
            }


def main() -> None:
    run_benchmark(__doc__, measure, pairs=(100, "for each policy and size"))


if __name__ == "__main__":
    main()
