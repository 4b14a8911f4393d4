"""Device, autocast, host-to-device copies and compilation."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.runtime.errors import is_out_of_memory

#: A run on CUDA of at least so many steps compiles its network and its distillation method. That
#: takes a few minutes, and once more for an uneven last batch. It can save some milliseconds per
#: step: tens of thousands of steps win hours, hundreds lose minutes.
COMPILED_STEPS = 10_000
_COMPILER = "inductor"
_Called = TypeVar("_Called", bound=Callable[..., Tensor])


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU. From then on float32 on CUDA means IEEE float32: by
    default, cuDNN's convolutions round their inputs to TF32, which has 10 bits of mantissa."""
    # Not by their `fp32_precision`: then torch's ONNX exporter, which asks for `allow_tf32`, fails.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_autocast(device: torch.device) -> torch.autocast:
    """The context of a training forward pass: bfloat16 if the device supports it, else float32.

    The rule never depends on a timing: bfloat16 on CUDA with native support (compute capability
    8.0 or higher) and on CPUs with AVX512-BF16 or AMX. Weights, gradients, optimiser, losses and
    every measurement stay in float32; see also `depthwise_in_float32`.
    """
    enabled = computes_in_bfloat16(device)
    # A pass casts each weight once. A cache, which a CUDA graph cannot have, would gain nothing,
    # and the network would be compiled again for its graph.
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 even under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(x.dtype)


def depthwise_in_float32(network: nn.Module, device: torch.device) -> None:
    """Let convolutions of several groups compute in float32 on a CPU; changes `network` in place.

    Their backward pass in bfloat16 is so slow there that whole networks trained at half the speed
    of float32 (MobileNetV2 of half width) or at less than three quarters (MobileNetV3-small).
    State dicts do not change.
    """
    if device.type != "cpu":
        return
    for module in network.modules():
        if type(module) is nn.Conv2d and module.groups > 1:
            module.__class__ = Float32Conv2d  # only `forward` differs


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Move an array to the device.

    On CUDA it passes through pinned memory, so that neither the copy nor the caller waits for
    queued work. On the CPU, the tensor shares the array's memory.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def fits(size_bytes: int, device: torch.device, *, parts: int) -> bool:
    """Whether so many bytes take at most one of `parts` equal parts of a GPU's free memory. On the
    CPU they always do: what is asked for is there already."""
    return device.type == "cpu" or parts * size_bytes <= torch.cuda.mem_get_info(device)[0]


def compile_long_runs(called: _Called, device: torch.device, steps: int) -> "_Called | Compiled":
    """Return a network, or a function of tensors, to be compiled on CUDA if the run has at least
    COMPILED_STEPS.

    A network and its compiled form share their weights; take state dicts from the original. A run
    has batches of two or three sizes, so each size is compiled separately. In several processes,
    compile before `wrap_ddp`: torch compiles a network with synchronised batch norms as one graph,
    and breaks a DistributedDataParallel into several.
    """
    if not Compiled.works or not _pays_to_compile(device, steps):
        return called
    return Compiled(called)


def _pays_to_compile(device: torch.device, steps: int) -> bool:
    return device.type == "cuda" and steps >= COMPILED_STEPS


class Compiled(nn.Module):
    """A network or function that the first call compiles. If that fails, for want of Triton or of a
    C compiler for example, prints one line and calls what it was made of."""

    works = True  # until it has failed in this process

    def __init__(self, called: Callable[..., Tensor]):
        super().__init__()
        self.called = called
        self._forward: Callable[..., Tensor] | None = None

    def forward(self, inputs: Tensor, *others: Any, **named: Any) -> Tensor:
        if self._forward is None and not Compiled.works:
            self._forward = self.called
        if self._forward is None:
            # By default torch compiles no more after 8 variants of one piece of code, such as
            # networks of one family, and only warns.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            compiled = torch.compile(self.called, dynamic=False, backend=_COMPILER)
            problem = _try(partial(compiled, inputs, *others, **named), inputs, self)
            Compiled.works = problem is None
            self._forward = (self.called if problem else compiled).__call__
            if problem is not None and os.environ.get("RANK", "0") == "0":
                print(f"  torch.compile cannot work here: not used ({problem})", flush=True)
        return self._forward(inputs, *others, **named)


def _try(call: Callable[[], Tensor], inputs: Tensor, owner: nn.Module) -> str | None:
    """Make a call, and compute gradients of the owner's weights and of inputs that have one: the
    backward pass may be compiled only then. Leaves no trace: what a half-finished call changed in
    buffers or random numbers is restored, and no `grad` is touched. Returns why it failed, or None.

    Raises:
        an error of too little memory, which is no reason to leave out the compiler.
    """
    buffers = [(buffer, buffer.clone()) for buffer in owner.buffers()]
    trained = [it for it in (inputs, *owner.parameters()) if it.requires_grad]
    kind, problem = inputs.device.type, None
    with torch.random.fork_rng([inputs.device] * (kind == "cuda")):
        try:
            outputs = call()
            with torch.autocast(kind, enabled=False):
                torch.autograd.grad(outputs.float().sum(), trained, allow_unused=True)
        except Exception as error:  # of compilers: any class
            if is_out_of_memory(error):
                raise
            lines = str(error).strip().splitlines()[:2]  # the first may name the backend alone
            problem = " ".join([f"{type(error).__name__}:", *map(str.strip, lines)])
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return problem
