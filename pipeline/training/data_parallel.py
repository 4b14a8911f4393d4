"""One training in several processes, with the results of one process up to floating-point order.

The ranks divide every batch. Batch norm takes its statistics over the whole batch, and every rank
computes the loss of the whole batch; docs/decisions/0008 says why.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pipeline.compute.distributed import ProcessGroup
from pipeline.data.prepared.dataset import AnySplit
from pipeline.models.evaluation import predict_all
from pipeline.models.spec import InputSpec
from pipeline.runtime.derived_random import hash64
from pipeline.runtime.errors import UserError
from pipeline.views.loader import BATCH_SIZE, AnyViews


def wrap_ddp(network: nn.Module, group: ProcessGroup) -> nn.Module:
    """The network whose gradients are averaged over the ranks, to call in training.

    The gradients are those of the parameters that require one now. Replaces the network's batch
    norms in place by synchronised ones with the same state dict; a second call leaves them.

    Raises:
        UserError: a batch norm cannot be synchronised; on the main process alone.
    """
    if group.size == 1:
        return network
    if group.is_main or all(map(_synchronised_class, _batch_norms(network))):
        synchronise_batch_norm(network)
    return DistributedDataParallel(network)


def seed_rank(seed: int, group: ProcessGroup) -> None:
    """Seed every rank but the first differently, for dropout."""
    if not group.is_main:
        torch.manual_seed(int(hash64(seed, group.rank) >> np.uint64(1)))


def local_rows(samples: np.ndarray, group: ProcessGroup) -> np.ndarray:
    """This rank's part of a batch; empty if the batch has fewer samples than there are ranks."""
    return np.array_split(samples, group.size)[group.rank]


def gather_rows(local: Tensor, count: int, group: ProcessGroup) -> Tensor:
    """All rows of a batch of `count` samples, from every rank's part.

    The rows of this rank keep their gradient; the others have none.
    """
    if group.size == 1:
        return local
    sizes = [len(part) for part in np.array_split(np.empty(count), group.size)]
    start = sum(sizes[: group.rank])
    stop = start + sizes[group.rank]
    rows = local.new_zeros(count, *local.shape[1:])
    rows[start:stop] = local.detach()
    distributed.all_reduce(rows)  # every other rank adds zeros here: exact
    return torch.cat([rows[:start], local, rows[stop:]])


def scale_for_ddp(loss: Tensor, group: ProcessGroup) -> Tensor:
    """The loss times the number of ranks. Each rank differentiates its own rows alone, so the
    average of the ranks' gradients is then the gradient of the loss of the whole batch."""
    return loss * group.size if group.size > 1 else loss


def predict_distributed(
    network: nn.Module,
    spec: InputSpec,
    split: AnySplit,
    *,
    device: torch.device,
    group: ProcessGroup,
    views: AnyViews | None = None,
) -> Tensor:
    """Distributed `predict_all`: the same batch boundaries as in one process, the result on every
    rank."""
    batches = -(-len(split) // BATCH_SIZE)
    bounds = np.minimum(np.arange(group.size + 1) * batches // group.size * BATCH_SIZE, len(split))
    start, stop = bounds[group.rank : group.rank + 2]
    local = None
    if stop > start:
        samples = np.arange(start, stop)
        local = predict_all(network, spec, split, device=device, samples=samples, views=views)
    return torch.cat([part for part in group.gather(local) if part is not None])


def synchronise_batch_norm(network: nn.Module) -> None:
    """Make every batch norm take its statistics over all ranks, in place.

    Raises:
        UserError: a batch norm computes more than torch's and timm's do.
    """
    for module in _batch_norms(network):
        synchronised = _synchronised_class(module)
        if synchronised is None:
            raise UserError(
                f"the network has a batch norm `{type(module).__name__}`, whose forward pass is "
                "its own; expected one of torch or timm, of which several processes can share the "
                "statistics. Unset PROCESSES, or use another layer."
            )
        # Only `forward` changes: weights, buffers and hooks stay.
        module.__class__ = synchronised


def _batch_norms(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def _is_of_torch(module: _BatchNorm) -> bool:
    return type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _synchronised_class(module: _BatchNorm) -> type[_BatchNorm] | None:
    """The class that a batch norm gets; None if there is none that computes the same."""
    if isinstance(module, SynchronisedBatchNorm):
        return type(module)
    if _is_of_torch(module):
        return SynchronisedBatchNorm
    # As in timm's BatchNormAct2d.
    if {name for name, _ in module.named_children()} == {"drop", "act"}:
        return SynchronisedBatchNormAct
    return None


class SynchronisedBatchNorm(_BatchNorm):
    """Batch norm (Ioffe, Szegedy 2015, arXiv:1502.03167) over the rows of all ranks, on any device;
    a rank may have no row. Computes in float32 or wider; in evaluation it is torch's batch norm.

    torch's SyncBatchNorm knows CUDA and torch's own classes alone, waits for the GPU at every
    layer, and under autocast a rank without a row exchanges another type than the others.
    """

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
        reduced = [d for d in range(features.ndim) if d != 1]
        shape = [1, -1, *[1] * (features.ndim - 2)]
        # Filled on the device: a copy from the host would wait for its queue.
        local_count = features.new_full((1,), features.numel() // features.shape[1])
        totals = _SummedOverRanks.apply(torch.cat([features.sum(reduced), local_count]))  # [C + 1]
        count, mean = totals[-1].detach(), totals[:-1] / totals[-1].detach()
        centred = features - mean.view(shape)
        # A second sum, of squared deviations: from squares of the features themselves, a channel
        # whose mean is large would lose its variance to rounding.
        variance = _SummedOverRanks.apply(centred.square().sum(reduced)) / count  # [C]
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


class SynchronisedBatchNormAct(SynchronisedBatchNorm):
    """Batch norm, then its own dropout and activation, as in timm's networks."""

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...] of the same dtype."""
        return self.act(self.drop(super().forward(features)))


class _SummedOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor, on every rank. Its gradient is the sum of all gradients."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return _SummedOverRanks.apply(gradient)
