"""RandAugment's operations on batches of uint8 images, in exact arithmetic.

The operations, their order and their strengths are torchvision's (`transforms.RandAugment`, 31
magnitudes, nearest neighbours, black outside), after Cubuk et al. 2020, arXiv:1909.13719. Each is
computed in integers (formulas: docs/soft_targets_format.md), or in float32 if all values are
multiples of 2**-14 below 2**9, which float32 holds exactly. So a pixel depends on its image alone,
on no batch, order or device. Imports nothing of ours.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_ONE = 2**14
_GREY = (4899, 9617, 1868)  # weights of red, green and blue, in units of 1 / 2**14
_UNIT = 2**16  # 1 in the coefficients of affine maps


def apply(pixels: Tensor, operations: np.ndarray, signs: np.ndarray, magnitude: int) -> Tensor:
    """Apply one operation to each image, [B, C, H, W] uint8; C is 1 or 3.

    Args:
        operations: [B] integers, indices into OPERATIONS.
        signs: [B] integers, -1 or 1: the direction, for operations that have one.
        magnitude: 0 ... 30.
    """
    changed = pixels.clone()
    for number, operation in enumerate(OPERATIONS.values()):
        rows = np.flatnonzero(operations == number)
        if len(rows) and operation is not None:
            index = torch.from_numpy(rows).to(pixels.device, non_blocking=True)
            sign = torch.from_numpy(signs[rows]).to(pixels.device, non_blocking=True)
            changed[index] = operation(pixels[index], sign[:, None, None], magnitude)
    return changed


def _affine(pixels: Tensor, column_map: tuple, row_map: tuple) -> Tensor:
    """Move pixels by an affine map; black outside.

    The pixel at row i, column j comes from column (a * (2j + 1) + b * (2i + 1) + c) >> 17 with a,
    b, c of `column_map`, and from the row that `row_map` gives by the same formula.

    Args:
        column_map, row_map: (a, b, c), integers or [n, 1, 1] int32; one at least is a tensor.
    """
    height, width = pixels.shape[2:]
    x = torch.arange(1, 2 * width, 2, device=pixels.device, dtype=torch.int32)
    y = torch.arange(1, 2 * height, 2, device=pixels.device, dtype=torch.int32)[:, None]
    # [n or 1, H, W] int32: 2**31 is out of reach at 4096
    column, row = ((a * x + b * y + c) >> 17 for a, b, c in (column_map, row_map))
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)  # [n, H, W]
    index = torch.where(inside, row * width + column, 0).flatten(1).long()
    moved = pixels.flatten(2).gather(2, index[:, None].expand(-1, pixels.shape[1], -1))
    return moved.view_as(pixels) * inside[:, None]


def _shear_x(pixels: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    shear = (_UNIT * magnitude + 50) // 100  # 0.3 at the largest
    return _affine(pixels, (_UNIT, sign.int() * shear, 0), (0, _UNIT, 0))


def _translate_x(pixels: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    shift = 5 * pixels.shape[3] * magnitude // 331  # pixels; 150/331 of the side at the largest
    return _affine(pixels, (_UNIT, 0, sign.int() * (-2 * _UNIT * shift)), (0, _UNIT, 0))


def _along_y(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Do to columns what an operation does to rows."""
    return lambda pixels, *strength: operation(pixels.mT, *strength).mT


def _rotate(pixels: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    angle = np.deg2rad(magnitude)  # 30 degrees at the largest
    cosine = round(_UNIT * float(np.cos(angle)))
    sine = sign.int() * round(_UNIT * float(np.sin(angle)))
    height, width = pixels.shape[2:]
    return _affine(
        pixels,
        (cosine, -sine, (_UNIT - cosine) * width + sine * height),
        (sine, cosine, (_UNIT - cosine) * height - sine * width),
    )


def _factor(sign: Tensor, magnitude: int) -> Tensor:
    """[n, 1, 1] integers in units of 1 / 2**14: 0.1 ... 1.9 at the largest."""
    return (_ONE * (100 + 3 * magnitude * sign) + 50) // 100


def _blend(pixels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * pixels + (1 - factor) * other, rounded down, within 0 ... 255."""
    share = factor[..., None].float() / _ONE
    mixed = pixels.float().mul_(share).addcmul_(other, 1 - share)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    """[n, 1, H, W] float32, whole levels."""
    if pixels.shape[1] == 1:
        return pixels.float()
    red, green, blue = (
        pixels[:, [channel]].float().mul_(weight / _ONE) for channel, weight in enumerate(_GREY)
    )
    return red.add_(green).add_(blue).floor_()


def _color(pixels: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    return _blend(pixels, _grey(pixels), _factor(sign, magnitude))


def _sharpness(pixels: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    """Blend with the mean of 3 x 3 pixels, the middle weighted 5; the outermost pixels stay."""
    numbers = pixels.to(torch.int16)
    columns = numbers[..., :-2, :] + numbers[..., 1:-1, :] + numbers[..., 2:, :]
    sums = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:]
    sums = sums.add_(numbers[..., 1:-1, 1:-1], alpha=4)  # 13 * 255 at most
    # sum / 13 is never half-way, by a margin larger than the error of 1/13 in float32.
    smooth = sums.float().mul_(1 / 13).round_()
    changed = pixels.clone()
    inner = pixels[..., 1:-1, 1:-1]
    changed[..., 1:-1, 1:-1] = _blend(inner, smooth, _factor(sign, magnitude))
    return changed


def _look_up(pixels: Tensor, table: Tensor) -> Tensor:
    """Replace each pixel by its entry in `table`, [n or 1, C or 1, 256], within 0 ... 255."""
    batch, channels = pixels.shape[:2]
    table = table.clamp(0, 255).to(torch.uint8).expand(batch, channels, -1)
    return table.gather(2, pixels.flatten(2).long()).view_as(pixels)


def _levels(pixels: Tensor) -> Tensor:
    return torch.arange(256, device=pixels.device)


def _brightness(pixels: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    return _look_up(pixels, (_factor(sign, magnitude) * _levels(pixels)) >> 14)


def _contrast(pixels: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    """Blend with the mean grey of the image."""
    grey = _grey(pixels).long().sum((1, 2, 3))[:, None, None]  # [n, 1, 1]
    count = pixels.shape[2] * pixels.shape[3]
    factor = _factor(sign, magnitude)
    levels = factor * count * _levels(pixels) + (_ONE - factor) * grey
    return _look_up(pixels, levels.div(_ONE * count, rounding_mode="floor"))


def _posterize(pixels: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    dropped = (4 * magnitude + 15) // 30  # bits; 4 at the largest
    return pixels >> dropped << dropped


def _solarize(pixels: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    levels = _levels(pixels)
    inverted = torch.where(30 * levels >= 255 * (30 - magnitude), 255 - levels, levels)
    return _look_up(pixels, inverted.view(1, 1, 256))


def _auto_contrast(pixels: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    """Stretch each channel's levels to 0 ... 255."""
    flat = pixels.flatten(2)
    least, most = flat.amin(2, keepdim=True).long(), flat.amax(2, keepdim=True).long()  # [n, C, 1]
    levels = _levels(pixels)
    stretched = (255 * (levels - least)).div((most - least).clamp(min=1), rounding_mode="floor")
    return _look_up(pixels, torch.where(most > least, stretched, levels))


def _equalize(pixels: Tensor, sign: Tensor, magnitude: int) -> Tensor:
    """Spread each channel's levels evenly, as Pillow's ImageOps.equalize does."""
    flat = pixels.flatten(2).long()  # [n, C, H * W]
    ones = torch.ones(1, dtype=torch.int64, device=pixels.device)
    histogram = flat.new_zeros(*flat.shape[:2], 256).scatter_add_(2, flat, ones.expand_as(flat))
    below = histogram.cumsum(2) - histogram
    of_largest = histogram.gather(2, flat.amax(2, keepdim=True))  # [n, C, 1]
    step = (flat.shape[2] - of_largest).div(255, rounding_mode="floor")
    even = (below + step // 2).div(step.clamp(min=1), rounding_mode="floor")
    return _look_up(pixels, torch.where(step > 0, even, _levels(pixels)))


#: (pixels [n, C, H, W], sign [n, 1, 1], magnitude) -> pixels; None changes nothing.
OPERATIONS: dict[str, Callable[[Tensor, Tensor, int], Tensor] | None] = {
    "identity": None,
    "shear_x": _shear_x,
    "shear_y": _along_y(_shear_x),
    "translate_x": _translate_x,
    "translate_y": _along_y(_translate_x),
    "rotate": _rotate,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
}
