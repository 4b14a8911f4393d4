"""The logits of a teacher without a network: the rows of another system's store."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.data.prepared.dataset import Dataset
from pipeline.models.checkpoint import LogitSource
from pipeline.models.evaluation import check_imported
from pipeline.models.spec import family_module
from pipeline.runtime.errors import UserError, counted
from pipeline.runtime.outputs import TEACHER
from pipeline.runtime.validation import read_model
from pipeline.store.format.schema import INDEX, SHARD_SAMPLES, ShardKey, StoreIdentity, StoreIndex
from pipeline.store.format.shards import ShardError, check_shard, read_header
from pipeline.store.format.views_by_split import ViewsBySplit, canaries_of, open_views_by_split
from pipeline.views.policy import parse_policy, views_at_once

_IMPORT = "python -m pipeline.commands.import_logits TABLE"
#: What the views of a store are made by, with the names of these parameters.
_OF_VIEWS = {"view policy": "policy", "views.seed": "seed"}
_OF_ROWS = {"views.image_size": "image_size", "soft_targets.precision": "precision"}


class ImportedLogits:
    """Teacher logits from a store of another system; each shard is verified before use."""

    def __init__(self, path: Path, index: StoreIndex, views: ViewsBySplit, *, shared: bool):
        """Take the index of the store, and the views that it was written for.

        Args:
            shared: every view of an image has the logits of its view 0.
        """
        self.unit, self.shared = f"rows of `{path}`", shared
        self._path, self._index, self._views = path, index, views
        self._shards: dict[ShardKey, np.ndarray] = {}

    @property
    def remarks(self) -> Sequence[str]:
        if not self.shared:
            return ()
        return (f"{self._path} has one row per image, which is used for every view of it",)

    def logits(self, split: str, view: int, samples: np.ndarray) -> np.ndarray:
        """Look up one view of n samples: [n, num_classes] float32, raw.

        Raises:
            UserError: a shard is damaged, or was written for other views or images.
        """
        rows = np.empty((len(samples), self._index.num_classes), np.float32)
        firsts = samples // SHARD_SAMPLES * SHARD_SAMPLES
        for first in np.unique(firsts).tolist():
            count = min(SHARD_SAMPLES, self._index.split_sizes[split] - first)
            key = ShardKey(split, 0 if self.shared else view, first, count)
            in_shard = firsts == first
            rows[in_shard] = self._shard(key)[samples[in_shard] - first]
        return rows

    def _shard(self, key: ShardKey) -> np.ndarray:
        """[num_samples, num_classes] float16, mapped into memory."""
        if key in self._shards:
            return self._shards[key]
        path = self._path / key.file_name
        try:
            check_shard(path, self._index, key, canaries_of(self._views, key))
        except ShardError as error:
            raise UserError(
                f"`{path}` {error}. Write the store again, as docs/soft_targets_format.md "
                "specifies."
            ) from None
        logits = read_header(path).arrays["logits"].map()
        check_imported(
            logits.astype(np.float32),
            self._index.class_names,
            str(path),
            lambda row: f"sample {key.first_sample + row}",
        )
        self._shards[key] = logits
        return logits

    def in_float32(self, split: str, view: int, samples: np.ndarray) -> None:
        """None: the rows are all that there is."""

    def seconds(self) -> float | None:
        """None: there is no forward pass."""
        return None


def open_imported(
    description: LogitSource,
    dataset: Dataset,
    identity: StoreIdentity,
    num_views: int,
    views: ViewsBySplit,
    device: torch.device,
) -> ImportedLogits:
    """Open the store that the teacher was made from.

    Raises:
        UserError: its logits have changed since, or are not for these views.
    """
    path = Path(description.path)
    source = family_module(description.family).open_source(path, dataset)
    if source.contents_sha256 != description.contents_sha256:
        raise UserError(
            f"`{path}` holds other logits than those that `{TEACHER.model}` was made from. Run "
            f"`dvc repro {TEACHER.stage}`."
        )
    index = read_model(path / INDEX, StoreIndex, produced_by=_IMPORT)
    shared = index.policy == "none" != identity.policy
    if shared and parse_policy(identity.policy).mix is not None:
        raise UserError(
            f"`{path}` has one row of logits for an image, but `views.mix` mixes two images in a "
            "view. Set `views.mix: none`, or import a row for each view."
        )
    differing = [
        f"`{path}` was written for {name} {getattr(index, field)}, but params.yaml says "
        f"{getattr(identity, field)}."
        for name, field in (_OF_ROWS if shared else _OF_VIEWS | _OF_ROWS).items()
        if getattr(index, field) != getattr(identity, field)
    ]
    if differing:
        advice = (
            "Set params.yaml to these values, or write the store for those of params.yaml: a table "
            f"by `{_IMPORT}`."
        )
        raise UserError("\n".join([*differing, advice]))
    if not shared and index.num_views < num_views:
        together = len(views_at_once(identity.policy))
        words = ("view", "views") if together == 1 else ("pair of views", "pairs of views")
        raise UserError(
            f"`{path}` has {counted(index.num_views // together, *words)} of the training images, "
            f"but `views.count` is {num_views // together}. Set it to "
            f"{index.num_views // together}, or import more views."
        )
    return ImportedLogits(
        path, index, open_views_by_split(dataset, index, device) if shared else views, shared=shared
    )
