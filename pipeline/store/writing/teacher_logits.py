"""The teacher's logits for views: from a forward pass, or of another system's store."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from pipeline.data.prepared.dataset import Dataset
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict
from pipeline.models.raw_logits import advice_for_network, check_raw
from pipeline.models.spec import InputSpec
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER
from pipeline.store.format.schema import (
    StoreIdentity,
)
from pipeline.store.format.views_by_split import ViewsBySplit
from pipeline.store.writing.imported_logits import ImportedLogits, open_imported
from pipeline.views.loader import batches_of

AGAIN = f"dvc repro {TEACHER.stage}"


class TeacherForward:
    """Teacher logits from a forward pass."""

    unit = "teacher passes"
    remarks: Sequence[str] = ()

    def __init__(
        self,
        network: nn.Module,
        spec: InputSpec,
        views: ViewsBySplit,
        precision: str,
        batch_size: int,
        advice: str = "",
    ):
        """Take the network, which is on the device of the views, and its input.

        Args:
            advice: what to change if it does not return raw logits.
        """
        self.network, self.spec = network, spec
        self._views, self._precision, self._batch_size = views, precision, batch_size
        self._advice, self._clock = advice, _ForwardClock()

    def logits(self, split: str, view: int, samples: np.ndarray) -> np.ndarray:
        """Run the teacher on one view of n samples: [n, num_classes] float32, raw.

        Raises:
            UserError: the numbers are no raw logits.
        """
        logits = self._run(split, view, samples, self._precision)
        check_raw(logits, f"`{TEACHER.model}` returns", self._advice)
        return logits

    def in_float32(self, split: str, view: int, samples: np.ndarray) -> np.ndarray | None:
        """Run the teacher in float32; None if `logits` has done so."""
        if self._precision == "float32":
            return None
        return self._run(split, view, samples, "float32")

    def _run(self, split: str, view: int, samples: np.ndarray, precision: str) -> np.ndarray:
        order = batches_of(samples, self._batch_size)
        logits = []
        for batch in self._views[split].batches(view, order):
            with self._clock.running(batch.pixels.device):
                logits.append(predict(self.network, self.spec, batch.pixels, precision=precision))
        computed = torch.cat(logits).cpu().numpy()
        self._clock.seconds()  # reads and frees the events; the device has no work now
        return computed

    def seconds(self) -> float | None:
        """Seconds in the forward pass so far."""
        return self._clock.seconds()


def open_teacher_logits(
    dataset: Dataset,
    identity: StoreIdentity,
    num_views: int,
    views: ViewsBySplit,
    *,
    batch_size: int,
    device: torch.device,
) -> TeacherForward | ImportedLogits:
    """Open the teacher of models/teacher: a network, or imported logits.

    Args:
        dataset: at the size of the views.

    Raises:
        UserError: the teacher is absent, has other classes, or its logits do not cover these views.
    """
    description = checkpoint.logit_source(TEACHER.model, produced_by=AGAIN)
    if description is not None:
        _check_classes(description.class_names, dataset.class_names)
        return open_imported(description, dataset, identity, num_views, views, device)
    network, spec = checkpoint.load(TEACHER.model, produced_by=AGAIN)
    _check_classes(spec.class_names, dataset.class_names)
    return TeacherForward(
        network.to(device),
        spec.input,
        views,
        identity.precision,
        batch_size,
        advice_for_network(spec.family, spec.network),
    )


def _check_classes(teacher: Sequence[str], dataset: Sequence[str]) -> None:
    if list(teacher) != list(dataset):
        raise UserError(
            f"`{TEACHER.model}` has the {len(teacher)} classes {list(teacher)[:5]}..., but "
            f"data/prepared has the {len(dataset)} classes {list(dataset)[:5]}.... Run `{AGAIN}`."
        )


class _ForwardClock:
    """Measure the seconds in the forward pass; by events on CUDA, where calls return early."""

    def __init__(self) -> None:
        self._seconds, self._events = 0.0, []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin

    def seconds(self) -> float:
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
        return self._seconds
