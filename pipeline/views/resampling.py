"""Resize a box of each image to one size, in exact arithmetic. Imports nothing of ours."""

import numpy as np
import torch
from torch import Tensor

ONE = 2**14  # weights are multiples of 1 / ONE: a product with a pixel is exact in float32
_PART = 2**18  # bytes of pixels at a time on a CPU: intermediate results fit in its cache


def resize_boxes(images: Tensor, boxes: np.ndarray, mirrored: np.ndarray, size: int) -> Tensor:
    """Resize a box of each image, [B, C, H, W] uint8, to [B, C, size, size]: bilinear, antialiased
    if it shrinks.

    A triangle filter, which also reads pixels just outside the box, as Pillow's
    `resize(box=..., resample=BILINEAR)`. Columns come first; each of the two passes rounds to whole
    levels. Pixels, weights and all sums of their products are exact in float32, so the result
    depends on no order, device or batch.

    Args:
        boxes: [B, 4] integers: top, left, height, width, within the image.
        mirrored: [B] bool: swap left and right.
    """
    top, left, box_height, box_width = boxes.T
    height, width = images.shape[2:]
    across, down = taps(left, box_width, size, width), taps(top, box_height, size, height)
    across = [np.where(mirrored[:, None, None], part[:, ::-1], part) for part in across]
    plan = [
        torch.from_numpy(part).to(images.device, non_blocking=True) for part in (*across, *down)
    ]
    count = max(1, _PART // images[0].numel()) if images.device.type == "cpu" else len(images)
    resized = images.new_empty(*images.shape[:2], size, size)
    for start in range(0, len(images), count):
        part = slice(start, start + count)
        columns, column_weights, rows, row_weights = (numbers[part] for numbers in plan)
        across = _along_rows(images[part].transpose(2, 3), columns, column_weights)
        resized[part] = _along_rows(across.transpose(2, 3), rows, row_weights)
    return resized


def taps(
    starts: np.ndarray, lengths: np.ndarray, size: int, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the source pixels of each output pixel, and their weights; in integers up to the end.

    In units of 1 / (2 * size) of a pixel, output i has its centre at c = 2 * size * start +
    (2i + 1) * length. Pixel x has its centre at 2 * size * x + size, and the share
    max(0, 2 * max(size, length) - |its centre - c|).

    Args:
        starts, lengths: [B] integers, the boxes along one axis.
        limit: number of pixels along that axis.

    Returns:
        [B, size, K] int64 positions, and [B, size, K] float32 weights: multiples of 1 / ONE with
        sum 1. The rounding remainder is added to the (first) largest weight.
    """
    starts, lengths = starts[:, None], lengths[:, None]  # [B, 1]
    centres = 2 * size * starts + (2 * np.arange(size) + 1) * lengths  # [B, size]
    reach = 2 * np.maximum(size, lengths)
    first = np.maximum(0, (centres - size - reach) // (2 * size) + 1)
    count = max(2, -(-2 * int(lengths.max(initial=0)) // size))
    positions = first[..., None] + np.arange(count)  # [B, size, K]
    distances = np.abs(2 * size * positions + size - centres[..., None])
    shares = np.maximum(0, reach[..., None] - distances) * (positions < limit)
    totals = shares.sum(-1, keepdims=True)
    weights = (2 * ONE * shares + totals) // (2 * totals)
    largest = weights.argmax(-1)[..., None]
    rest = ONE - weights.sum(-1, keepdims=True)
    np.put_along_axis(weights, largest, np.take_along_axis(weights, largest, -1) + rest, -1)
    return np.minimum(positions, limit - 1), (weights / ONE).astype(np.float32)


def _along_rows(images: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """[B, C, N, W] -> [B, C, size, W]: each output row is a weighted mean of K rows."""
    batch, channels, limit, width = images.shape
    flat = images.reshape(-1, width)
    base = (torch.arange(batch * channels, device=images.device) * limit).view(batch, channels, 1)
    total = None
    for tap, weight in zip(positions.unbind(2), weights.unbind(2), strict=True):
        index = (base + tap[:, None]).flatten()
        rows = flat.index_select(0, index).view(batch, channels, -1, width).float()
        share = weight[:, None, :, None]
        total = rows.mul_(share) if total is None else total.addcmul_(rows, share)
    return total.add_(0.5).to(torch.uint8)
