"""Time ahead: in words, and estimated from the units of work that are done."""

import statistics
import time
from collections import deque

from pipeline.runtime.errors import counted


def in_words(seconds: float) -> str:
    """Round a time to what an estimate can promise: `1 minute`, `25 minutes`, `3 hours`."""
    if seconds < 90 * 60:
        return counted(max(1, round(seconds / 60)), "minute")
    if seconds < 48 * 3600:
        return counted(round(seconds / 3600), "hour")
    return counted(round(seconds / 86_400), "day")


def about(seconds: float) -> str:
    """Say an estimate: `about 6 minutes`, or `less than a minute`."""
    return "less than a minute" if seconds < 45 else f"about {in_words(seconds)}"


class Pace:
    """Estimates the time left from the last units of work, as epochs, that took about as long."""

    _WINDOW = 9  # units: the first ones are slower, and frozen layers thaw

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds: deque[float] = deque(maxlen=self._WINDOW)

    def unit_done(self) -> None:
        """Note that one more unit is done."""
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._last = now

    def seconds_left(self, units: int, share_done: float = 0.0) -> float | None:
        """Seconds until `units` are done, and of the one under way a share is done already; None
        if nothing was measured."""
        elapsed = time.perf_counter() - self._last
        if self._seconds:
            per_unit = statistics.median(self._seconds)
        elif share_done > 0:
            per_unit = elapsed / share_done
        else:
            return None
        return per_unit * max(0.0, units - share_done)
