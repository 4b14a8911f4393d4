"""The loss of every step of an epoch: their mean, and an end at the first that is no number.

Contract code, for the teacher's training is watched by it: an edit here runs the teacher again.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.runtime.errors import UserError

_EVERY = 50  # steps between two looks at a device that computes on its own: each waits for it


class LossMonitor:
    """The losses of one epoch. One process tells of a loss that is not finite; the others go on to
    where they wait for it, and end with it."""

    def __init__(
        self,
        what: str,
        epoch: int,
        learning_rate: Callable[[int], float],
        *,
        steps: int,
        device: torch.device,
        tells: bool,
        kept: Path | None,
        advice: str,
    ):
        """
        Args:
            what: is watched, for messages: "the training loss".
            epoch: counted from 1.
            learning_rate: at a step of the training, counted from 0.
            steps: of an epoch.
            tells: whether this process is the one.
            kept: the folder of the last finished epoch's state.
            advice: what to do.
        """
        self._what, self._epoch, self._learning_rate = what, epoch, learning_rate
        self._steps, self._tells, self._kept, self._advice = steps, tells, kept, advice
        self._every = 1 if device.type == "cpu" else _EVERY
        self._total = torch.zeros((), device=device)
        self._unseen: list[Tensor] = []
        self._seen = 0

    def add(self, loss: Tensor, count: int) -> None:
        """Args: loss: of the next step, a mean over so many samples, on the device.

        Raises:
            UserError: the loss of this step, or of one since the last look, is not finite.
        """
        self._total += loss * count
        self._unseen.append(loss)
        if len(self._unseen) == self._every:
            self._look()

    def mean(self, count: int) -> float:
        """Over so many samples.

        Raises:
            UserError: as `add`.
        """
        self._look()
        return self._total.item() / count

    def check_validation(self, nll: float) -> None:
        """Raises: UserError: what the epoch's last step left is of no use."""
        if self._tells and not math.isfinite(nll):
            raise UserError(self._message(f"{nll} on validation", self._steps - 1))

    def _look(self) -> None:
        if self._tells and self._unseen:
            for loss in torch.stack(self._unseen).tolist():
                if not math.isfinite(loss):
                    raise UserError(self._message(str(loss), self._seen))
                self._seen += 1
        self._unseen.clear()

    def _message(self, found: str, step: int) -> str:
        rate = self._learning_rate((self._epoch - 1) * self._steps + step)
        state = "No good state of an epoch is kept."
        if self._epoch > 1 and self._kept is not None:
            state = f"The last good state, after epoch {self._epoch - 1}, is in `{self._kept}`."
        return (
            f"{self._what} is {found} at step {step + 1} of {self._steps} in epoch {self._epoch}, "
            f"at learning rate {rate:.3g}; expected a finite number. {state} {self._advice}"
        )
