"""What `CudaGraphs` does around torch's calls, with stand-ins for these; and torch's settings in a key."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from pydiff.graph import backend as backend_module
from pydiff.graph.backend import CudaGraphs
from pydiff.graph.guards import settings

DEVICE = torch.device("cuda", 0)


class FakeStream:
    def __init__(self, handle: int):
        self.cuda_stream, self.waited, self.events = handle, [], 0

    def wait_event(self, event) -> None:
        self.waited.append(event)

    def wait_stream(self, other) -> None:
        self.waited.append(other)

    def record_event(self):
        self.events += 1
        return (self, self.events)


class FakeCuda:
    """Remembers the current stream as torch does, and how captures began and ended."""

    def __init__(self) -> None:
        self.current, self.made, self.log = FakeStream(0), 0, []
        self.broken_end = False

    def new_stream(self, device=None) -> FakeStream:
        self.made += 1
        return FakeStream(self.made)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        fake = self

        class Context:
            def __enter__(self) -> None:
                fake.log.append(("begin", pool, capture_error_mode, gc.isenabled()))
                fake.current = stream

            def __exit__(self, *error) -> None:
                fake.log.append(("end", error[0]))
                if fake.broken_end:
                    raise RuntimeError("capture invalidated")  # and the stream stays the current one

        return Context()


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()

    class Graph:
        raw_cuda_graph = None

        def __init__(self, keep_graph=False):
            self.kept, self.instantiated = keep_graph, False

        def instantiate(self) -> None:
            self.instantiated = True

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", fake.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "graph", fake.graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(backend_module, "_orders", {})
    return fake


def test_a_capture_is_on_a_stream_of_its_own_in_the_pool_and_collects_no_garbage(cuda) -> None:
    graphs, before, seen = CudaGraphs(), cuda.current, []
    made = graphs.capture(lambda: seen.append(cuda.current), DEVICE, "pool", keep=True)
    assert cuda.log == [("begin", "pool", "thread_local", False), ("end", None)]
    assert seen[0] is not before and cuda.current is before and gc.isenabled()
    assert made.raw.kept and made.raw.instantiated
    other = graphs.capture(lambda: seen.append(cuda.current), DEVICE, "pool")
    assert seen[0] is seen[1] and not other.raw.kept


@pytest.mark.parametrize("broken_end", [False, True])
def test_a_broken_capture_raises_its_cause_and_puts_all_back(cuda, broken_end, monkeypatch) -> None:
    graphs, before, released = CudaGraphs(), cuda.current, []

    def end_allocating(index: int, pool: str) -> None:
        if not broken_end:
            raise RuntimeError("not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocating)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda index, pool: released.append((index, pool)))
    cuda.broken_end = broken_end

    def body() -> None:
        raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model"):
        graphs.capture(body, DEVICE, "pool")
    assert cuda.current is before and gc.isenabled()
    assert released == ([(0, "pool")] if broken_end else [])
    mended = [entry for entry in cuda.log if entry[:2] == ("begin", None)]
    assert len(mended) == broken_end  # one more capture, whose end puts torch's generator in order
    cuda.broken_end = False
    graphs.capture(lambda: None, DEVICE, "pool")


def test_an_end_that_breaks_by_itself_is_raised(cuda) -> None:
    cuda.broken_end = True
    with pytest.raises(RuntimeError, match="capture invalidated"):
        CudaGraphs().capture(lambda: None, DEVICE, "pool")


def test_warm_up_runs_on_the_capturing_stream_between_the_work_around_it(cuda) -> None:
    graphs, current, seen = CudaGraphs(), cuda.current, []
    graphs.warm_up(lambda: seen.append(cuda.current), DEVICE)
    [side] = seen
    assert side.waited == [current] and current.waited == [side]


def test_runs_of_one_stream_come_one_after_the_other(cuda) -> None:
    graphs, other = CudaGraphs(), CudaGraphs()
    with graphs.ordered(DEVICE):
        pass
    first, cuda.current = cuda.current, FakeStream(77)
    with pytest.raises(KeyError), graphs.ordered(DEVICE):
        raise KeyError
    assert cuda.current.waited == [(first, 1)] and cuda.current.events == 1
    with other.ordered(DEVICE):  # it captures on another stream
        pass
    assert len(cuda.current.waited) == 1
    shared = CudaGraphs()
    shared._streams = graphs._streams  # torch hands out the same few streams in turn
    with shared.ordered(DEVICE):
        pass
    assert cuda.current.waited[-1] == (cuda.current, 1)


def test_without_a_device_or_where_it_is_turned_off(monkeypatch) -> None:
    assert CudaGraphs().available(torch.device("cpu")) == (
        False,
        "CUDA graphs need a CUDA device, the samples are on cpu",
    )
    monkeypatch.setattr("pydiff.ops.native.disabled", frozenset({"graph"}))
    assert CudaGraphs().available(DEVICE) == (False, "PYDIFF_DISABLE names graph")


def test_times_are_medians_and_slow_work_is_timed_once(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr("pydiff.graph.backend.time.perf_counter", lambda: now[0])
    runs = iter([9.0, 0.3, 0.1, 0.2, 0.1, 0.1, 0.1])

    def work(seconds) -> None:
        now[0] += next(seconds)

    assert CudaGraphs().microseconds(lambda: work(runs), DEVICE) == pytest.approx(0.3e6)  # the first has used it up
    runs = iter([0.9, 0.3, 0.1, 0.2, 0.1, 0.1, 0.1])
    assert CudaGraphs().microseconds(lambda: work(runs), DEVICE) == pytest.approx(0.1e6)


def test_settings_can_be_asked_whichever_way_they_were_set() -> None:
    device = torch.device("cuda")
    before = settings(device)
    assert hash(before) == hash(settings(device)) and before == settings(device)
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch 2.9
    try:
        torch.set_float32_matmul_precision("high")
        assert settings(device) != before
        torch.set_float32_matmul_precision("highest")
        if precision is not None:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            assert settings(device) != before
    finally:
        if precision is not None:
            torch.backends.cuda.matmul.fp32_precision = precision
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert settings(torch.device("cpu")) != settings(device)
