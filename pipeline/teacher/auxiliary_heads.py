"""Auxiliary heads: classifiers on inner layers that only training has.

A family has them by a context manager `auxiliary_heads(network, name, num_classes, size)`. While it
is open, the network's forward pass in training returns its logits alone, like any other's, and
leaves the heads' in `network.auxiliary_logits`, [(weight in the loss, logits [B, C]), ...]; when it
closes, the heads are gone. So they are in no saved weights, no count of parameters and no answer.

Contract code: an edit here runs the teacher again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.spec import ModelSpec, family_module


@contextmanager
def heads(network: nn.Module, description: ModelSpec) -> Iterator[None]:
    """While open, the network has the auxiliary heads that its family gives it, if any. To be
    opened before an optimiser takes the parameters."""
    family = family_module(description.family)
    if not hasattr(family, "auxiliary_heads"):
        yield
        return
    spec = description.input
    with family.auxiliary_heads(network, description.network, description.num_classes, spec.size):
        yield


def loss(network: nn.Module, labels: Tensor, whole: Callable[[Tensor], Tensor]) -> Tensor:
    """The heads' share of the loss of the forward pass just done: their cross-entropies, mean over
    B, in nats, each times its weight; 0 without heads. The network may be wrapped.

    Args:
        labels: [B] of the global batch.
        whole: from the rows that this process has computed to those of the global batch.
    """
    total = torch.zeros((), device=labels.device)
    for module in network.modules():
        for weight, logits in getattr(module, "auxiliary_logits", ()):
            total = total + weight * F.cross_entropy(whole(logits.float()), labels)
    return total
