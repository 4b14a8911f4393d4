"""Track the training loss of an epoch; stop at the first value that is not finite."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.runtime.errors import UserError

_STEPS_BETWEEN_CHECKS = 50  # on CUDA, where each check waits for the device


@dataclass
class LossMonitor:
    """The losses of one epoch. Only the main process raises; the other ranks stop at their next
    collective."""

    name: str  # of the loss, for messages: "the training loss"
    epoch: int  # counted from 1
    learning_rate: Callable[[int], float]  # of a step of the training, counted from 0
    steps: int  # per epoch
    device: torch.device
    is_main: bool
    state_dir: Path | None  # where the state of the last finished epoch is kept, if it is
    hint: str  # what the user can do

    def __post_init__(self) -> None:
        self._check_every = 1 if self.device.type == "cpu" else _STEPS_BETWEEN_CHECKS
        self._total = torch.zeros((), device=self.device)
        self._unchecked: list[Tensor] = []
        self._checked = 0

    def add(self, loss: Tensor, count: int) -> None:
        """Add the loss of the next step: [] on the device, a mean over `count` samples.

        Raises:
            UserError: the loss of this step, or of one since the last check, is not finite.
        """
        self._total += loss * count
        self._unchecked.append(loss)
        if len(self._unchecked) == self._check_every:
            self._check()

    def mean(self, count: int) -> float:
        """The mean over `count` samples.

        Raises:
            UserError: as `add`.
        """
        self._check()
        return self._total.item() / count

    def check_validation(self, nll: float) -> None:
        """Raise if the validation loss is not finite."""
        if self.is_main and not math.isfinite(nll):
            raise UserError(self._message(f"{nll} on validation", self.steps - 1))

    def _check(self) -> None:
        if self.is_main and self._unchecked:
            for loss in torch.stack(self._unchecked).tolist():
                if not math.isfinite(loss):
                    raise UserError(self._message(str(loss), self._checked))
                self._checked += 1
        self._unchecked.clear()

    def _message(self, value: str, step: int) -> str:
        rate = self.learning_rate((self.epoch - 1) * self.steps + step)
        state = "The state of no earlier epoch is kept."
        if self.epoch > 1 and self.state_dir is not None:
            state = f"The last good state, after epoch {self.epoch - 1}, is in `{self.state_dir}`."
        return (
            f"{self.name} is {value} at step {step + 1} of {self.steps} in epoch {self.epoch}, "
            f"at learning rate {rate:.3g}; expected a finite number. {state} {self.hint}"
        )
