"""Auxiliary heads: classifiers on inner layers, for training alone.

A family that has them defines a context manager `auxiliary_heads(network, name, num_classes,
size)`. While it is open, the network's forward pass in training returns its logits alone, and puts
those of the heads into `network.auxiliary_logits`, [(weight in the loss, logits [B, C]), ...]. When
it closes, it removes the heads: no saved weights, parameter count or prediction includes them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.spec import ModelSpec, family_module


@contextmanager
def heads(network: nn.Module, spec: ModelSpec) -> Iterator[None]:
    """Add the auxiliary heads that the family defines, if any, while open. Open it before the
    optimizer takes the parameters."""
    family = family_module(spec.family)
    if not hasattr(family, "auxiliary_heads"):
        yield
        return
    with family.auxiliary_heads(network, spec.network, spec.num_classes, spec.input.size):
        yield


def loss(network: nn.Module, labels: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """The weighted sum of the heads' cross-entropies in the last forward pass: mean over B, in
    nats; 0 without heads. The network may be wrapped.

    Args:
        labels: [B], of the whole batch.
        gather: from the rows of this process to the rows of the whole batch.
    """
    total = torch.zeros((), device=labels.device)
    for module in network.modules():
        for weight, logits in getattr(module, "auxiliary_logits", ()):
            total = total + weight * F.cross_entropy(gather(logits.float()), labels)
    return total
