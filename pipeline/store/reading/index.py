"""Read the index of a store, and check what the store was written for."""

from pathlib import Path
from typing import Any

from pipeline.data.prepared.dataset import Dataset
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import STORE
from pipeline.runtime.validation import read_model
from pipeline.store.format.schema import INDEX, StoreIndex
from pipeline.views.params import ViewsParams
from pipeline.views.policy import views_at_once

AGAIN = "dvc repro soft_targets"


def read_index(directory: Path = STORE) -> StoreIndex:
    """Read the index of a store.

    Raises:
        UserError: the index is absent, of another format version, or not valid.
    """
    return read_model(directory / INDEX, StoreIndex, produced_by=AGAIN)


def check_purpose(
    directory: Path,
    index: StoreIndex,
    dataset: Dataset,
    views: ViewsParams,
    teacher_fingerprint: str,
) -> None:
    """Raise UserError if the store is for another dataset, teacher or view plan.

    Args:
        dataset: at the size of the views.
    """
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    prepared, params = "data/prepared has", "params.yaml says"
    count = index.num_views // len(views_at_once(index.policy))
    mismatches = [
        f"`{directory}` was written for {name} {_short(actual)}, but {owner} {_short(expected)}."
        for name, actual, owner, expected in (
            ("dataset", index.dataset_fingerprint, "data/prepared is", dataset.fingerprint),
            ("teacher", index.teacher_fingerprint, "models/teacher is", teacher_fingerprint),
            ("view policy", index.policy, params, str(views.view_policy)),
            ("views.seed", index.seed, params, views.seed),
            ("views.image_size", index.image_size, params, views.image_size),
            ("views.count", count, params, views.views_or_pairs),
            ("splits", index.split_sizes, prepared, sizes),
            ("num_classes", index.num_classes, prepared, dataset.num_classes),
            ("class_names", index.class_names, prepared, list(dataset.class_names)),
        )
        if actual != expected
    ]
    if mismatches:
        raise UserError("\n".join([*mismatches, f"Run `{AGAIN}`."]))


def _short(value: Any) -> str:
    if isinstance(value, str):  # a fingerprint, or a policy
        return f"{value[:12]}…" if len(value) == 64 and value.isalnum() else value
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
