"""One view of a few images for every kind of policy; as a program, prints their digests.

The program has other threads and another precision of networks than the tests.
"""

import hashlib
import json

import numpy as np
import torch

from pipeline.runtime.derived_random import hash64
from pipeline.views.loader import Batch, make_views
from pipeline.views.policy import ViewPolicy

TEXTS = [
    "none",
    "crop",
    "crop_flip",
    "random_resized_crop",
    "none+rand_augment(3,30)",
    "random_resized_crop+rand_augment(2,9)",
    "none+mixup(1.0)",
    "crop+cutmix(1.0)",
    "random_resized_crop+rand_augment(2,9)+mixup(0.2)",
    "random_resized_crop+rand_augment(1,15)+cutmix(0.5)",
]


def images(channels: int = 3, size: int = 16, count: int = 40) -> torch.Tensor:
    """Noise with other levels in every image, from hash64: generators may change."""
    numbers = hash64(np.arange(count * channels * size**2)).reshape(count, channels, size, size)
    ranges = hash64(1, np.arange(count)) % np.uint64(255) + np.uint64(2)
    return torch.from_numpy((numbers % ranges[:, None, None, None]).astype(np.uint8))


def views(text: str, samples: np.ndarray, everything: torch.Tensor | None = None) -> Batch:
    everything = images() if everything is None else everything
    policy = ViewPolicy.parse(text)
    return next(make_views(everything, policy, 3, 1, [samples], torch.device("cpu")))


def digests() -> dict[str, str]:
    samples = np.arange(40)
    return {
        text: hashlib.sha256(views(text, samples).pixels.numpy()).hexdigest()[:16] for text in TEXTS
    }


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16):
        print(json.dumps(digests()))
