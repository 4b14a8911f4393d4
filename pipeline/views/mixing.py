"""mixup and cutmix: which views are mixed, and their mixed pixels."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.views.policy import ViewPolicy
from pipeline.views.random_numbers import (
    CENTRE,
    PARTNER,
    WEIGHT,
    uniform,
    uniform_int,
    view_numbers,
)
from pipeline.views.resampling import counting


@dataclass(frozen=True)
class MixPlan:
    """Partners and shares of B samples: mixup mixes by weight, cutmix by area."""

    partners: np.ndarray  # [B] int64, sample numbers
    weights: np.ndarray  # [B] float32, the share of the sample itself, and of its label
    boxes: np.ndarray | None  # cutmix: [B, 4] int64, top, left, bottom, right: the partner's pixels


def plan_mix(
    policy: ViewPolicy, seed: int, view: int, samples: np.ndarray, num_samples: int, image_size: int
) -> MixPlan | None:
    """Choose the partners of a view's samples; None if the policy does not mix.

    A partner is any other sample of the split. The share of the sample itself follows
    Beta(alpha, alpha). mixup (Zhang et al. 2018, arXiv:1710.09412) rounds it to 1/256; in cutmix
    (Yun et al. 2019, arXiv:1905.04899) it is the area outside the box, clipped at the borders.

    Args:
        num_samples: of the split. A sample that is alone is its own partner.
    """
    if policy.mix is None:
        return None
    from scipy.special import betaincinv  # noqa: PLC0415  (few policies mix)

    method, alpha = policy.mix
    steps = uniform_int(view_numbers(PARTNER, seed, view, samples, 1)[0], max(1, num_samples - 1))
    partners = (samples + 1 + steps) % num_samples
    shares = betaincinv(alpha, alpha, uniform(view_numbers(WEIGHT, seed, view, samples, 1)[0]))
    if method == "mixup":
        return MixPlan(partners, (np.rint(256 * shares) / 256).astype(np.float32), None)
    half = (image_size * np.sqrt(1 - shares)).astype(np.int64) // 2
    centres = uniform_int(view_numbers(CENTRE, seed, view, samples, 2), image_size)  # [2, B]
    begin, end = np.maximum(0, centres - half), np.minimum(image_size, centres + half)
    outside = 1 - (end - begin).prod(0) / image_size**2
    return MixPlan(partners, outside.astype(np.float32), np.concatenate([begin, end]).T)


def apply_mix(
    pixels: Tensor, partner_pixels: Tensor, weights: Tensor, boxes: Tensor | None
) -> Tensor:
    """Mix views with their partners' views; all [B, C, S, S] uint8. `weights` and `boxes` are those
    of a MixPlan, on the device of the views."""
    if boxes is None:  # multiples of 1/256 below 256: exact in float32
        weights = weights[:, None, None, None]
        mixed = pixels.float().mul_(weights).addcmul_(partner_pixels.float(), 1 - weights)
        return mixed.add_(0.5).to(torch.uint8)
    top, left, bottom, right = boxes.T[:, :, None, None, None]
    along = counting(pixels.shape[-1], 1, pixels.device)
    rows = (along[:, None] >= top) & (along[:, None] < bottom)  # [B, 1, S, 1]
    columns = (along >= left) & (along < right)  # [B, 1, 1, S]
    return torch.where(rows & columns, partner_pixels, pixels)
