"""CUDA graphs as the captured loop uses them: what a backend has to offer, and torch's own as that.

Tests put a backend of their own in its place, which records operators on the CPU and repeats them.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from pydiff.ops import native

TIMED_RUNS = 5
ENOUGH_SECONDS = 2.0
"""After which no further run is timed."""


class Graph(Protocol):
    """Work captured once."""

    def replay(self) -> None:
        """Enqueue the work on the current stream."""

    def release(self) -> None:
        """Give its memory back to the pool."""


class Backend(Protocol):
    """Where graphs come from."""

    def available(self, device: torch.device) -> tuple[bool, str]:
        """Whether work on a device can be captured, and if not, why."""

    def capturing(self, device: torch.device) -> bool:
        """Whether the current stream of a device is being captured by somebody."""

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> None:
        """Run a function on a stream beside the current one, which comes before and after it."""

    def watch(self) -> contextlib.AbstractContextManager[Any]:
        """Gives a `pydiff.check.watch.Watch`, or something like it, of what runs inside."""

    def capture(self, function: Callable[[], Any], device: torch.device, pool: Any, keep: bool = False) -> Graph:
        """The work a function enqueues, which is not carried out. What the function raises is raised.

        keep: a `device_loop` will be built around it.
        """

    def device_loop(self, graph: Graph, cursor: torch.Tensor, stop: torch.Tensor, remaining: torch.Tensor) -> Graph:
        """The WHILE loop around a graph that was kept: see `pydiff.graph.device_loop`. Raises where there is none."""

    def new_pool(self, device: torch.device) -> Any:
        """Memory that the graphs of one sampler share."""

    def memory(self, device: torch.device) -> int:
        """Bytes that torch holds of a device."""

    def random_offset(self, device: torch.device) -> int:
        """How far torch's generator of a device has come."""

    def microseconds(self, function: Callable[[], Any], device: torch.device) -> float:
        """Time from an idle device until a function's work is done, the host's part included."""

    def ordered(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """For a run of replays: on the device it comes after those before it, whatever thread and stream they had."""

    def wait(self, device: torch.device) -> None:
        """Until the runs so far are done."""


_one_capture = threading.Lock()  # at a time in the process: a capture of another thread would disturb it


class _Order:
    """The runs of all graphs that were captured on one stream, one after the other.

    cuBLAS has one workspace for a stream, so that graphs of several samplers may share it, torch having few streams.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.last: torch.cuda.Event | None = None


_orders: dict[int, _Order] = {}  # by the stream's handle


class CudaGraph:
    """A `torch.cuda.CUDAGraph`, `raw`. It replays on the device it was captured on, whichever is current."""

    def __init__(self, graph: torch.cuda.CUDAGraph):
        self.raw = graph

    def replay(self) -> None:
        """Enqueue it on the current stream of its device."""
        self.raw.replay()

    def release(self) -> None:
        """Reset it, which gives its memory back to the pool."""
        self.raw.reset()


class CudaGraphs:
    """`Backend` of CUDA devices, which says what its methods are for."""

    def __init__(self) -> None:
        self._streams: dict[tuple[str, torch.device], torch.cuda.Stream] = {}

    def available(self, device: torch.device) -> tuple[bool, str]:
        """Not elsewhere than on CUDA devices, not on ROCm, and not where PYDIFF_DISABLE names graph."""
        if device.type != "cuda":
            return False, f"CUDA graphs need a CUDA device, the samples are on {device}"
        if torch.version.hip:
            return False, "this torch is built for ROCm, on which this was never tried"
        if "graph" in native.disabled:
            return False, "PYDIFF_DISABLE names graph"
        return torch.cuda.is_available(), "torch sees no CUDA device"

    def capturing(self, device: torch.device) -> bool:
        """What torch says of the current stream."""
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def _stream(self, purpose: str, device: torch.device) -> torch.cuda.Stream:
        """Captures have a stream on which nothing else runs: cuBLAS keeps a workspace for each stream, which then lies
        in the graphs' own memory. One made outside would be freed under them when torch clears it."""
        key = (purpose, device)
        if key not in self._streams:
            self._streams.setdefault(key, torch.cuda.Stream(device))
        return self._streams[key]

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> None:
        """On a side stream of its own, as torch asks for before a capture."""
        side, current = self._stream("warm-up", device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        try:
            with torch.cuda.device(device), torch.cuda.stream(side):
                function()
        finally:
            current.wait_stream(side)

    def watch(self) -> contextlib.AbstractContextManager[Any]:
        """A `pydiff.check.watch.Watch`."""
        from pydiff.check.watch import Watch

        return Watch()

    def capture(self, function: Callable[[], Any], device: torch.device, pool: Any, keep: bool = False) -> Graph:
        """On a stream that nothing else uses, one capture at a time in the process, other threads undisturbed."""
        keep = keep and hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph")  # torch 2.8
        graph = torch.cuda.CUDAGraph(keep_graph=True) if keep else torch.cuda.CUDAGraph()
        stream, failure = self._stream("capture", device), list[BaseException]()

        def body() -> None:
            try:
                function()
            except BaseException as error:
                failure.append(error)
                raise

        try:
            # The outer stream context puts the current stream back where the end of a broken capture raises, too.
            # thread_local: other threads of a server go on allocating and copying meanwhile.
            with (
                _one_capture,
                _no_collection(),
                torch.cuda.stream(torch.cuda.current_stream(device)),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                body()
        except BaseException as error:
            cause = (failure or [error])[0]
            if error is not cause or not failure:
                _mend(device, pool, stream)
            # The end of a broken capture raises an error of its own, which says nothing of the cause.
            raise cause from None
        if keep:
            graph.instantiate()
        return CudaGraph(graph)

    def device_loop(self, graph: Any, cursor: torch.Tensor, stop: torch.Tensor, remaining: torch.Tensor) -> Graph:
        """A `pydiff.graph.device_loop.DeviceLoop`, which raises what it does."""
        from pydiff.graph.device_loop import DeviceLoop

        return DeviceLoop(graph.raw, cursor, stop, remaining)

    def new_pool(self, device: torch.device) -> Any:
        """A handle of torch's; the pool lives as long as a graph in it."""
        return torch.cuda.graph_pool_handle()

    def memory(self, device: torch.device) -> int:
        """Bytes that torch has reserved, in use or not."""
        return torch.cuda.memory_reserved(device)

    def random_offset(self, device: torch.device) -> int:
        """The offset of the device's default generator."""
        return torch.cuda.default_generators[device.index].get_offset()

    def microseconds(self, function: Callable[[], Any], device: torch.device) -> float:
        """The median of up to `TIMED_RUNS`, the first run left out."""
        times: list[float] = []
        while len(times) < 2 or (len(times) <= TIMED_RUNS and sum(times) < ENOUGH_SECONDS):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            function()
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return 1e6 * statistics.median(times[1:])

    def _order(self, device: torch.device) -> _Order:
        return _orders.setdefault(self._stream("capture", device).cuda_stream, _Order())

    @contextlib.contextmanager
    def ordered(self, device: torch.device) -> Iterator[None]:
        """By a lock, and an event that the next run waits for on its stream."""
        order, stream = self._order(device), torch.cuda.current_stream(device)
        with order.lock:
            if order.last is not None:
                stream.wait_event(order.last)
            try:
                yield
            finally:
                order.last = stream.record_event()

    def wait(self, device: torch.device) -> None:
        """For the event of the last run."""
        last = self._order(device).last
        if last is not None:
            last.synchronize()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection meanwhile: it could free another graph or event, which a capture forbids."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _mend(device: torch.device, pool: Any, stream: torch.cuda.Stream) -> None:
    """After a capture whose end raised. Torch leaves two things in disorder then, for which there is no public call.

    Its allocator goes on recording to the pool, and holds it; its random generator believes that a capture is under way
    (up to torch 2.12), until another one ends well.
    """
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)  # raises where the allocator is in order
        torch._C._cuda_releasePool(device.index, pool)
    with (
        contextlib.suppress(RuntimeError),
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"),
    ):
        torch.zeros(1, device=device)
