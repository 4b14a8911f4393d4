"""Resize a box of each image to one size, in exact arithmetic. Imports nothing of ours."""

from functools import lru_cache

import torch
from torch import Tensor

ONE = 2**14  # weights are multiples of 1 / ONE: a product with a pixel is exact in float32
_PART = 2**18  # bytes of pixels at a time on a CPU: intermediate results fit in its cache


@lru_cache(64)
def counting(count: int, step: int, device: torch.device) -> Tensor:
    """[count] int64: 0, step, 2 · step ..., made once and kept on the device. Never change it."""
    return torch.arange(0, count * step, step, device=device)


def resize_boxes(images: Tensor, boxes: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """Resize a box of each image, [B, C, S, S] uint8, to [B, C, size, size]: bilinear, antialiased
    if it shrinks.

    A triangle filter, which also reads pixels just outside the box, as Pillow's
    `resize(box=..., resample=BILINEAR)`. Columns come first; each of the two passes rounds to whole
    levels. Pixels, weights and all sums of their products are exact in float32, so the result
    depends on no order, device or batch.

    Args:
        boxes: [B, 4] int64: top, left, height, width, within the image; on its device.
        mirrored: [B] bool: swap left and right.
    """
    positions, weights = taps(boxes[:, :2], boxes[:, 2:], size, images.shape[-1])
    rows, row_weights = positions[:, 0], weights[:, 0]
    columns, column_weights = (
        torch.where(mirrored[:, None, None], part[:, 1].flip(1), part[:, 1])
        for part in (positions, weights)
    )
    plan = (columns, column_weights, rows, row_weights)
    on_cpu = images.device.type == "cpu"
    count = max(1, _PART // images.shape[1:].numel() if on_cpu else len(images))  # B may be 0
    resized = images.new_empty(*images.shape[:2], size, size)
    for start in range(0, len(images), count):
        part = slice(start, start + count)
        columns, column_weights, rows, row_weights = (numbers[part] for numbers in plan)
        across = _along_rows(images[part].transpose(2, 3), columns, column_weights)
        resized[part] = _along_rows(across.transpose(2, 3), rows, row_weights)
    return resized


def taps(starts: Tensor, lengths: Tensor, size: int, limit: int) -> tuple[Tensor, Tensor]:
    """Find the source pixels of each output pixel, and their weights; in integers up to the end.

    In units of 1 / (2 * size) of a pixel, output i has its centre at c = 2 * size * start +
    (2i + 1) * length. Pixel x has its centre at 2 * size * x + size, and the share
    max(0, 2 * max(size, length) - |its centre - c|).

    Args:
        starts, lengths: [...] int64, the boxes along an axis.
        limit: number of pixels along each axis, which no box exceeds.

    Returns:
        [..., size, K] int64 positions, and [..., size, K] float32 weights: multiples of 1 / ONE
        with sum 1. The rounding remainder is added to the (first) largest weight.
    """
    starts, lengths = starts[..., None], lengths[..., None]  # [..., 1]
    count = max(2, -(-2 * limit // size))  # K: enough for the longest box
    outputs, taken = (counting(n, 1, starts.device) for n in (size, count))
    centres = 2 * size * starts + (2 * outputs + 1) * lengths  # [..., size]
    reach = 2 * lengths.clamp(min=size)
    first = ((centres - size - reach).div(2 * size, rounding_mode="floor") + 1).clamp_(min=0)
    positions = first[..., None] + taken  # [..., size, K]
    distances = (2 * size * positions + (size - centres[..., None])).abs_()
    shares = (reach[..., None] - distances).clamp_(min=0) * (positions < limit)
    totals = shares.sum(-1, keepdim=True)
    weights = (2 * ONE * shares + totals).div(2 * totals, rounding_mode="floor")
    # No two of these are equal, so that every device finds the first of the largest.
    largest = (count * weights - taken).argmax(-1, keepdim=True)
    weights.scatter_add_(-1, largest, ONE - weights.sum(-1, keepdim=True))
    return positions.clamp_(max=limit - 1), weights / ONE


def _along_rows(images: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """[B, C, N, W] -> [B, C, size, W]: each output row is a weighted mean of K rows."""
    batch, channels, limit, width = images.shape
    flat = images.reshape(-1, width)
    base = counting(batch * channels, limit, images.device).view(batch, channels, 1)
    total = None
    for tap, weight in zip(positions.unbind(2), weights.unbind(2), strict=True):
        index = (base + tap[:, None]).flatten()
        rows = flat.index_select(0, index).view(batch, channels, -1, width).float()
        share = weight[:, None, :, None]
        total = rows.mul_(share) if total is None else total.addcmul_(rows, share)
    return total.add_(0.5).to(torch.uint8)
