"""Where networks run, and in what precision they train.

Contract code, for the teacher trains with it: an edit here runs the teacher again.
"""

import torch


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_autocast(device: torch.device) -> torch.autocast:
    """The context of a forward pass in training: bfloat16 where the device computes in it.

    A stated rule, never a timing: CUDA with native bfloat16 (compute capability 8.0 or higher),
    CPUs with AVX512-BF16 or AMX; float32 on every other device. Weights, gradients, optimiser
    and losses stay in float32, and so does every measurement.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=_computes_in_bfloat16(device))


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
