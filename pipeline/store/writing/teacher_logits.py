"""The teacher's logits for views: from a forward pass, or imported from another system."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.data.prepared.dataset import Dataset
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict
from pipeline.models.spec import InputSpec, LogitSource, family_module
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER
from pipeline.store.format.schema import SHARD_SAMPLES, ShardKey, StoreIdentity
from pipeline.store.format.shards import ShardError, check_shard
from pipeline.store.format.views_by_split import ViewsBySplit, canaries_of
from pipeline.views.policy import ViewPolicy

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
    ):
        """Take the network, which is on the device of the views, and its input."""
        self.network, self.spec = network, spec
        self._views, self._precision, self._batch_size = views, precision, batch_size
        self._clock = _ForwardClock()

    def logits(self, split: str, view: int, samples: np.ndarray) -> np.ndarray:
        """Run the teacher on one view of n samples: [n, num_classes] float32, raw."""
        order = np.split(samples, range(self._batch_size, len(samples), self._batch_size))
        logits = []
        for batch in self._views[split].batches(view, order):
            with self._clock.running(batch.pixels.device):
                logits.append(
                    predict(self.network, self.spec, batch.pixels, precision=self._precision)
                )
        return torch.cat(logits).cpu().numpy()

    def seconds(self) -> float | None:
        """Seconds in the forward pass so far."""
        return self._clock.seconds()


class ImportedLogits:
    """Teacher logits from a table, or from a store; a store's shards are verified before use."""

    def __init__(self, source: Any, views: ViewsBySplit, identity: StoreIdentity):
        """Take a source that `open_source` of pipeline/networks/logits.py returned."""
        self.unit, self.remarks = f"rows of `{source.path}`", source.told
        self._source, self._views, self._identity = source, views, identity
        self._verified: set[ShardKey] = set()

    def logits(self, split: str, view: int, samples: np.ndarray) -> np.ndarray:
        """Look up one view of n samples: [n, num_classes] float32, raw.

        Raises:
            UserError: a shard is damaged, or was written for other views.
        """
        if self._source.identity is not None:
            for first in np.unique(samples // SHARD_SAMPLES * SHARD_SAMPLES).tolist():
                count = min(SHARD_SAMPLES, self._source.sizes[split] - first)
                self._verify(ShardKey(split, view, first, count))
        return self._source.rows(split, view, samples)

    def _verify(self, key: ShardKey) -> None:
        if key in self._verified:
            return
        path = self._source.path / key.file_name
        identity = replace(self._identity, **self._source.identity, k=None)
        try:
            check_shard(path, identity, key, canaries_of(self._views, key))
        except ShardError as error:
            raise UserError(
                f"`{path}` {error}. Write the store again, as docs/soft_targets_format.md "
                "specifies."
            ) from None
        self._verified.add(key)

    def seconds(self) -> float | None:
        """None: there is no forward pass."""
        return None


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
        source = _open_source(description, dataset)
        _check_views(source, identity, num_views)
        return ImportedLogits(source, views, identity)
    network, spec = checkpoint.load(TEACHER.model, produced_by=AGAIN)
    _check_classes(spec.class_names, dataset.class_names)
    return TeacherForward(network.to(device), spec.input, views, identity.precision, batch_size)


def _check_classes(teacher: Sequence[str], dataset: Sequence[str]) -> None:
    if list(teacher) != list(dataset):
        raise UserError(
            f"`{TEACHER.model}` has the {len(teacher)} classes {list(teacher)[:5]}..., but "
            f"data/prepared has the {len(dataset)} classes {list(dataset)[:5]}.... Run `{AGAIN}`."
        )


def _open_source(description: LogitSource, dataset: Dataset) -> Any:
    family = family_module(description.family)
    source = family.open_source(Path(description.path), dataset)
    if source.sha256 != description.contents_sha256:
        raise UserError(
            f"`{description.path}` holds other logits than those that `{TEACHER.model}` was made "
            f"from. Run `{AGAIN}`."
        )
    return source


def _check_views(source: Any, identity: StoreIdentity, num_views: int) -> None:
    if source.num_views is not None and source.num_views < num_views:
        raise UserError(
            f"`{source.path}` has {source.num_views} views of the training images, but "
            f"`views.count` is {num_views}. Set it to {source.num_views}, or import more views."
        )
    if source.num_views is None and ViewPolicy.parse(identity.policy).mix is not None:
        raise UserError(
            f"`{source.path}` has one row of logits for an image, but `views.mix` mixes two images "
            "in a view. Set `views.mix: none`, or import a row for each view."
        )
    if source.identity is None:
        return
    differing = [
        f"`{source.path}` was written for {name} {source.identity[field]}, but params.yaml says "
        f"{getattr(identity, field)}."
        for name, field in (
            ("view policy", "policy"),
            ("views.seed", "seed"),
            ("views.image_size", "image_size"),
            ("soft_targets.precision", "precision"),
        )
        if source.identity[field] != getattr(identity, field)
    ]
    if differing:
        advice = "Set params.yaml to these values, or write the store for the views of params.yaml."
        raise UserError("\n".join([*differing, advice]))


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
