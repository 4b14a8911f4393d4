"""One training in several processes, with the results of one process up to floating-point order.

Every global batch is shared among the ranks. Batch norm takes its statistics over the whole of it,
and every rank computes the loss of the whole of it; docs/decisions/0008 says why. Contract code,
for the teacher trains with it: an edit here runs the teacher again.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pipeline.compute.distributed import ProcessGroup
from pipeline.data.prepared.dataset import AnySplit
from pipeline.models.checkpoint import InputSpec
from pipeline.models.evaluation import BATCH_SIZE, predict_all
from pipeline.runtime.derived_random import hash64


def wrap_ddp(network: nn.Module, group: ProcessGroup) -> nn.Module:
    """The network as every rank calls it in training: its gradients are averaged over the ranks.

    Changes its batch norms in place to synchronised ones, with the same state dict.
    """
    if group.size == 1:
        return network
    device = next(network.parameters()).device
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    else:
        synchronise_batch_norm(network)
    return DistributedDataParallel(network)


def seed_rank(seed: int, group: ProcessGroup) -> None:
    """Give every rank but the first random numbers of its own, for dropout."""
    if not group.is_main:
        torch.manual_seed(int(hash64(seed, group.rank) >> np.uint64(1)))


def local_rows(samples: np.ndarray, group: ProcessGroup) -> np.ndarray:
    """This rank's part of a global batch; none of it where it has fewer samples than ranks."""
    return np.array_split(samples, group.size)[group.rank]


def gather_rows(own: Tensor, count: int, group: ProcessGroup) -> Tensor:
    """The rows of a global batch of `count` samples, of which this rank has computed its share.

    Its own rows keep their gradient, those of others have none.
    """
    if group.size == 1:
        return own
    sizes = [len(part) for part in np.array_split(np.empty(count), group.size)]
    start = sum(sizes[: group.rank])
    stop = start + sizes[group.rank]
    rows = own.new_zeros(count, *own.shape[1:])
    rows[start:stop] = own.detach()
    distributed.all_reduce(rows)  # the others' places hold zeros: exact
    return torch.cat([rows[:start], own, rows[stop:]])


def scale_for_ddp(loss: Tensor, group: ProcessGroup) -> Tensor:
    """The loss of the whole batch, of which each rank differentiates its own rows: times the
    number of ranks, so that the average of their gradients is the gradient of the loss."""
    return loss * group.size if group.size > 1 else loss


def predict_distributed(
    network: nn.Module,
    spec: InputSpec,
    split: AnySplit,
    *,
    device: torch.device,
    group: ProcessGroup,
) -> Tensor:
    """`predict_all`, every image once, on every rank: in the batches of one process, shared."""
    if group.size == 1:
        return predict_all(network, spec, split, device=device)
    batches = -(-len(split) // BATCH_SIZE)
    bounds = np.minimum(np.arange(group.size + 1) * batches // group.size * BATCH_SIZE, len(split))
    start, stop = bounds[group.rank : group.rank + 2]
    own = None
    if stop > start:
        own = predict_all(network, spec, split, device=device, samples=np.arange(start, stop))
    return torch.cat([part for part in group.gather(own) if part is not None])


def synchronise_batch_norm(network: nn.Module) -> None:
    """In place: every batch norm takes its statistics over all ranks. For any device and backend;
    torch's own SyncBatchNorm is for CUDA alone."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            # Another forward is all that changes: weights, buffers and hooks stay where they are.
            module.__class__ = SynchronisedBatchNorm


class SynchronisedBatchNorm(_BatchNorm):
    """Batch norm (Ioffe, Szegedy 2015, arXiv:1502.03167) whose batch is that of all ranks, each
    with any number of rows, none too. In float32 or wider; in evaluation, torch's own."""

    def _check_input_dim(self, features: Tensor) -> None:
        pass  # any number of dimensions

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...] of the same dtype."""
        if not self.training:
            return super().forward(features)
        with torch.autocast(features.device.type, enabled=False):
            wide = features.to(torch.promote_types(features.dtype, torch.float32))
            return self._normalised(wide).to(features.dtype)

    def _normalised(self, features: Tensor) -> Tensor:
        others = [d for d in range(features.ndim) if d != 1]
        shape = [1, -1, *[1] * (features.ndim - 2)]
        own = features.new_tensor([features.numel() // features.shape[1]])
        totals = _SummedOverRanks.apply(torch.cat([features.sum(others), own]))  # [C + 1]
        count, mean = totals[-1].detach(), totals[:-1] / totals[-1].detach()
        centred = features - mean.view(shape)
        # A second sum, of squared deviations: from squares of the features themselves, a channel
        # whose mean is large would lose its variance to rounding.
        variance = _SummedOverRanks.apply(centred.square().sum(others)) / count  # [C]
        self._update_statistics(mean.detach(), variance.detach() * count / (count - 1))
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if not self.affine:
            return normalised
        return normalised * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked += 1
        # None: the plain average of all batches.
        rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean += rate * (mean - self.running_mean)
        self.running_var += rate * (unbiased_variance - self.running_var)


class _SummedOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor, on every rank; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return _SummedOverRanks.apply(gradient)
