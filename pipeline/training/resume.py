"""The state of a training after each epoch, kept outside DVC's outputs, to resume from.

The name of a state is a fingerprint of everything that its bytes depend on, so a state of other
inputs or of other code is never reused.
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


def fingerprint(inputs: Mapping[str, Any], device: torch.device, group: ProcessGroup) -> str:
    """SHA-256 of the inputs, then of everything else that moves the last bits of a training.

    Args:
        inputs: every parameter, and what identifies the data, as JSON.
    """
    torchvision = sys.modules.get("torchvision")  # loading it takes seconds
    surroundings = {
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
    return f"{_digest(inputs)}-{_digest(surroundings)}"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def read_state(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the last state of a training with these inputs of `fingerprint`, by any code and on any
    machine, on the CPU; None if there is none. Changes nothing."""
    paths = folder.glob(f"{_digest(inputs)}-*.state")
    return next(filter(None, map(_read, paths)), None)


class ResumeState:
    """The file with the state of one training; the main process writes and reads it for all."""

    def __init__(self, folder: Path, name: str, group: ProcessGroup, seed: str = ""):
        """Name the file after the fingerprint, in a folder for this training alone, or for one
        training for each `seed`: all else of these is in `name`."""
        self.folder, self._name, self._group = folder, name, group
        self._path = folder / f"{name}{seed}.state"
        self.last_metrics: Mapping[str, float] | None = None  # of a loaded finished training

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state by that of one more epoch; it is on disk when this returns."""
        states = self._group.gather(_random_states())
        if self._group.is_main:
            content = io.BytesIO()
            torch.save({**state, "random": states}, content)
            digest = hashlib.sha256(content.getbuffer()).digest()
            write_bytes(self._path, digest, content.getbuffer())

    def finish(self, state: Mapping[str, Any], last_metrics: Mapping[str, float]) -> None:
        """Replace the state by what is needed of a finished training, and its last epoch's
        metrics."""
        self.save({**state, "last_metrics": last_metrics})

    def load(self) -> dict[str, Any] | None:
        """Load the last state, on the CPU, and restore the random number generators; None if there
        is no state. Removes states of other inputs and other code, and keeps those of other
        seeds."""
        state = self._group.broadcast(self._read() if self._group.is_main else None)
        if state is not None:
            _set_random_states(state.pop("random")[self._group.rank])
            self.last_metrics = state.pop("last_metrics", None)
        return state

    def remove(self) -> None:
        """Delete the state of a training that has finished."""
        if self._group.is_main:
            self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        for path in self.folder.iterdir():
            known = path.name.lstrip(".").startswith(self._name)
            if path.suffix in (".state", ".partial") and not known:
                path.unlink(missing_ok=True)  # another seed's process may remove it, too
        if not self._path.exists():
            return None
        state = _read(self._path)
        if state is None:
            print(f"  `{self._path}` is damaged: the training starts again", flush=True)
        return state


def _read(path: Path) -> dict[str, Any] | None:
    """Read the state; None if the file is damaged."""
    with open(path, "rb") as file:
        digest, content = file.read(hashlib.sha256().digest_size), file.read()
    if hashlib.sha256(content).digest() != digest:
        return None
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _random_states() -> list[Tensor]:
    """The states of the generators that dropout draws from: the CPU's and the CUDA device's."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states[1])
