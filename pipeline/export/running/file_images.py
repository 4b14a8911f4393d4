"""The images of a split as an exported file takes them."""

import numpy as np
import torch

from pipeline.data.prepared.dataset import AnySplit
from pipeline.export.running.onnx_model import ExportedNetwork, Reading
from pipeline.views.loader import AnyViews, CleanView, batches_of, open_views
from pipeline.views.policy import ViewPolicy


def open_images(split: AnySplit, reading: Reading) -> AnyViews:
    """Open a split's images without augmentation.

    Args:
        split: its images have the side that the file takes.
    """
    clean = None
    if reading.resize_ratio is not None:
        clean = CleanView(reading.resize_ratio, reading.interpolation == "bicubic")
    return open_views(split, ViewPolicy("none"), 0, torch.device("cpu"), clean=clean)


def evenly_spread(total: int, count: int) -> np.ndarray:
    """Choose `count` of `total` samples, evenly spread, or all: [N] ascending sample numbers."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).astype(int))


def file_logits(
    file: ExportedNetwork, split: AnySplit, samples: np.ndarray | None = None
) -> np.ndarray:
    """Compute the file's raw logits of images of a split: [N, num_classes] float32.

    Args:
        split: its images have the side that the file takes.
        samples: [N] their numbers; None: all.
    """
    order = batches_of(np.arange(len(split)) if samples is None else samples)
    batches = open_images(split, file.metadata.reading).batches(0, order)
    return np.concatenate([file.logits(batch.pixels.numpy()) for batch in batches])
