"""Replay a network's forward and backward pass on a GPU as CUDA graphs: one launch each, where a
small network launches hundreds of kernels and the GPU waits for the host between them.

The views, the loss, clipping, the optimizer and the average of the weights stay outside. A graph
repeats the numbers and addresses of its capture, and theirs change: a loss's weight, temperature
and view, learning rates and the average's decay are numbers on the host, and `zero_grad` frees the
gradients of a step.

No GPU has run this yet. So nothing is taken on trust: before the first replay of a shape counts,
its logits, gradients and buffers are compared with those of the network itself, and if they differ,
or if anything fails, one line says why and no more is captured.
"""

import gc
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.compute.device import fits
from pipeline.compute.distributed import ProcessGroup
from pipeline.runtime.errors import first_line
from pipeline.views.loader import AnyViews, Views

#: A run of at least so many steps is captured: capturing and comparing takes as long as some tens.
CAPTURED_STEPS = 1000
CAPTURED_SHAPES = 2  # of full batches, and of the last one of an epoch
_NOISE = 4  # times the difference of two passes of the network itself, which may not be exact
_EPSILON = torch.finfo(torch.float32).eps  # two inexact passes can be equal by chance


def capture_long_runs(
    network: nn.Module, views: AnyViews, device: torch.device, steps: int, group: ProcessGroup
) -> nn.Module:
    """Return the network, to be captured on CUDA if the run has at least CAPTURED_STEPS.

    Several processes exchange statistics and gradients within a pass, and encoded images have a
    thread that pins memory at the moment of capturing: both run as before. Both networks share
    their weights; take state dicts from the original.
    """
    pays = device.type == "cuda" and steps >= CAPTURED_STEPS
    if not pays or group.size > 1 or not isinstance(views, Views) or not CapturedNetwork.works:
        return network
    return CapturedNetwork(network)


class CapturedNetwork(nn.Module):
    """A network that is captured for each of the first CAPTURED_SHAPES shapes of its inputs, when
    it first sees one. Inputs of other shapes, and all after a capture that failed, pass through the
    network itself; what was captured and verified before is still replayed. To call in training
    alone."""

    works = True  # until it has failed in this process

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self._replays: dict[torch.Size, Callable[[Tensor], Tensor]] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        shape = inputs.shape
        if shape not in self._replays and len(self._replays) < CAPTURED_SHAPES and self.works:
            replay, problem = _verified(self.network, inputs)
            if problem is None:
                self._replays[shape] = replay
            else:
                CapturedNetwork.works = False
                if os.environ.get("RANK", "0") == "0":
                    print(f"  a CUDA graph cannot work here: not used ({problem})", flush=True)
        return self._replays.get(shape, self.network)(inputs)


def _verified(
    network: nn.Module, inputs: Tensor
) -> tuple[Callable[[Tensor], Tensor] | None, str | None]:
    """Capture a network, and compare it with itself; returns the replay, or why there is none.

    Leaves no trace in buffers, random numbers and `grad`. Five passes of the network and two
    replays; each pair begins from equal buffers and random numbers, and sees other inputs than
    those that were captured.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    owners = [(module, dict(module._buffers)) for module in network.modules()]
    buffers = list(network.buffers())
    before = [_copy(buffer) for buffer in buffers]

    def restore() -> None:
        for module, owned in owners:
            module._buffers.update(owned)
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def two_passes(called: Callable[[Tensor], Tensor]) -> list[Tensor]:
        restore()
        torch.manual_seed(0)
        passes = [*_pass(called, inputs.flip(0), trained), *_pass(called, inputs, trained)]
        return [*passes, *(_copy(buffer).double() for buffer in buffers)]

    replay = problem = None
    with torch.random.fork_rng([inputs.device] * (inputs.device.type == "cuda")):
        try:
            expected, again = two_passes(network), two_passes(network)
            if any(a is not b for a, b in zip(network.buffers(), buffers, strict=True)):
                problem = "the network replaces its buffers"  # a replay would not see the new ones
            elif not torch.equal(expected[0], again[0]):
                problem = "equal inputs and random numbers give other logits"
            elif not _has_room(inputs.device):
                problem = "too little free memory for a second set of activations"
            else:
                _refuse_waits(network, inputs, trained)
                gc.collect()  # else it may free an earlier training's graph during the capture
                replay = _captured(network, inputs)
                problem = _difference(two_passes(replay), expected, again)
        except Exception as error:  # of CUDA, of compilers: any class
            while error.__context__ is not None:  # to leave a failed capture fails, too
                error = error.__context__
            problem = f"{type(error).__name__}: {first_line(error)}"
    restore()
    return (replay, None) if problem is None else (None, problem)


def _refuse_waits(
    network: Callable[[Tensor], Tensor], inputs: Tensor, trained: list[nn.Parameter]
) -> None:
    """Raise RuntimeError if a pass waits for the GPU. A capture would fail there half-way, which
    not every version of torch survives."""
    if inputs.device.type != "cuda":
        return
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        _pass(network, inputs, trained)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _pass(
    called: Callable[[Tensor], Tensor], inputs: Tensor, trained: list[nn.Parameter]
) -> list[Tensor]:
    """Logits, and the gradients of a function of them."""
    logits = called(inputs)
    with torch.autocast(inputs.device.type, enabled=False):
        loss = logits.float().square().sum()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return [_copy(it).float() for it in (logits, *gradients) if it is not None]


def _difference(found: list[Tensor], expected: list[Tensor], again: list[Tensor]) -> str | None:
    """Say how replayed tensors differ from the network's by more than its own two passes do."""
    for replayed, one, other in zip(found, expected, again, strict=True):
        allowed = _NOISE * (_largest(one - other) + _EPSILON * _largest(one))
        if not _largest(replayed - one) <= allowed:  # also if it is not a number
            worst = _largest(replayed - one)
            return f"a replay differs from the network by {worst:.3g}; allowed {allowed:.3g}"
    return None


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _has_room(device: torch.device) -> bool:
    return fits(torch.cuda.max_memory_reserved(device), device, parts=2)


class _InAutocast(nn.Module):
    """A network under the autocast of a training. Within it, so that a backward pass that is
    captured with it runs outside, as always; without its cache, which a graph would outlive."""

    def __init__(self, network: nn.Module, kind: str):
        super().__init__()
        self.network, self._kind = network, kind
        self._dtype, self._enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(self._kind, self._dtype, enabled=self._enabled, cache_enabled=False):
            return self.network(inputs)


def _captured(network: nn.Module, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    module = _InAutocast(network, inputs.device.type)
    with torch.autocast(inputs.device.type, enabled=False):
        return torch.cuda.make_graphed_callables(module, (_copy(inputs),), allow_unused_input=True)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
