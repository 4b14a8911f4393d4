"""The soft targets of a training, kept on its GPU."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.compute.device import fits, to_device

#: (view, samples [B]) -> (teacher_logits [B, C], kept_classes [B, C] bool, or None for all).
SoftTargetLookup = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray | None]]

_PARTS = 8  # all rows may take one of so many parts of the free memory: a network needs more
_COPIED = 2**13  # rows copied to the device at a time


class DeviceRows:
    """The soft targets of all views and samples, as a lookup gives them. Their memory is taken at
    once; a view is filled when it is first used."""

    def __init__(
        self, lookup: SoftTargetLookup, num_views: int, num_samples: int, device: torch.device
    ):
        self._lookup, self._device = lookup, device
        self._tables = [
            None
            if row is None
            else torch.empty(
                (num_views, num_samples, row.shape[1]),
                dtype=torch.from_numpy(row).dtype,
                device=device,
            )
            for row in lookup(0, np.arange(1))
        ]
        self._filled: set[int] = set()

    @classmethod
    def if_they_fit(
        cls, lookup: SoftTargetLookup, num_views: int, num_samples: int, device: torch.device
    ) -> "DeviceRows | None":
        """Make them for a GPU, if they take at most an eighth of its free memory."""
        if device.type != "cuda":
            return None
        row_bytes = sum(row.nbytes for row in lookup(0, np.arange(1)) if row is not None)
        if not fits(num_views * num_samples * row_bytes, device, parts=_PARTS):
            return None
        return cls(lookup, num_views, num_samples, device)

    def gather(self, view: int, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The lookup's arrays of samples, [B] int64 on the device, in one view: on the device."""
        if view not in self._filled:
            self._fill(view)
            self._filled.add(view)
        logits, kept = (None if table is None else table[view][rows] for table in self._tables)
        return logits, kept

    def _fill(self, view: int) -> None:
        count = self._tables[0].shape[1]
        for start in range(0, count, _COPIED):
            samples = np.arange(start, min(start + _COPIED, count))
            for table, found in zip(self._tables, self._lookup(view, samples), strict=True):
                if table is not None:
                    table[view, start : start + _COPIED] = to_device(found, self._device)
