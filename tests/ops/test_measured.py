"""Measuring candidates once: the fastest is chosen and remembered, within bounds, from several threads."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from pydiff.ops import measured
from pydiff.ops.measured import Measured


def nothing() -> None:
    pass


class Clock:
    """A timer that calls the candidate, counts, and takes the seconds that the candidate returns."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, candidate) -> float:
        self.calls += 1
        return candidate()


def candidates(**seconds):
    return {name: (lambda s=s: s) for name, s in seconds.items()}


def names(best: Measured) -> dict:
    return {key: choice.name for key, choice in best.choices().items()}


def test_the_fastest_is_chosen_once() -> None:
    clock = Clock()
    best = Measured(timer=clock)
    assert best.choose("a", candidates(slow=2.0, fast=1.0)) == "fast"
    assert best.choose("a", candidates(slow=0.1, fast=1.0)) == "fast" and clock.calls == 2
    assert best.choose("b", candidates(slow=0.1, fast=1.0)) == "slow" and clock.calls == 4
    assert names(best) == {"a": "fast", "b": "slow"}
    best.clear()
    assert best.choices() == {}


def test_near_ties_go_to_the_first() -> None:
    best = Measured(timer=Clock())
    assert best.choose(1, candidates(first=1.0, second=0.99)) == "first"
    assert best.choose(2, candidates(first=1.0, second=0.97)) == "second"


def test_the_oldest_is_forgotten() -> None:
    best = Measured(capacity=2, timer=Clock())
    for key in range(5):
        best.choose(key, candidates(x=1.0))
    assert list(best.choices()) == [3, 4]


def test_a_remembered_name_that_is_no_longer_offered_is_measured_again() -> None:
    best = Measured(timer=Clock())
    assert best.choose("k", candidates(x=1.0, y=2.0)) == "x"
    assert best.choose("k", candidates(y=2.0, z=1.0)) == "z" and names(best) == {"k": "z"}


def test_a_candidate_that_raises_cannot_win() -> None:
    def broken():
        raise RuntimeError("out of shared memory")

    best = Measured(timer=Clock())
    assert best.choose("k", {"broken": broken, **candidates(slow=9.0)}) == "slow"
    with pytest.raises(RuntimeError, match="shared memory"):
        best.choose("other", {"broken": broken})
    assert "other" not in best.choices()


def test_where_measuring_is_forbidden_the_first_is_taken_and_not_remembered() -> None:
    clock, allowed = Clock(), [False]
    best = Measured(timer=clock, may_measure=lambda: allowed[0])
    assert best.choose("k", candidates(first=2.0, second=1.0)) == "first"
    assert clock.calls == 0 and best.choices() == {}
    allowed[0] = True
    assert best.choose("k", candidates(first=2.0, second=1.0)) == "second"
    allowed[0] = False
    assert best.choose("k", candidates(first=2.0, second=1.0)) == "second"


def test_no_measuring_while_a_stream_is_captured(monkeypatch) -> None:
    assert measured.may_measure()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        assert measured.may_measure() is not capturing
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not measured.may_measure()


def test_threads_measure_one_at_a_time_and_each_key_once() -> None:
    running, most, measured_keys = [0], [0], []

    def timer(candidate) -> float:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.002)
        measured_keys.append(candidate())
        running[0] -= 1
        return 1.0

    best = Measured(timer=timer)
    work = [threading.Thread(target=best.choose, args=(k % 3, {"x": lambda k=k: k % 3})) for k in range(12)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert most == [1] and sorted(measured_keys) == [0, 1, 2]


class Event:
    """Stands for a CUDA event: the time is read from a counter that candidates advance."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_a_call_is_timed_after_a_warm_up_and_outliers_do_not_count(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    calls = [0]

    def candidate() -> None:
        calls[0] += 1
        slow = calls[0] <= measured.WARM_UP or calls[0] == measured.WARM_UP + 1
        Event.now += 1000.0 if slow else 3.0

    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    assert measured.gpu_microseconds(candidate) == pytest.approx(3000.0)  # events count milliseconds
    assert calls[0] == measured.WARM_UP + measured.REPETITIONS


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="capacity = 0"):
        Measured(capacity=0)
    with pytest.raises(ValueError, match="candidates is empty"):
        Measured().choose("k", {})


@pytest.mark.gpu
def test_on_a_device() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    best = Measured()
    assert best.choose("k", {"three": lambda: x @ x @ x @ x, "one": lambda: x @ x}) == "one"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert best.choose("unseen", {"first": nothing, "second": nothing}) == "first"
    assert list(best.choices()) == ["k"]


def test_what_is_known_is_told_without_measuring() -> None:
    choice = Measured(timer=lambda run: run(), may_measure=lambda: True)
    assert choice.known(("a", 1)) is None
    choice.choose(("a", 1), {"slow": lambda: 2.0, "fast": lambda: 1.0}, torch.device("cpu"))
    assert choice.known(("a", 1)) == "fast" and choice.known(("b",)) is None
