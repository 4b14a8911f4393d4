"""A training's state after each epoch, outside DVC's outputs, so that a killed one goes on.

A state is named after everything that its bytes depend on: nothing of other inputs or other code
is ever reused. Contract code, for the teacher's training is kept by it: an edit here runs the
teacher again.
"""

import hashlib
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from pipeline.compute.device import computes_in_bfloat16
from pipeline.compute.distributed import ProcessGroup
from pipeline.compute.provenance import device_name, loaded_code
from pipeline.runtime.files import canonical_json, write_bytes

SCRATCH = Path(".scratch/training")


def fingerprint(inputs: Mapping[str, Any], device: torch.device, group: ProcessGroup) -> str:
    """Of the inputs, and of whatever else moves a training's last bits.

    Args:
        inputs: every parameter, and what identifies the data; values as JSON has them.
    """
    torchvision = sys.modules.get("torchvision")  # not loaded for this
    defining = {
        **inputs,
        "device": device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": computes_in_bfloat16(device),
        "threads": torch.get_num_threads(),
        "processes": group.size,
        "versions": {
            "torch": torch.__version__,
            "torchvision": getattr(torchvision, "__version__", None),
            "numpy": np.__version__,
            "pillow": PIL.__version__,  # resizes images
        },
        "code": loaded_code(),
    }
    return hashlib.sha256(canonical_json(defining).encode()).hexdigest()


class ResumeState:
    """Where one training keeps its state: a file that rank 0 writes and reads for all."""

    def __init__(self, folder: Path, name: str, group: ProcessGroup):
        """Args: folder: of this training alone; name: the fingerprint."""
        self.folder, self._path, self._group = folder, folder / f"{name}.state", group

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state by that of one more epoch: on disk, whole, when this returns."""
        states = self._group.gather(_random_states())
        if self._group.is_main:
            content = io.BytesIO()
            torch.save({**state, "random": states}, content)
            digest = hashlib.sha256(content.getbuffer()).digest()
            write_bytes(self._path, digest, content.getbuffer())

    def load(self) -> dict[str, Any] | None:
        """The state to go on from, on the CPU, random numbers set back to it; None to start anew.

        Removes what other inputs or other code left here.
        """
        state = self._group.broadcast(self._read() if self._group.is_main else None)
        if state is not None:
            _set_random_states(state.pop("random")[self._group.rank])
        return state

    def remove(self) -> None:
        """When the training has ended well."""
        if self._group.is_main:
            self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        for path in self.folder.iterdir():
            if path.suffix in (".state", ".partial") and path != self._path:
                path.unlink()
        if not self._path.exists():
            return None
        with open(self._path, "rb") as file:
            digest, content = file.read(hashlib.sha256().digest_size), file.read()
        if hashlib.sha256(content).digest() != digest:
            print(f"  `{self._path}` is damaged: training starts anew", flush=True)
            return None
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _random_states() -> list[Tensor]:
    """Of what dropout draws from: the CPU's generator, and the CUDA device's."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states[1])
