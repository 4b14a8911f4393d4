"""The views that a store is made from, by split; and its canaries, as this code augments them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.prepared.dataset import Dataset
from pipeline.store.format.schema import (
    ShardKey,
    StoreIdentity,
    canary_digests,
    canary_samples,
)
from pipeline.views.loader import Batch, EncodedViews, PairedViews, Views, open_views
from pipeline.views.policy import parse_policy


@dataclass(frozen=True)
class ViewsOfPairs:
    """The views of pairs one by one, as a store numbers them: view 2p is the weak view of pair p,
    view 2p + 1 its strong one."""

    pairs: PairedViews

    def batches(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """Yield one view of the samples of each batch, in this order."""
        pair, is_strong = divmod(view, 2)
        return (self.pairs.strong if is_strong else self.pairs.weak).batches(pair, order)


ViewsBySplit = Mapping[str, Views | EncodedViews | ViewsOfPairs]


def open_views_by_split(
    dataset: Dataset, identity: StoreIdentity, device: torch.device
) -> ViewsBySplit:
    """Open all views of every split, on a device; the dataset is at the size of the views."""
    opened = {}
    for name, split in dataset.splits.items():
        policy = parse_policy(identity.policy if name == "train" else "none")
        views = open_views(split, policy, identity.seed, device)
        opened[name] = ViewsOfPairs(views) if isinstance(views, PairedViews) else views
    return opened


def canaries_of(views: ViewsBySplit, key: ShardKey) -> np.ndarray:
    """Augment the canaries of a shard: the digests of their pixels, [K, 32] uint8."""
    (batch,) = views[key.split].batches(key.view, [canary_samples(key)])
    return canary_digests(batch.pixels.cpu().numpy())
