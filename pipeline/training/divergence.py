"""Track the training loss of an epoch; stop at the first value that is not finite."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.runtime.errors import UserError

_STEPS_BETWEEN_CHECKS = 50  # on CUDA, where each check waits for the device


class LossMonitor:
    """The losses of one epoch. Only the main process raises; the other ranks stop at their next
    collective."""

    def __init__(
        self,
        name: str,
        epoch: int,
        learning_rate: Callable[[int], float],
        *,
        steps: int,
        device: torch.device,
        is_main: bool,
        state_dir: Path | None,
        hint: str,
    ):
        """Start an epoch.

        Args:
            name: of the loss, for messages: "the training loss".
            epoch: counted from 1.
            learning_rate: of a step of the training, counted from 0.
            steps: per epoch.
            state_dir: where the state of the last finished epoch is kept, if it is.
            hint: what the user can do.
        """
        self._name, self._epoch, self._learning_rate = name, epoch, learning_rate
        self._steps, self._is_main, self._state_dir, self._hint = steps, is_main, state_dir, hint
        self._check_every = 1 if device.type == "cpu" else _STEPS_BETWEEN_CHECKS
        self._total = torch.zeros((), device=device)
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
        if self._is_main and not math.isfinite(nll):
            raise UserError(self._message(f"{nll} on validation", self._steps - 1))

    def _check(self) -> None:
        if self._is_main and self._unchecked:
            for loss in torch.stack(self._unchecked).tolist():
                if not math.isfinite(loss):
                    raise UserError(self._message(str(loss), self._checked))
                self._checked += 1
        self._unchecked.clear()

    def _message(self, value: str, step: int) -> str:
        rate = self._learning_rate((self._epoch - 1) * self._steps + step)
        state = "The state of no earlier epoch is kept."
        if self._epoch > 1 and self._state_dir is not None:
            state = (
                f"The last good state, after epoch {self._epoch - 1}, is in `{self._state_dir}`."
            )
        return (
            f"{self._name} is {value} at step {step + 1} of {self._steps} in epoch {self._epoch}, "
            f"at learning rate {rate:.3g}; expected a finite number. {state} {self._hint}"
        )
