"""RandAugment's operations on batches of uint8 images, in exact arithmetic.

The operations, their order and their strengths are torchvision's (`transforms.RandAugment`, 31
magnitudes, nearest neighbours, black outside), after Cubuk et al. 2020, arXiv:1909.13719. Each is
computed in integers (formulas: docs/soft_targets_format.md), or in float32 if all values are
multiples of 2**-14 below 2**9, which float32 holds exactly. So a pixel depends on its image alone,
on no batch, order or device. Imports nothing of ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

_ONE = 2**14
_GREY = (4899, 9617, 1868)  # weights of red, green and blue, in units of 1 / 2**14
_UNIT = 2**16  # 1 in the coefficients of affine maps

#: In torchvision's order, by which random numbers choose.
OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness", "posterize", "solarize"),
    *("auto_contrast", "equalize"),
)


@dataclass(frozen=True)
class AugmentPlan:
    """The operations of a batch of B images, R of each image.

    Before each of the R rounds the images are put in the order of their operations, so that images
    of one operation, and operations of one kind, are neighbours: slices, which cost no copy.
    """

    magnitude: int  # 0 ... 30
    moves: Tensor  # [R + 1, B] int64: where each image is before the move; the last restores order
    strengths: Tensor  # [R, B, 7] int32, in the order of the round: see `_strengths`
    counts: Sequence[Sequence[int]]  # [R, 14]: images of each operation, in the order of `_SORTED`


def plan(
    operations: np.ndarray, signs: np.ndarray, sizes: Sequence[int], magnitude: int, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Plan the operations of all images of some batches.

    Args:
        operations: [R, N] integers, indices into OPERATIONS, batch after batch.
        signs: [R, N] integers, -1 or 1: the direction, for operations that have one.
        sizes: of the batches; their sum is N.
        magnitude: 0 ... 30.
        side: of the images in pixels.

    Returns:
        `moves` [R + 1, N] and `strengths` [R, N, 7] as in AugmentPlan, batch after batch, and
        `counts` [batches, R, 14].
    """
    table = _strengths(magnitude, side)
    batch = np.repeat(np.arange(len(sizes)), sizes)  # [N]
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)  # [N], of its batch
    place = np.arange(len(batch))  # of each image
    moves, strengths, counts = [], [], []
    for operation, sign in zip(operations, signs, strict=True):
        rank = _RANKS[operation]
        order = np.lexsort((rank, batch))
        moves.append(place[order] - first)
        strengths.append(table[operation, (sign + 1) // 2][order])
        place = np.argsort(order)
        kinds = len(OPERATIONS)
        counted = np.bincount(batch * kinds + rank, minlength=len(sizes) * kinds)
        counts.append(counted.reshape(len(sizes), kinds))
    moves.append(place - first)
    return np.stack(moves), np.stack(strengths), np.stack(counts, 1)


def apply(pixels: Tensor, plan: AugmentPlan) -> Tensor:
    """Apply the planned operations to images, [B, C, S, S] uint8; C is 1 or 3."""
    for move, strengths, counts in zip(plan.moves, plan.strengths, plan.counts, strict=False):
        pixels = _apply_round(pixels[move], strengths, counts, plan.magnitude)
    return pixels[plan.moves[-1]]


def _apply_round(
    pixels: Tensor, strengths: Tensor, counts: Sequence[int], magnitude: int
) -> Tensor:
    """One operation for each image, in the order of `_SORTED`."""
    sizes = [sum(counts[start:stop]) for start, stop in _KINDS]
    (same, moved, coloured, sharp, looked_up), of_kind = pixels.split(sizes), strengths.split(sizes)
    parts = [same]
    if len(moved):
        parts.append(_affine(moved, of_kind[1]))
    if len(coloured):
        parts.append(_blend(coloured, _grey(coloured), of_kind[2]))
    if len(sharp):
        parts.append(_sharpness(sharp, of_kind[3]))
    if len(looked_up):
        parts.append(_look_up(looked_up, of_kind[4], counts[-len(_TABLES) :], magnitude))
    return torch.cat(parts)


@cache
def _strengths(magnitude: int, side: int) -> np.ndarray:
    """[14, 2, 7] int32, for each operation with sign -1 and 1: a, b, c of the column's map and of
    the row's map (see `_affine`), and a factor in units of 1 / 2**14, 0.1 ... 1.9 at the largest.
    """
    strengths = np.zeros((len(OPERATIONS), 2, 7), np.int32)
    shear = (_UNIT * magnitude + 50) // 100  # 0.3 at the largest
    shift = 2 * _UNIT * (5 * side * magnitude // 331)  # 150/331 of the side at the largest
    angle = np.deg2rad(magnitude)  # 30 degrees at the largest
    cosine = round(_UNIT * float(np.cos(angle)))
    for column, sign in enumerate((-1, 1)):
        sine = sign * round(_UNIT * float(np.sin(angle)))
        maps = {
            "shear_x": (_UNIT, sign * shear, 0, 0, _UNIT, 0),
            "shear_y": (_UNIT, 0, 0, sign * shear, _UNIT, 0),
            "translate_x": (_UNIT, 0, -sign * shift, 0, _UNIT, 0),
            "translate_y": (_UNIT, 0, 0, 0, _UNIT, -sign * shift),
            "rotate": (
                *(cosine, -sine, (_UNIT - cosine + sine) * side),
                *(sine, cosine, (_UNIT - cosine - sine) * side),
            ),
        }
        for name, coefficients in maps.items():
            strengths[OPERATIONS.index(name), column, :6] = coefficients
        strengths[:, column, 6] = (_ONE * (100 + 3 * magnitude * sign) + 50) // 100
    return strengths


def _affine(pixels: Tensor, strengths: Tensor) -> Tensor:
    """Move pixels by an affine map; black outside.

    The pixel at row i, column j comes from column (a * (2j + 1) + b * (2i + 1) + c) >> 17 with the
    first three of `strengths` [n, 7], and from the row that the next three give in the same way.
    """
    side = pixels.shape[3]
    a, b, c = strengths[:, :6, None, None].unflatten(1, (2, 3)).unbind(2)  # [n, 2, 1, 1] each
    odd = _odd_numbers(side, pixels.device)
    places = (a * odd + (b * odd[:, None] + c)) >> 17  # [n, 2, S, S]: 2**31 is out of reach at 4096
    within = places.clamp(0, side - 1)
    inside = (places == within).all(1, keepdim=True)  # [n, 1, S, S]
    column, row = within.unbind(1)
    index = (row * side + column).flatten(1).long()
    moved = pixels.flatten(2).gather(2, index[:, None].expand(-1, pixels.shape[1], -1))
    return moved.view_as(pixels) * inside


@cache
def _odd_numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, 2 * count, 2, device=device, dtype=torch.int32)


def _blend(pixels: Tensor, other: Tensor, strengths: Tensor) -> Tensor:
    """factor * pixels + (1 - factor) * other, rounded down, within 0 ... 255."""
    share = strengths[:, 6, None, None, None].float() / _ONE
    mixed = pixels.float().mul_(share).addcmul_(other, 1 - share)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    """[n, 1, H, W] float32, whole levels."""
    if pixels.shape[1] == 1:
        return pixels.float()
    red, green, blue = (
        pixels[:, channel : channel + 1].float().mul_(weight / _ONE)
        for channel, weight in enumerate(_GREY)
    )
    return red.add_(green).add_(blue).floor_()


def _sharpness(pixels: Tensor, strengths: Tensor) -> Tensor:
    """Blend with the mean of 3 x 3 pixels, the middle weighted 5; the outermost pixels stay."""
    levels = pixels.to(torch.int16)
    columns = levels[..., :-2, :] + levels[..., 1:-1, :] + levels[..., 2:, :]
    sums = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:]
    sums = sums.add_(levels[..., 1:-1, 1:-1], alpha=4)  # 13 * 255 at most
    # sum / 13 is never half-way, by a margin larger than the error of 1/13 in float32.
    smooth = sums.float().mul_(1 / 13).round_()
    changed = pixels.clone()
    inner = pixels[..., 1:-1, 1:-1]
    changed[..., 1:-1, 1:-1] = _blend(inner, smooth, strengths)
    return changed


def _look_up(pixels: Tensor, strengths: Tensor, counts: Sequence[int], magnitude: int) -> Tensor:
    """Replace each pixel by its entry in the table of its image's operation, one of `_TABLES`."""
    flat = pixels.flatten(2).long()  # [n, C, H * W]
    factors, tables = strengths[:, 6, None, None].long(), []  # [n, 1, 1]
    parts = zip(_TABLES, flat.split(counts), factors.split(counts), strict=True)
    for table_of, levels, factor in parts:
        if len(levels):
            table = table_of(levels, factor, magnitude)
            tables.append(table.expand(*levels.shape[:2], 256))
    table = torch.cat(tables).clamp_(0, 255).to(torch.uint8)
    return table.gather(2, flat).view_as(pixels)


# Tables of lookups: (levels [n, C, H * W], factor [n, 1, 1], magnitude) -> [n or 1, C or 1, 256],
# clamped to 0 ... 255 later; all int64.


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.arange(256, device=device)


def _brightness(flat: Tensor, factor: Tensor, magnitude: int) -> Tensor:
    return (factor * _levels(flat.device)) >> 14


def _contrast(flat: Tensor, factor: Tensor, magnitude: int) -> Tensor:
    """Blend with the mean grey of the image."""
    grey = _grey(flat[..., None]).long().sum((1, 2, 3))[:, None, None]  # [n, 1, 1]
    count = flat.shape[2]
    levels = factor * count * _levels(flat.device) + (_ONE - factor) * grey
    return levels.div(_ONE * count, rounding_mode="floor")


def _posterize(flat: Tensor, factor: Tensor, magnitude: int) -> Tensor:
    dropped = (4 * magnitude + 15) // 30  # bits; 4 at the largest
    return (_levels(flat.device) >> dropped << dropped).view(1, 1, 256)


def _solarize(flat: Tensor, factor: Tensor, magnitude: int) -> Tensor:
    levels = _levels(flat.device)
    inverted = torch.where(30 * levels >= 255 * (30 - magnitude), 255 - levels, levels)
    return inverted.view(1, 1, 256)


def _auto_contrast(flat: Tensor, factor: Tensor, magnitude: int) -> Tensor:
    """Stretch each channel's levels to 0 ... 255."""
    least, most = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)  # [n, C, 1]
    levels = _levels(flat.device)
    stretched = (255 * (levels - least)).div((most - least).clamp(min=1), rounding_mode="floor")
    return torch.where(most > least, stretched, levels)


def _equalize(flat: Tensor, factor: Tensor, magnitude: int) -> Tensor:
    """Spread each channel's levels evenly, as Pillow's ImageOps.equalize does."""
    ones = _levels(flat.device)[1:2]
    histogram = flat.new_zeros(*flat.shape[:2], 256).scatter_add_(2, flat, ones.expand_as(flat))
    below = histogram.cumsum(2) - histogram
    of_largest = histogram.gather(2, flat.amax(2, keepdim=True))  # [n, C, 1]
    step = (flat.shape[2] - of_largest).div(255, rounding_mode="floor")
    even = (below + step // 2).div(step.clamp(min=1), rounding_mode="floor")
    return torch.where(step > 0, even, _levels(flat.device))


_TABLES: tuple[Callable[[Tensor, Tensor, int], Tensor], ...] = (
    *(_brightness, _contrast, _posterize, _solarize, _auto_contrast, _equalize),
)
#: The operations by kind: none, affine maps, blends, lookups.
_SORTED = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("color", "sharpness"),
    *("brightness", "contrast", "posterize", "solarize", "auto_contrast", "equalize"),
)
_KINDS = ((0, 1), (1, 6), (6, 7), (7, 8), (8, 14))
_RANKS = np.array([_SORTED.index(name) for name in OPERATIONS])
