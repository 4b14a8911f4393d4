"""Freeze parts of a pretrained network for some epochs of fine-tuning."""

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.teacher.params import TeacherTraining


def begin_epoch(network: nn.Module, params: TeacherTraining, epoch: int) -> None:
    """Freeze what the epoch does not train. Call it on the unwrapped module after `.train()`.

    In the first `freeze_epochs` only the network's `last_layer_keys` train, and the rest is in
    evaluation mode; `freeze_batch_norm` keeps the statistics of batch norm in every epoch.

    Args:
        epoch: counted from 1.
    """
    if not (params.freeze_epochs or params.freeze_batch_norm):
        return
    head_only = epoch <= params.freeze_epochs
    last_layer: Collection[str] = getattr(network, "last_layer_keys", ())
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(not head_only or key in last_layer)
    for name, module in network.named_modules():
        is_last_layer = any(key.rpartition(".")[0] == name for key in last_layer)
        if head_only and not is_last_layer and not list(module.children()):
            module.eval()  # dropout and statistics of the frozen part
        if isinstance(module, _BatchNorm) and params.freeze_batch_norm:
            module.eval()
