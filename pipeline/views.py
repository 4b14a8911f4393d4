"""Views of a split's samples, batch by batch, on the device where they are trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import apply_views
from pipeline.dataset import Split


@dataclass(frozen=True)
class Batch:
    samples: np.ndarray  # [B] sample numbers
    pixels: Tensor  # [B, C, H, W] uint8, on the device
    partners: np.ndarray | None = None  # [B] sample numbers, of mixed views
    weights: np.ndarray | None = None  # [B] float32, of the sample itself


class Views:
    """Every view of a split whose images are of the views' size and lie in memory."""

    def __init__(self, split: Split, policy: str, seed: int, device: torch.device):
        self._images = torch.from_numpy(split.images).to(device)
        self._policy, self._seed = policy, seed

    def batches(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One view of the samples of each batch, in this order."""
        for samples in order:
            images = self._images[samples]
            yield Batch(samples, apply_views(images, self._policy, self._seed, view, samples))
