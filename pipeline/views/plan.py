"""The view plan: a pure function of (policy, seed, view, sample), from parameters to pixels.

Views are derived, never drawn: the same uint8 pixels come out for any batch size, order, worker
or process, on any device. Views are numbered from 0 without end; a policy with finitely many views
visits each of them once per cycle, in an order of its own for every sample and every cycle.

Contract code: an edit here runs the teacher again. The modules that move pixels are imported where
they are needed, for they load torch, and parameters are to be checked without waiting for that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
from pipeline.runtime.derived_random import hash64

PADDING = 4  # pixels on every side, filled with black
_SHIFTS = 2 * PADDING + 1

#: Number of distinct views of each geometry; None: no end.
POLICIES: dict[str, int | None] = {
    "none": 1,
    "crop": _SHIFTS**2,
    "crop_flip": 2 * _SHIFTS**2,
    "random_resized_crop": None,
}


@dataclass(frozen=True)
class ViewPolicy:
    """How a view is made: its geometry, then RandAugment, then a mix with another sample's view."""

    geometry: str  # one of POLICIES
    rand_augment: tuple[int, int] | None = None  # (operations, magnitude 0 ... 30)
    mix: tuple[str, float] | None = None  # (mixup | cutmix, alpha of Beta(alpha, alpha))

    def __str__(self) -> str:
        """As a store names it: `crop_flip`, `crop+rand_augment(2,9)+mixup(0.2)`."""
        text = self.geometry
        if self.rand_augment is not None:
            text += "+rand_augment({},{})".format(*self.rand_augment)
        if self.mix is not None:
            text += f"+{self.mix[0]}({self.mix[1]!r})"
        return text

    @classmethod
    def parse(cls, text: str) -> ViewPolicy:
        """Raises: ValueError: not the text of any policy."""
        geometry, augmented = f"({'|'.join(POLICIES)})", r"(\+rand_augment\((\d+),(\d+)\))?"
        mixed = r"(\+(mixup|cutmix)\((\d+(?:\.\d+)?(?:e[+-]\d+)?)\))?"
        found = re.fullmatch(geometry + augmented + mixed, text)
        if found is not None:
            name, augmented, operations, magnitude, mixed, method, alpha = found.groups()
            rand_augment = (int(operations), int(magnitude)) if augmented else None
            policy = cls(name, rand_augment, (method, float(alpha)) if mixed else None)
        if found is None or str(policy) != text:
            raise ValueError(f"{text!r} is no view policy")
        return policy

    @property
    def distinct(self) -> int | None:
        """Number of distinct views of a sample; None: no end."""
        return None if self.rand_augment or self.mix else POLICIES[self.geometry]


_SHUFFLE_ROUNDS = 24


def view_entries(geometry: str, seed: int, view: int, samples: np.ndarray) -> np.ndarray:
    """Which of the geometry's distinct views is view number `view` of each sample.

    For a fixed sample, views c*D ... c*D + D-1 of a policy with D distinct views are a
    permutation of range(D), keyed by (seed, sample, cycle c): a swap-or-not shuffle
    (Hoang, Morris, Rogaway 2012, arXiv:1208.1176), which needs no table.

    Args:
        samples: [B] sample numbers.

    Returns:
        [B] int64 in [0, POLICIES[geometry]).
    """
    distinct = POLICIES[geometry]
    cycle, position = divmod(view, distinct)
    key = hash64(seed, cycle, samples)  # [B]
    entry = np.full(np.shape(samples), position, np.int64)
    for shuffle_round in range(_SHUFFLE_ROUNDS):
        pivot = (hash64(key, shuffle_round) % np.uint64(distinct)).astype(np.int64)
        partner = (pivot - entry) % distinct
        swap = hash64(key, shuffle_round, np.maximum(entry, partner)) & np.uint64(1)
        entry = np.where(swap == 1, partner, entry)
    return entry


# What a number is for: the last word of the key that all numbers of one purpose hang from.
_BOX, _MIRROR, _RAND_AUGMENT, _PARTNER, _WEIGHT, _CENTRE = range(1, 7)

_AREAS = (0.08, 1.0)  # shares of the image's
_LOG_RATIO = 0.28768207245178096  # of 4/3: widths are 3/4 to 4/3 of heights
_TRIES = 10


def _numbers(purpose: int, seed: int, view: int, samples: np.ndarray, count: int) -> np.ndarray:
    """[count, B] uint64, independent and uniform."""
    return hash64(hash64(seed, view, samples, purpose), np.arange(count)[:, None])


def _uniform(numbers: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1): the first 53 bits."""
    return (numbers >> np.uint64(11)) * 2.0**-53


def _uniform_int(numbers: np.ndarray, count: int | np.ndarray) -> np.ndarray:
    """uint64 -> int64 in [0, count)."""
    return (numbers % np.asarray(count).astype(np.uint64)).astype(np.int64)


def crop_boxes(
    policy: ViewPolicy, seed: int, view: int, samples: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """What `random_resized_crop` cuts out of each image, and resizes to the view's size.

    An area of 8 to 100 % of the image's, the ratio of width to height log-uniform in 3/4 to 4/3;
    of 10 tries, the first that fits into the image, anywhere in it; else the middle of the image,
    of the ratio that is nearest to its own (as torchvision.transforms.RandomResizedCrop, after
    Szegedy et al. 2015, arXiv:1409.4842).

    Args:
        samples: [B] sample numbers.
        sizes: [B, 2] height and width of their images in pixels.

    Returns:
        [B, 4] int64: top, left, height, width.
    """
    assert policy.geometry == "random_resized_crop"
    heights, widths = np.asarray(sizes, np.int64).T
    numbers = _numbers(_BOX, seed, view, samples, 4 * _TRIES)
    numbers = numbers.reshape(_TRIES, 4, len(samples))
    least, most = _AREAS
    areas = (least + (most - least) * _uniform(numbers[:, 0])) * (heights * widths)
    ratios = _exp(_LOG_RATIO * (2 * _uniform(numbers[:, 1]) - 1))
    wide = np.rint(np.sqrt(areas * ratios)).astype(np.int64)  # [tries, B]
    high = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (wide > 0) & (wide <= widths) & (high > 0) & (high <= heights)
    chosen, each = fits.argmax(0), np.arange(len(samples))
    wide, high, numbers = wide[chosen, each], high[chosen, each], numbers[chosen, :, each]
    found = fits.any(0)
    # The middle: a whole image within the ratios, else as much of its longer side as they allow.
    wide = np.where(found, wide, np.minimum(widths, np.rint(heights * 4 / 3).astype(np.int64)))
    high = np.where(found, high, np.minimum(heights, np.rint(widths * 4 / 3).astype(np.int64)))
    spare_rows, spare_columns = heights - high, widths - wide
    top = np.where(found, _uniform_int(numbers[:, 2], spare_rows + 1), spare_rows // 2)
    left = np.where(found, _uniform_int(numbers[:, 3], spare_columns + 1), spare_columns // 2)
    return np.stack([top, left, high, wide], 1)


def _exp(x: np.ndarray) -> np.ndarray:
    """e**x for |x| <= 0.3, by additions, products and quotients, which every processor rounds
    alike: libraries' exponentials differ in the last bit."""
    total = np.ones_like(x)
    for n in range(14, 0, -1):
        total = 1 + x * total / n
    return total


def flips(policy: ViewPolicy, seed: int, view: int, samples: np.ndarray) -> np.ndarray:
    """[B] bool: whether the view is mirrored, of `random_resized_crop`, every other one."""
    assert policy.geometry == "random_resized_crop"
    return _numbers(_MIRROR, seed, view, samples, 1)[0] % 2 == 1


def apply_views(
    images: Tensor, policy: ViewPolicy, seed: int, view: int, samples: np.ndarray
) -> Tensor:
    """One view of each image: geometry and RandAugment. `mix` is another step, for it needs the
    views of other samples.

    Args:
        images: [B, C, S, S] uint8, the images of `samples`.
        samples: [B] sample numbers.

    Returns:
        [B, C, S, S] uint8, on the images' device.
    """
    return photometry(_geometry(images, policy, seed, view, samples), policy, seed, view, samples)


def _geometry(
    images: Tensor, policy: ViewPolicy, seed: int, view: int, samples: np.ndarray
) -> Tensor:
    if policy.geometry == "none":
        return images
    if policy.geometry == "random_resized_crop":
        from pipeline.views.resampling import resize_boxes  # noqa: PLC0415

        size = images.shape[-1]
        cut = crop_boxes(policy, seed, view, samples, np.full((len(samples), 2), size))
        flip = flips(policy, seed, view, samples)
        return resize_boxes(images, cut, flip, size)
    entries = view_entries(policy.geometry, seed, view, samples)
    flip, shift = np.divmod(entries, _SHIFTS**2)  # `crop` has no entry that flips
    top, left = np.divmod(shift, _SHIFTS)
    return _crop_and_flip(images, top, left, flip)


def _crop_and_flip(images: Tensor, top: np.ndarray, left: np.ndarray, flip: np.ndarray) -> Tensor:
    batch, channels, height, width = images.shape
    padded = images.new_zeros(batch, channels, height + 2 * PADDING, width + 2 * PADDING)
    padded[:, :, PADDING:-PADDING, PADDING:-PADDING] = images
    if images.device.type == "cpu":
        return _windows_one_by_one(padded, top, left, flip)
    return _windows_at_once(padded, top, left, flip)


def _windows_one_by_one(
    padded: Tensor, top: np.ndarray, left: np.ndarray, flip: np.ndarray
) -> Tensor:
    """Copies of rows: on a CPU 3 (32 pixels) to 6 times (224) as fast as an index of all."""
    views = padded.new_empty(*padded.shape[:2], *(s - 2 * PADDING for s in padded.shape[2:]))
    height, width = views.shape[2:]
    source, target = padded.numpy(), views.numpy()
    for i, (y, x, mirror) in enumerate(
        zip(top.tolist(), left.tolist(), flip.tolist(), strict=True)
    ):
        window = source[i, :, y : y + height, x : x + width]
        target[i] = window[:, :, ::-1] if mirror else window
    return views


def _windows_at_once(padded: Tensor, top: np.ndarray, left: np.ndarray, flip: np.ndarray) -> Tensor:
    import torch  # noqa: PLC0415

    height, width = (side - 2 * PADDING for side in padded.shape[2:])
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 9, 9, H, W], no copy
    rows, top, left, flip = (
        torch.from_numpy(part).to(padded.device, non_blocking=True)
        for part in (np.arange(len(padded)), top, left, flip)
    )
    views = windows[rows, :, top, left]  # [B, C, H, W]
    return torch.where(flip[:, None, None, None] > 0, views.flip(3), views)


def photometry(
    pixels: Tensor, policy: ViewPolicy, seed: int, view: int, samples: np.ndarray
) -> Tensor:
    """What comes after the geometry: RandAugment, operation by operation, each of any of the 14.

    Args:
        pixels: [B, C, S, S] uint8, the views of `samples` as their geometry leaves them.

    Returns:
        [B, C, S, S] uint8, on the same device.
    """
    if policy.rand_augment is None:
        return pixels
    from pipeline.views.rand_augment import OPERATIONS, apply  # noqa: PLC0415

    count, magnitude = policy.rand_augment
    numbers = _numbers(_RAND_AUGMENT, seed, view, samples, 2 * count)
    for operation, sign in zip(numbers[::2], numbers[1::2], strict=True):
        signs = 1 - 2 * _uniform_int(sign, 2)
        operations = _uniform_int(operation, len(OPERATIONS))
        pixels = apply(pixels, operations, signs, magnitude)
    return pixels


@dataclass(frozen=True)
class MixPlan:
    """Which views are mixed, and how: of mixup by weight, of cutmix by area."""

    partners: np.ndarray  # [B] int64, sample numbers
    weights: np.ndarray  # [B] float32, the share of the sample itself, and of its label
    boxes: np.ndarray | None  # cutmix: [B, 4] int64, top, left, bottom, right: the partner's pixels


def plan_mix(
    policy: ViewPolicy, seed: int, view: int, samples: np.ndarray, num_samples: int, image_size: int
) -> MixPlan | None:
    """The partners of a view's samples; None for a policy that does not mix.

    A partner is any other sample of the split. The share of the sample itself follows
    Beta(alpha, alpha): in mixup (Zhang et al. 2018, arXiv:1710.09412) rounded to 1/256, in cutmix
    (Yun et al. 2019, arXiv:1905.04899) what the box leaves, clipped at the image's borders.

    Args:
        num_samples: of the split. A sample that is alone has itself as its partner.
        image_size: side of a view in pixels.
    """
    if policy.mix is None:
        return None
    from scipy.special import betaincinv  # noqa: PLC0415

    method, alpha = policy.mix
    others = _uniform_int(_numbers(_PARTNER, seed, view, samples, 1)[0], max(1, num_samples - 1))
    partners = (samples + 1 + others) % num_samples
    shares = betaincinv(alpha, alpha, _uniform(_numbers(_WEIGHT, seed, view, samples, 1)[0]))
    if method == "mixup":
        return MixPlan(partners, (np.rint(256 * shares) / 256).astype(np.float32), None)
    half = (image_size * np.sqrt(1 - shares)).astype(np.int64) // 2
    centres = _uniform_int(_numbers(_CENTRE, seed, view, samples, 2), image_size)  # [2, B]
    begin, end = np.maximum(0, centres - half), np.minimum(image_size, centres + half)
    left = 1 - (end - begin).prod(0) / image_size**2
    return MixPlan(partners, left.astype(np.float32), np.concatenate([begin, end]).T)


def apply_mix(pixels: Tensor, partner_pixels: Tensor, mixing: MixPlan) -> Tensor:
    """Views and their partners' views, [B, C, S, S] uint8 each, mixed."""
    import torch  # noqa: PLC0415

    device = pixels.device
    if mixing.boxes is None:  # multiples of 1/256 below 256: exact in float32
        weights = torch.from_numpy(mixing.weights).to(device, non_blocking=True)[
            :, None, None, None
        ]
        mixed = pixels.float().mul_(weights).addcmul_(partner_pixels.float(), 1 - weights)
        return mixed.add_(0.5).to(torch.uint8)
    edges = torch.from_numpy(mixing.boxes).to(device, non_blocking=True).T
    top, left, bottom, right = edges[:, :, None, None, None]
    along = torch.arange(pixels.shape[-1], device=device)
    rows = (along[:, None] >= top) & (along[:, None] < bottom)  # [B, 1, S, 1]
    columns = (along >= left) & (along < right)  # [B, 1, 1, S]
    return torch.where(rows & columns, partner_pixels, pixels)
