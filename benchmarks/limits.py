"""Keeping to a time: what is left of a budget, and work that is broken off when it outlasts its share."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any


class Budget:
    """Seconds from now on; without a number there is no end."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        return float("inf") if self.end is None else self.end - time.monotonic()


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside the block once it has taken that long (in the main thread, between two bytecodes)."""
    if seconds <= 0:
        raise TimeoutError("no time was left for it")
    if seconds == float("inf") or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it took longer than the {seconds:.0f} s that were left for it")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
