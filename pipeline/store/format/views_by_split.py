"""The views that a store is made from, by split; and its canaries, as this code augments them."""

from collections.abc import Mapping

import numpy as np
import torch

from pipeline.data.prepared.dataset import Dataset
from pipeline.store.format.schema import (
    ShardKey,
    StoreIdentity,
    canary_digests,
    canary_samples,
    policy_of,
)
from pipeline.views.loader import EncodedViews, Views, open_views
from pipeline.views.policy import ViewPolicy

ViewsBySplit = Mapping[str, Views | EncodedViews]


def open_views_by_split(
    dataset: Dataset, identity: StoreIdentity, device: torch.device
) -> ViewsBySplit:
    """Open all views of every split, on a device; the dataset is at the size of the views."""
    return {
        name: open_views(split, ViewPolicy.parse(policy_of(identity, name)), identity.seed, device)
        for name, split in dataset.splits.items()
    }


def canaries_of(views: ViewsBySplit, key: ShardKey) -> np.ndarray:
    """Augment the canaries of a shard: the digests of their pixels, [K, 32] uint8."""
    (batch,) = views[key.split].batches(key.view, [canary_samples(key)])
    return canary_digests(batch.pixels.cpu().numpy())
