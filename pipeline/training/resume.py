"""The state of a training after each epoch, kept outside DVC's outputs, to resume from.

The name of a state is a fingerprint of everything that its bytes depend on, so a state of other
inputs or of other code is never reused.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.compute.device import computes_in_bfloat16
from pipeline.compute.distributed import ProcessGroup
from pipeline.compute.provenance import device_name, library_versions, loaded_code
from pipeline.runtime.errors import counted
from pipeline.runtime.files import canonical_json, write_bytes

_DIGITS = 20  # of 64: encrypted folders allow names of 143 characters
_COUNTED = {"threads": "thread", "processes": "process"}
#: What a message calls the surroundings that are no numbers.
_OTHER = {
    **{"device": "another device", "instructions": "another processor"},
    **{"bfloat16": "another processor", "versions": "other versions of libraries"},
    "code": "other code",
}


@dataclass(frozen=True)
class Fingerprint:
    """What the bytes of a training depend on."""

    inputs: str  # a digest
    surroundings: Mapping[str, Any]  # all that moves only the last bits, as JSON

    @cached_property
    def name(self) -> str:
        return f"{self.inputs}-{_digest(self.surroundings)}"

    def differences(self, before: Mapping[str, Any]) -> str:
        """Say in which surroundings an earlier training of the same inputs differs."""
        changed = [key for key, value in self.surroundings.items() if before.get(key) != value]
        words = [
            _OTHER.get(key) or f"{counted(before[key], noun)} instead of {self.surroundings[key]}"
            for key in changed
            for noun in [_COUNTED.get(key, "")]
        ]
        return ", ".join(dict.fromkeys(words))


def fingerprint(
    inputs: Mapping[str, Any], device: torch.device, group: ProcessGroup
) -> Fingerprint:
    """Fingerprint the inputs, and everything else that moves the last bits of a training.

    Args:
        inputs: every parameter, and what identifies the data, as JSON.
    """
    surroundings = {
        "device": device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": computes_in_bfloat16(device),
        "threads": torch.get_num_threads(),
        "processes": group.size,
        "versions": library_versions(),
        "code": loaded_code(),
    }
    return Fingerprint(_digest(inputs), surroundings)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:_DIGITS]


def read_finished(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the state of the last finished training with these inputs of `fingerprint`, by any code
    and on any machine, on the CPU; None if there is none. Changes nothing."""
    states = map(_read, _newest_first(folder, f"{_digest(inputs)}-*"))
    return next((state for state in states if state and "last_metrics" in state), None)


def _newest_first(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(f"{pattern}.state"), key=os.path.getmtime, reverse=True)


class ResumeState:
    """The file with the state of one training; the main process writes and reads it for all."""

    def __init__(
        self,
        folder: Path,
        fingerprint: Fingerprint,
        group: ProcessGroup,
        seed: int | None = None,
        start: str = "",
    ):
        """Name the file after what its bytes depend on, in a folder for this training alone, or for
        one training for each seed.

        Args:
            start: a digest of the first weights; given with a seed.
        """
        self.folder, self._fingerprint, self._group = folder, fingerprint, group
        of_seed = "" if seed is None else f"-{seed}-{start[:_DIGITS]}"
        self._path = folder / f"{fingerprint.name}{of_seed}.state"
        self._same_inputs = f"{fingerprint.inputs}-*" + ("" if seed is None else f"-{seed}-*")
        self.last_metrics: Mapping[str, float] | None = None  # of a loaded finished training

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state by that of one more epoch; it is on disk when this returns."""
        states = self._group.gather(_random_states())
        if self._group.is_main:
            content = io.BytesIO()
            surroundings = self._fingerprint.surroundings
            torch.save({**state, "random": states, "surroundings": surroundings}, content)
            digest = hashlib.sha256(content.getbuffer()).digest()
            write_bytes(self._path, digest, content.getbuffer())

    def finish(self, state: Mapping[str, Any], last_metrics: Mapping[str, float]) -> None:
        """Replace the state by what is needed of a finished training, with its history and the last
        epoch's metrics. Removes states of the same training in other surroundings."""
        self.save({**state, "last_metrics": last_metrics})
        if self._group.is_main:
            for path in self._elsewhere():
                path.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """Load the last state, on the CPU, and restore the random number generators; None if there
        is no state.

        Removes states of other inputs, and keeps those of other seeds. Of the same training in
        other surroundings (threads, code, ...), keeps the newest, and says so: the same
        surroundings can resume it until this training has finished.
        """
        state = self._group.broadcast(self._read() if self._group.is_main else None)
        if state is not None:
            _set_random_states(state.pop("random")[self._group.rank])
            self.last_metrics = state.pop("last_metrics", None)
        return state

    def _elsewhere(self) -> list[Path]:
        """States of this training in other surroundings, the newest first."""
        paths = _newest_first(self.folder, self._same_inputs)
        return [path for path in paths if path != self._path]

    def _read(self) -> dict[str, Any] | None:
        for path in self.folder.iterdir():
            kept = {".state": f"{self._fingerprint.inputs}-", ".partial": self._fingerprint.name}
            known = path.name.lstrip(".").startswith(kept.get(path.suffix, ""))
            if not known:
                path.unlink(missing_ok=True)  # another seed's process may remove it, too
        newest, *older = [*self._elsewhere(), None]
        for path in filter(None, older):
            path.unlink(missing_ok=True)
        if not self._path.exists():
            if newest is not None and (state := _read(newest)):
                self._explain(state)
            return None
        state = _read(self._path)
        if state is None:
            print(f"  `{self._path}` is damaged: the training starts again", flush=True)
        return state

    def _explain(self, other: Mapping[str, Any]) -> None:
        epochs = counted(len(other.get("trained", other)["history"]), "epoch")
        differences = self._fingerprint.differences(other["surroundings"]) or "other first weights"
        print(
            f"  starts again: a state of {epochs} was made with {differences}. It is kept until "
            "this training has finished, for a run with these.",
            flush=True,
        )


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
