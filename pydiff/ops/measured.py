"""Choosing the fastest of several ways to compute the same thing, by measuring each once.

Which of two kernels is faster depends on the shape, the device and the versions of the libraries; a short measurement
the first time that a shape appears costs less than a wrong guess repeated. It stops the host until the device is done,
so it belongs in the warm-up, and it never runs where that is forbidden: while a CUDA stream is captured, or a compiler
traces.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch

Candidate = Callable[[], Any]
Candidates = Mapping[str, Candidate | str]
WARM_UP, REPETITIONS = 3, 7
TIE = 0.98  # a later candidate has to take less than this share of the best time so far: near ties do not flicker


def gpu_microseconds(candidate: Candidate) -> float:
    """Median time of one call on the current stream of the current CUDA device, its inputs in the L2 cache."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of every reason why an attention backend refuses, and raises
        for _ in range(WARM_UP):
            candidate()
    marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(REPETITIONS)]
    # The device waits (2 ms) while the host queues all repetitions: otherwise slow launches, not kernels, would count.
    torch.cuda._sleep(4_000_000)
    for start, end in marks:
        start.record()
        candidate()
        end.record()
    marks[-1][1].synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in marks)


def on_device(device: torch.device | None) -> contextlib.AbstractContextManager[Any]:
    """Make a CUDA device the current one: events, and whether a graph is being captured, are asked of that."""
    return torch.cuda.device(device) if device is not None and device.type == "cuda" else contextlib.nullcontext()


def may_measure() -> bool:
    """Whether the host may wait for the device here."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


class Choice(NamedTuple):
    """The candidate that won, what each took in microseconds, and why the others did not run."""

    name: str
    """The winner."""
    microseconds: Mapping[str, float]
    """What each candidate that ran took."""
    refused: Mapping[str, str]
    """Why the others did not run, by name."""


class Measured:
    """The fastest candidate for each key, measured when the key first appears and remembered.

    Threads share it: one measures at a time, since two would disturb each other, and those that wait for the same key
    find it answered.

    Args:
        capacity: how many keys are remembered; beyond it the oldest is forgotten.
        timer: microseconds that one call of a candidate takes.
        may_measure: whether measuring is allowed now.
    """

    def __init__(
        self,
        capacity: int = 256,
        timer: Callable[[Candidate], float] = gpu_microseconds,
        may_measure: Callable[[], bool] = may_measure,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity = {capacity}: give at least 1")
        self._capacity, self._timer, self._may_measure = capacity, timer, may_measure
        self._choices: dict[Hashable, Choice] = {}
        self._lock = threading.RLock()

    def choose(self, key: Hashable, candidates: Candidates, device: torch.device | None = None) -> str:
        """`find`; the first candidate, not remembered, where measuring is not allowed."""
        if not candidates:
            raise ValueError("candidates is empty: give at least one")
        return self.find(key, candidates, device) or next(iter(candidates))

    def find(self, key: Hashable, candidates: Candidates, device: torch.device | None = None) -> str | None:
        """Name of the fastest candidate for `key`; None where it is not known and measuring is not allowed.

        A candidate that raises cannot win; where every one does, the first one's error is raised.

        Args:
            candidates: by name, those expected to be fast first; in place of one, the reason why it is not to be tried.
            device: where the candidates run; the current CUDA device by default.
        """
        choice = self._choices.get(key)
        if choice is not None and choice.name in candidates:
            return choice.name
        with on_device(device):
            return self._measure(key, candidates).name if self._may_measure() else None

    def known(self, key: tuple[Any, ...]) -> str | None:
        """What is remembered for `key`; None where it holds sizes that are being traced."""
        if any(isinstance(part, torch.SymInt) for part in key):
            return None
        choice = self._choices.get(key)
        return choice.name if choice else None

    def _measure(self, key: Hashable, candidates: Candidates) -> Choice:
        with self._lock:
            choice = self._choices.get(key)
            if choice is None or choice.name not in candidates:
                choice = self._fastest(candidates)
                self._choices.pop(key, None)
                while len(self._choices) >= self._capacity:
                    del self._choices[next(iter(self._choices))]
                self._choices[key] = choice
            return choice

    def _fastest(self, candidates: Candidates) -> Choice:
        best, error = "", None
        times: dict[str, float] = {}
        refused: dict[str, str] = {}
        for name, candidate in candidates.items():
            if isinstance(candidate, str):
                refused[name] = candidate
                continue
            try:
                times[name] = self._timer(candidate)
            except Exception as raised:  # whatever one candidate raises, another can do the same
                error, refused[name] = error or raised, f"{type(raised).__name__}: {raised}"
                continue
            if not best or times[name] < TIE * times[best]:
                best = name
        if not best:
            raise error or ValueError(f"no candidate is to be tried: {refused}")
        return Choice(best, times, refused)

    def choices(self) -> dict[Hashable, Choice]:
        """What has been measured, for each key."""
        with self._lock:
            return dict(self._choices)

    def clear(self) -> None:
        """Forget every choice, after a change of clocks or settings, say."""
        with self._lock:
            self._choices.clear()
