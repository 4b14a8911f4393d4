"""Which samples each step of an epoch sees, and in which view.

A training draws its samples from an endless series of passes. A pass shows every sample once, in
one view and in an order of its own; each epoch takes the next samples of the series. A student's
epoch is one pass. A baseline sees the labelled images alone, and its epoch has as many samples as
its student's, so that both take equally many steps: an epoch may end within a pass, and the next
epoch continues there.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter

import numpy as np
import torch

from pipeline.compute.distributed import ProcessGroup
from pipeline.runtime.derived_random import permutation
from pipeline.training.data_parallel import local_rows
from pipeline.views.loader import AnyViews, Batch


def epoch_order(
    samples: np.ndarray, length: int, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Order the samples of an epoch, counted from 1.

    Args:
        samples: [M] sample numbers.
        length: of an epoch, in samples.

    Returns:
        [length] sample numbers, and [length] the pass of each, counted from 1.
    """
    passes = np.arange((epoch - 1) * length, epoch * length) // len(samples) + 1
    orders = [permutation(len(samples), seed, int(number)) for number in np.unique(passes)]
    start = (epoch - 1) * length % len(samples)  # within the first of these passes
    return samples[np.concatenate(orders)[start : start + length]], passes


def draw_batches(
    views: AnyViews,
    view_of_pass: Callable[[int], int],
    steps: Sequence[tuple[np.ndarray, np.ndarray]],
    group: ProcessGroup,
) -> Iterator[Batch]:
    """Yield this process's part of the batch of each step. Each sample is in the view of its pass.

    Args:
        steps: [B] sample numbers of a batch of all processes, and [B] their passes.
    """
    parts = []  # (pass, samples, whether they end their batch)
    for samples, passes in steps:
        local, of_local = local_rows(samples, group), local_rows(passes, group)
        numbers = np.unique(passes)  # equal on every rank, also on one without a row
        for number in numbers:
            parts.append((int(number), local[of_local == number], number == numbers[-1]))
    drawn = chain.from_iterable(
        views.batches(view_of_pass(number), [samples for _, samples, _ in of_pass])
        for number, of_pass in groupby(parts, key=itemgetter(0))
    )
    waiting: list[Batch] = []
    for (_, _, ends), part in zip(parts, drawn, strict=True):
        waiting.append(part)
        if ends:
            yield _join(waiting)
            waiting = []


def _join(parts: list[Batch]) -> Batch:
    """Join parts of one batch, which are views of different numbers."""
    if len(parts) == 1:
        return parts[0]
    samples = np.concatenate([part.samples for part in parts])
    pixels = torch.cat([part.pixels for part in parts])
    if parts[0].strong_pixels is not None:
        strong_pixels = torch.cat([part.strong_pixels for part in parts])
        return Batch(samples, pixels, strong_pixels=strong_pixels)
    if parts[0].partners is None:
        return Batch(samples, pixels)
    partners = torch.cat([part.partners for part in parts])
    return Batch(samples, pixels, partners, torch.cat([part.weights for part in parts]))
