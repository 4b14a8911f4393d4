"""The schema of the store: its identity, its shards, their attributes and canaries.

docs/soft_targets_format.md is normative.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, PositiveInt, model_validator

from pipeline.data.prepared.dataset import SPLITS
from pipeline.runtime.validation import Record
from pipeline.views.policy import views_at_once

FORMAT_VERSION = 2
INDEX = "store.json"
SHARD_SAMPLES = 16_384
CANARIES = 4  # images per shard


class StoreIdentity(Record):
    """What defines the rows of a store; the same in every shard, for any number of views."""

    dataset_fingerprint: str
    teacher_fingerprint: str
    policy: str  # of `train`, as text, or of a pair; the other splits are not augmented
    seed: int  # of the view plan
    image_size: PositiveInt  # pixels, the side of a view
    encoding: Literal["dense", "top_k"]
    k: PositiveInt | None = None  # for top_k alone
    precision: str  # of the teacher's forward pass
    num_classes: PositiveInt

    @model_validator(mode="after")
    def _has_k_for_top_k(self) -> "StoreIdentity":
        possible = range(1, self.num_classes + 1)
        if (self.encoding == "top_k") != (self.k in possible):
            raise ValueError(
                f"k is {self.k}; expected 1 to {self.num_classes} for top_k, and no k for dense"
            )
        return self

    def fields(self) -> dict[str, int | str]:
        """The identity as shards and the index hold it: `k` is absent for dense."""
        values = {name: getattr(self, name) for name in StoreIdentity.model_fields}
        return {name: value for name, value in values.items() if value is not None}


class StoreIndex(StoreIdentity):
    """The content of `store.json`: the identity, and which shards there are."""

    model_config = ConfigDict(extra="ignore")  # another writer may add keys

    format_version: int
    split_sizes: Mapping[Literal[SPLITS], PositiveInt] = Field(alias="splits")
    num_views: PositiveInt
    fidelity: Mapping[str, int | float]  # as the writer measured it; may be empty
    class_names: list[str]

    @model_validator(mode="before")
    @classmethod
    def _is_of_this_version(cls, content: Any) -> Any:
        version = content.get("format_version") if isinstance(content, dict) else FORMAT_VERSION
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            advice = ": update Teach Once" if newer else ""
            raise ValueError(f"format version {version}; expected {FORMAT_VERSION}{advice}")
        return content

    @model_validator(mode="after")
    def _names_every_class(self) -> "StoreIndex":
        if len(self.class_names) != self.num_classes:
            raise ValueError(
                f"num_classes is {self.num_classes}, but there are {len(self.class_names)} "
                "class_names; expected one for each"
            )
        return self

    @model_validator(mode="after")
    def _has_both_views_of_each_pair(self) -> "StoreIndex":
        if self.num_views % len(views_at_once(self.policy)):
            raise ValueError(
                f"num_views is {self.num_views}, but the views of `{self.policy}` are pairs; "
                "expected an even number"
            )
        return self

    def shards(self) -> Iterator["ShardKey"]:
        return shard_keys(self.split_sizes, self.num_views)

    def content(self) -> dict[str, Any]:
        """Return what the file holds, in its order."""
        others = self.model_dump(by_alias=True, exclude=set(StoreIdentity.model_fields))
        return {"format_version": others.pop("format_version"), **self.fields(), **others}


@dataclass(frozen=True)
class ShardKey:
    """The rows of one shard: consecutive samples of one view of one split."""

    split: str
    view: int
    first_sample: int
    num_samples: int

    @property
    def file_name(self) -> str:
        return f"{self.split}_view{self.view:05d}_sample{self.first_sample:09d}.h5"


def shard_keys(split_sizes: Mapping[str, int], num_views: int) -> Iterator[ShardKey]:
    """Yield every shard of a store: each view of `train`, and one view of the other splits."""
    for split, size in split_sizes.items():
        for view in range(num_views if split == "train" else 1):
            for first in range(0, size, SHARD_SAMPLES):
                yield ShardKey(split, view, first, min(SHARD_SAMPLES, size - first))


def policy_of(identity: StoreIdentity, key: ShardKey) -> str:
    """The view policy of a shard: `none` for all splits but `train`. Of pairs, the even views are
    the weak ones, and the odd views the strong ones."""
    policies = views_at_once(identity.policy) if key.split == "train" else ("none",)
    return policies[key.view % len(policies)]


def shard_attributes(identity: StoreIdentity, key: ShardKey) -> dict[str, int | str]:
    """A shard's attributes in their order, without the checksums of its datasets."""
    return {
        "format_version": FORMAT_VERSION,
        **identity.fields(),
        "policy": policy_of(identity, key),
        **asdict(key),
    }


def canary_samples(key: ShardKey) -> np.ndarray:
    """Sample numbers of the shard's canaries, [<= CANARIES] int64, spread evenly."""
    count = min(CANARIES, key.num_samples)
    return key.first_sample + np.arange(count) * (key.num_samples - 1) // max(1, count - 1)


def canary_digests(pixels: np.ndarray) -> np.ndarray:
    """SHA-256 of each image's pixels: [K, C, H, W] uint8 -> [K, 32] uint8."""
    digests = b"".join(hashlib.sha256(image).digest() for image in np.ascontiguousarray(pixels))
    return np.frombuffer(digests, np.uint8).reshape(len(pixels), 32)


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
