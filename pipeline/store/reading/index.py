"""Read `store.json`, and check what the store was written for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.data.prepared.dataset import SPLITS, Dataset
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import STORE
from pipeline.store.format.schema import (
    FORMAT_VERSION,
    INDEX,
    ShardKey,
    StoreIdentity,
    shard_keys,
)
from pipeline.views.params import ViewsParams

AGAIN = "dvc repro soft_targets"


@dataclass(frozen=True)
class StoreIndex:
    """The content of `store.json`."""

    format_version: int
    identity: StoreIdentity
    split_sizes: Mapping[str, int]
    num_views: int
    class_names: Sequence[str]  # empty for format 1, whose shards have them
    fidelity: Mapping[str, float]  # as the writer measured it; empty for format 1

    def shards(self) -> Iterator[ShardKey]:
        return shard_keys(self.split_sizes, self.num_views)


def read_index(directory: Path = STORE) -> StoreIndex:
    """Read the index of a store.

    Raises:
        UserError: the index is absent, of an unknown format version, or not valid.
    """
    path = directory / INDEX
    content = read_json(path, produced_by=AGAIN)
    version = content.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        newer = isinstance(version, int) and version > FORMAT_VERSION
        remedy = "Update Teach Once" if newer else f"Run `{AGAIN}`"
        raise UserError(
            f"`{path}` has format version {version}; expected 1 to {FORMAT_VERSION}. {remedy}."
        )
    _check_types(path, content, version)
    index = StoreIndex(
        version,
        StoreIdentity(**{field.name: content.get(field.name) for field in fields(StoreIdentity)}),
        content["splits"],
        content["num_views"],
        content.get("class_names", []),
        content.get("fidelity", {}),
    )
    if problem := _invalid_value(index):
        raise UserError(f"`{path}` has {problem}. Run `{AGAIN}`.")
    return index


def _check_types(path: Path, content: Mapping[str, Any], version: int) -> None:
    """Raise UserError if a key is absent, or its value has another type."""
    expected = {field.name: field.type for field in fields(StoreIdentity)}
    expected |= {"splits": dict, "num_views": int}
    expected |= {"class_names": list, "fidelity": dict} if version > 1 else {}
    for key, value_type in expected.items():
        if key not in content and key != "k":
            raise UserError(f"`{path}` lacks '{key}'. Run `{AGAIN}`.")
        if not isinstance(content.get(key), value_type):
            name = getattr(value_type, "__name__", value_type)
            raise UserError(f"`{path}` has {key} {content[key]!r}; expected {name}. Run `{AGAIN}`.")


def _invalid_value(index: StoreIndex) -> str | None:
    """Describe the first value that no store can have."""
    identity, names = index.identity, index.class_names
    num_classes, k = identity.num_classes, identity.k
    if index.format_version > 1 and (
        len(names) != num_classes or not all(isinstance(name, str) for name in names)
    ):
        return f"num_classes {num_classes} and {len(names)} class_names; expected a text for each"
    counts = [index.num_views, num_classes, *index.split_sizes.values()]
    if not index.split_sizes.keys() <= set(SPLITS) or not all(
        type(count) is int and count > 0 for count in counts
    ):
        return (
            f"num_views {index.num_views}, num_classes {num_classes} and splits "
            f"{index.split_sizes}; expected integers from 1, for {', '.join(SPLITS)}"
        )
    known = ("dense",) if index.format_version == 1 else ("dense", "top_k")
    if identity.encoding not in known:
        return (
            f"encoding {identity.encoding}; known in format {index.format_version}: "
            f"{', '.join(known)}"
        )
    if (identity.encoding == "top_k") != (k in range(1, num_classes + 1)):
        return f"k {k}; expected 1 to {num_classes} for top_k, and no k for dense"
    return None


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
    identity = index.identity
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    names = list(dataset.class_names) if index.format_version > 1 else []
    prepared, params = "data/prepared has", "params.yaml says"
    mismatches = [
        f"`{directory}` was written for {name} {_short(actual)}, but {owner} {_short(expected)}."
        for name, actual, owner, expected in (
            ("dataset", identity.dataset_fingerprint, "data/prepared is", dataset.fingerprint),
            ("teacher", identity.teacher_fingerprint, "models/teacher is", teacher_fingerprint),
            ("view policy", identity.policy, params, str(views.view_policy)),
            ("views.seed", identity.seed, params, views.seed),
            ("views.image_size", identity.image_size, params, views.image_size),
            ("views.count", index.num_views, params, views.num_views),
            ("splits", index.split_sizes, prepared, sizes),
            ("num_classes", identity.num_classes, prepared, dataset.num_classes),
            ("class_names", index.class_names, prepared, names),
        )
        if actual != expected
    ]
    if mismatches:
        raise UserError("\n".join([*mismatches, f"Run `{AGAIN}`."]))


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}…"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
