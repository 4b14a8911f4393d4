"""Freeze parts of a pretrained network for some epochs of fine-tuning."""

from collections.abc import Callable, Collection

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.training.params import OptimisationParams


class FineTuning:
    """Which parameters and statistics of a network each epoch trains.

    In the first `freeze_epochs` only the last layer trains, and the rest is in evaluation mode;
    `freeze_batch_norm` keeps the statistics of batch norm in every epoch.
    """

    def __init__(
        self,
        network: nn.Module,
        params: OptimisationParams,
        head: Collection[str],
        wrap: Callable[[nn.Module], nn.Module],
    ):
        """Plan the epochs.

        Args:
            head: names of the parameters of the last layer; read if `params.separates_head`.
            wrap: compiles the network, or lets processes train it together. It is called again when
                other parameters begin to train: processes exchange the gradients of those that
                trained when it was called.
        """
        self._network, self._params, self._head, self._wrap = network, params, head, wrap
        # A network may have parameters that it never trains.
        self._trainable = [p for p in network.named_parameters() if p[1].requires_grad]
        self._forward: nn.Module | None = None

    def begin_epoch(self, epoch: int) -> nn.Module:
        """Put the network into training mode for an epoch, counted from 1. Returns the wrapped one,
        to call in this epoch."""
        self._network.train()
        head_only = epoch <= self._params.freeze_epochs
        changed = self._train_parameters(head_only)
        around_head = _modules_around(self._head)
        for name, module in self._network.named_modules():
            if isinstance(module, _BatchNorm) and self._params.freeze_batch_norm:
                module.eval()
            if head_only and name not in around_head:
                module.eval()  # dropout and statistics of the frozen part
        if self._forward is None or changed:
            self._forward = self._wrap(self._network)
        return self._forward

    def _train_parameters(self, head_only: bool) -> bool:
        """Whether this changes which parameters train."""
        changed = False
        for name, parameter in self._trainable:
            trains = not head_only or name in self._head
            changed |= parameter.requires_grad != trains
            parameter.requires_grad_(trains)
        return changed


def _modules_around(parameters: Collection[str]) -> set[str]:
    """Names of the modules that hold the parameters: for `a.b.weight`, the root, `a` and `a.b`."""
    parts = [name.split(".") for name in parameters]
    return {".".join(part[:depth]) for part in parts for depth in range(len(part))}
