"""Optimizer, learning rate schedule, gradient clipping and the average of the weights (EMA)."""

import copy
import math
from bisect import bisect_right
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.training.params import OptimisationParams


class Optimisation:
    """Updates a network's weights step by step; nothing in it waits for the device."""

    def __init__(
        self,
        network: nn.Module,
        params: OptimisationParams,
        steps_per_epoch: int,
        head: Collection[str] = frozenset(),
    ):
        """Begin at the first step. `head`: as for `make_optimizer`."""
        self.optimizer = make_optimizer(network, params, head)
        self.schedule = LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, params, steps_per_epoch)
        )
        self._network, self._clip_norm = network, params.gradient_clip_norm
        self._average = None if params.ema_decay is None else Average(network, params.ema_decay)

    @property
    def evaluated(self) -> nn.Module:
        """The network to measure and save: the average if there is one, else the trained one."""
        return self._network if self._average is None else self._average.network

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: the head's, where the backbone's differs."""
        return self.schedule.base_lrs[0] * self.schedule.lr_lambdas[0](step)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._network.parameters(), self._clip_norm)
        self.optimizer.step()
        self.schedule.step()
        if self._average is not None:
            self._average.update(self._network)

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])


class Average:
    """Exponential moving average of a network's weights and buffers, starting from its first ones:
    average = decay_t · average + (1 - decay_t) · value after step t, counted from 0.

    decay_t = min(decay, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage with
    `num_updates`: without this warm-up, a run of fewer than 1 / (1 - decay) steps would end near
    its random first weights. Integer buffers are copied.

    Uses torch's arithmetic but not its AveragedModel, which copies a counter to the device at
    every step and waits for it.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._decay, self._updates = decay, 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(decay)(*map(list, zip(*averaged, strict=True)), None)
        if counters := [pair for pair in pairs if not pair[0].is_floating_point()]:
            torch._foreach_copy_(*map(list, zip(*counters, strict=True)))

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self._updates = state["updates"]


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def make_optimizer(
    network: nn.Module, params: OptimisationParams, head: Collection[str] = frozenset()
) -> torch.optim.Optimizer:
    """Make the optimizer. Its groups: the head and the backbone, if their learning rates differ;
    in each, what has weight decay and what has none, if `norm_and_bias` is excluded from it. That
    is all but what `_weights_of_layers` finds.

    Args:
        head: names of the parameters of the last layer; read if the learning rates differ.
    """
    parts, factor = [(list(network.parameters()), 1.0)], params.backbone_learning_rate_factor
    if factor < 1:
        assert head, "a backbone has a learning rate of its own, but no head is known"
        named = list(network.named_parameters())
        parts = [
            ([p for name, p in named if name in head], 1.0),  # first: `learning_rate` is its rate
            ([p for name, p in named if name not in head], factor),
        ]
    decayed = None
    if params.weight_decay_exclusions == "norm_and_bias":
        decayed = _weights_of_layers(network)
    groups = []
    for parameters, share in parts:
        groups += _groups(parameters, params.learning_rate * share, params.weight_decay, decayed)
    fused = _fused(network)
    if params.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=params.learning_rate, fused=fused)
    optimizer = torch.optim.SGD(
        groups,
        fused=fused,
        lr=params.learning_rate,
        momentum=params.momentum,
        nesterov=params.nesterov and params.momentum > 0,
    )
    if fused and params.momentum > 0:
        # torch's fused step takes buffers for all weights of a group or for none: it fails when
        # frozen ones join. From zero, a buffer's first value is the gradient, as without.
        for parameter in network.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _fused(network: nn.Module) -> bool | None:
    """Whether one operation updates all parameters; it rounds otherwise: never on the CPU."""
    return True if next(network.parameters()).device.type == "cuda" else None


def _groups(
    parameters: list[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    decayed: set[int] | None,
) -> list[dict[str, Any]]:
    """One group, or two if only the parameters whose ids are in `decayed` have weight decay."""
    with_decay = {"params": parameters, "lr": learning_rate, "weight_decay": weight_decay}
    if decayed is None:
        return [with_decay]
    return [
        with_decay | {"params": [p for p in parameters if id(p) in decayed]},
        with_decay
        | {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def _weights_of_layers(network: nn.Module) -> set[int]:
    """Find the ids of the parameters that multiply features: of two or more dimensions, and named
    `weight` or `..._weight` or, in recurrent layers, `weight_...`, as torch's layers have them.

    The others are weights of normalisation, biases, and what attention networks add to features or
    prepend: position embeddings, relative positions, class tokens, scales of layers. What a module
    names in `no_weight_decay()`, as timm's networks do, and embeddings are among the others. Of a
    weight that is computed (`parametrizations.weight`), what it is computed from counts.
    """
    found = set()
    for path, module in network.named_modules():
        if isinstance(module, nn.Embedding | nn.LayerNorm | nn.RMSNorm):
            continue
        computed = path.endswith("parametrizations.weight")
        for name, parameter in module.named_parameters(recurse=False):
            recurrent = isinstance(module, nn.RNNBase) and name.startswith("weight_")
            if parameter.ndim > 1 and (computed or recurrent or name.endswith("weight")):
                found.add(id(parameter))
    for module in network.modules():
        excluded = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        if excluded:
            found -= {id(p) for name, p in module.named_parameters() if name in {*excluded}}
    return found


def learning_rate_factor(step: int, params: OptimisationParams, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0, as a fraction of the peak.

    It rises linearly during the warm-up, then follows the schedule. cosine: half a cosine down to 0
    at the end (Loshchilov, Hutter 2017, arXiv:1608.03983, without restarts); step: multiplied by
    `decay_factor` from the first step after each milestone; constant: 1.
    """
    steps, warmup_steps = params.epochs * steps_per_epoch, params.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if params.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
    if params.schedule == "step":
        return params.decay_factor ** bisect_right(params.milestones, step // steps_per_epoch)
    return 1.0


def batches(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Split the order into batches. A last batch of one sample joins the batch before it, because
    batch norm refuses one sample."""
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [np.concatenate(parts[-2:])]
    return parts
