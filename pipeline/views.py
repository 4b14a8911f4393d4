"""Views of a split's samples, as the teacher labels them and students train on them.

Contract code: an edit here runs the teacher again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Not at their first use: scratch.py lists the code that is loaded before there is a view.
from pipeline import rand_augment, resampling  # noqa: F401
from pipeline.augment import Policy, apply_views, mix, mixing
from pipeline.dataset import Split


@dataclass(frozen=True)
class Batch:
    samples: np.ndarray  # [B] sample numbers
    pixels: Tensor  # [B, C, H, W] uint8, on the device
    partners: np.ndarray | None = None  # [B] sample numbers: of a policy that mixes two views
    weights: Tensor | None = None  # [B] float32, on the device: the share of the sample itself


def view_of(
    images: Tensor,
    policy: Policy,
    seed: int,
    view: int,
    samples: np.ndarray,
    device: torch.device | str = "cpu",
) -> Batch:
    """One view of some samples, mixed with their partners' views where the policy mixes.

    Args:
        images: [N, C, S, S] uint8, all of the split's, on the device or not.
        samples: [B] sample numbers.
    """

    def alone(samples: np.ndarray) -> Tensor:
        return apply_views(images[samples].to(device), policy, seed, view, samples)

    plan = mixing(policy, seed, view, samples, len(images), images.shape[-1])
    if plan is None:
        return Batch(samples, alone(samples))
    pixels = mix(alone(samples), alone(plan.partners), plan)
    return Batch(samples, pixels, plan.partners, torch.from_numpy(plan.weights).to(device))


class Views:
    """Every view of a split whose images are of the views' size and lie in memory."""

    def __init__(self, split: Split, policy: Policy, seed: int, device: torch.device):
        self._images = torch.from_numpy(split.images).to(device)
        self._policy, self._seed, self._device = policy, seed, device

    def batches(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One view of the samples of each batch, in this order."""
        for samples in order:
            yield view_of(self._images, self._policy, self._seed, view, samples, self._device)
