"""Where networks run, in what precision they train, and how data come to them.

Contract code, for the teacher trains with it: an edit here runs the teacher again.
"""

import numpy as np
import torch
from torch import Tensor, nn

#: Steps from which a run on CUDA compiles its network. Compiling takes a minute or a few, and once
#: more for an uneven last batch; it can save some milliseconds per step: tens of thousands of steps
#: win hours, hundreds lose minutes.
COMPILED_STEPS = 10_000
_COMPILER = "inductor"


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_autocast(device: torch.device) -> torch.autocast:
    """The context of a forward pass in training: bfloat16 where the device computes in it.

    A stated rule, never a timing: CUDA with native bfloat16 (compute capability 8.0 or higher),
    CPUs with AVX512-BF16 or AMX; float32 on every other device. Weights, gradients, optimiser
    and losses stay in float32, and so does every measurement; see also `depthwise_in_float32`.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(device))


def computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 inside an autocast region, too."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(x.dtype)


def depthwise_in_float32(network: nn.Module, device: torch.device) -> None:
    """In place: on a CPU, convolutions of several groups compute in float32. Their backward pass in
    bfloat16 is so slow there that whole networks trained at half the speed of float32 or less than
    three quarters (MobileNetV2 of half width, MobileNetV3-small). State dicts stay as they are."""
    if device.type != "cpu":
        return
    for module in network.modules():
        if type(module) is nn.Conv2d and module.groups > 1:
            module.__class__ = Float32Conv2d  # another forward is all that changes


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device. On CUDA through pinned memory, so that neither the
    copy nor the caller waits for the work that is queued there; on the CPU it shares its memory."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def compiled(network: nn.Module, device: torch.device, steps: int) -> nn.Module:
    """The network as it is called in training: compiled on CUDA for a run of so many steps, else
    itself. The two share their weights; state dicts are to be taken from the network given.

    Batches have two or three sizes in a run, so each is compiled for itself.
    """
    if not _pays_to_compile(device, steps):
        return network
    return torch.compile(network, dynamic=False, backend=_COMPILER)


def _pays_to_compile(device: torch.device, steps: int) -> bool:
    return device.type == "cuda" and steps >= COMPILED_STEPS
