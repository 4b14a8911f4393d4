"""The teacher's answers to views: of a network, which is run; or logits that another system made.

Contract code: an edit here runs the teacher again.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
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
from pipeline.store.format.schema import (
    SHARD_SAMPLES,
    ShardKey,
    StoreIdentity,
    canary_digests,
    canary_samples,
    policy_of,
)
from pipeline.store.format.shards import ShardError, check_shard
from pipeline.views.loader import EncodedViews, Views, open_views
from pipeline.views.plan import ViewPolicy

AGAIN = "dvc repro teacher"
#: Of each split, all views that a store is about, on a device.
ViewsBySplit = Mapping[str, Views | EncodedViews]


def open_views_by_split(
    dataset: Dataset, identity: StoreIdentity, device: torch.device
) -> ViewsBySplit:
    """Args: dataset: at the size of the views."""
    return {
        name: open_views(split, ViewPolicy.parse(policy_of(identity, name)), identity.seed, device)
        for name, split in dataset.splits.items()
    }


def canaries_of(views: ViewsBySplit, key: ShardKey) -> np.ndarray:
    """[K, 32] uint8, the digests of the shard's canaries as they are seen now."""
    (batch,) = views[key.split].batches(key.view, [canary_samples(key)])
    return canary_digests(batch.pixels.cpu().numpy())


class TeacherForward:
    """By a forward pass for each view of an image."""

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
        """Args: network: on the device of the views."""
        self.network, self.spec = network, spec
        self._views, self._precision, self._batch_size = views, precision, batch_size
        self._clock = _ForwardClock()

    def logits(self, split: str, view: int, samples: np.ndarray) -> np.ndarray:
        """[n, num_classes] float32, raw: of one view of n samples."""
        order = np.split(samples, range(self._batch_size, len(samples), self._batch_size))
        answers = []
        for batch in self._views[split].batches(view, order):
            with self._clock.running(batch.pixels.device):
                answers.append(
                    predict(self.network, self.spec, batch.pixels, precision=self._precision)
                )
        return torch.cat(answers).cpu().numpy()

    def seconds(self) -> float | None:
        """In the forward pass, so far."""
        return self._clock.seconds()


class ImportedLogits:
    """By looking them up in a table, or in a store whose every shard is verified first."""

    def __init__(self, source: Any, views: ViewsBySplit, identity: StoreIdentity):
        """Args: source: of `open_source` in pipeline/networks/logits.py."""
        self.unit, self.remarks = f"rows of `{source.path}`", source.told
        self._source, self._views, self._identity = source, views, identity
        self._verified: set[ShardKey] = set()

    def logits(self, split: str, view: int, samples: np.ndarray) -> np.ndarray:
        """[n, num_classes] float32, raw: of one view of n samples.

        Raises:
            UserError: a shard is not for these views, or damaged.
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
        theirs = replace(self._identity, **self._source.identity, k=None)
        try:
            check_shard(path, theirs, key, canaries_of(self._views, key))
        except ShardError as error:
            raise UserError(
                f"`{path}` {error}. Have the store written again, as "
                "docs/soft_targets_format.md says."
            ) from None
        self._verified.add(key)

    def seconds(self) -> float | None:
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
    """The teacher of models/teacher, whatever it is.

    Args:
        dataset: at the size of the views.

    Raises:
        UserError: it is absent, for other classes, or logits that are not for these views.
    """
    source = checkpoint.logit_source(TEACHER.model, produced_by=AGAIN)
    if source is not None:
        check_classes(source.class_names, dataset.class_names)
        given = _open_source(source, dataset)
        _check_views(given, identity, num_views)
        return ImportedLogits(given, views, identity)
    network, description = checkpoint.load(TEACHER.model, produced_by=AGAIN)
    check_classes(description.class_names, dataset.class_names)
    return TeacherForward(
        network.to(device), description.input, views, identity.precision, batch_size
    )


def check_classes(teacher: Sequence[str], dataset: Sequence[str]) -> None:
    if list(teacher) != list(dataset):
        raise UserError(
            f"`{TEACHER.model}` was made for the {len(teacher)} classes {list(teacher)[:5]}..., "
            f"but data/prepared has the {len(dataset)} classes {list(dataset)[:5]}.... "
            f"Run `{AGAIN}`."
        )


def _open_source(source: LogitSource, dataset: Dataset) -> Any:
    given = family_module(source.family).open_source(Path(source.path), dataset)
    if given.sha256 != source.contents_sha256:
        raise UserError(
            f"`{source.path}` holds other logits than those that `{TEACHER.model}` was made from. "
            f"Run `{AGAIN}`."
        )
    return given


def _check_views(given: Any, identity: StoreIdentity, num_views: int) -> None:
    if given.num_views is not None and given.num_views < num_views:
        raise UserError(
            f"`{given.path}` answers {given.num_views} views of the training images, but "
            f"`views.count` asks for {num_views}. Set it to {given.num_views}, or bring more."
        )
    if given.num_views is None and ViewPolicy.parse(identity.policy).mix is not None:
        raise UserError(
            f"`{given.path}` has one answer for an image, but `views.mix` mixes two images in a "
            "view, which that is no answer to. Set `views.mix: none`, or bring the answers to "
            "each view."
        )
    if given.identity is None:
        return
    differing = [
        f"`{given.path}` was written for {name} {given.identity[key]}, but params.yaml says "
        f"{getattr(identity, key)}."
        for name, key in (
            ("view policy", "policy"),
            ("views.seed", "seed"),
            ("views.image_size", "image_size"),
            ("soft_targets.precision", "precision"),
        )
        if given.identity[key] != getattr(identity, key)
    ]
    if differing:
        raise UserError(
            "\n".join([*differing, "Set params.yaml so, or have it written for these views."])
        )


class _ForwardClock:
    """Seconds in the teacher's forward pass; on CUDA, where calls return at once, by events."""

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
