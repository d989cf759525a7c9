"""One captured loop: its buffers, the graphs that read them, and how a run is put together out of those.

    begin       x_T and the first model input; what hoisting computes before the loop
    stage       one model call and its update; the row of the table is the one that the device-side counter points to
    segments    whole stretches of stages in one graph each, with `begin` where a run starts with them
    device      a WHILE loop on the device around `stage`

As every stage is the same work on another row of the table, any run can be put together out of any of them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from pydiff.graph.backend import Backend, Graph
from pydiff.graph.buffers import Buffers
from pydiff.graph.guards import Guard
from pydiff.graph.request import Request, round_up
from pydiff.ops.noise import INITIAL_DRAW, normal
from pydiff.ops.stage import stage, write_first_model_input
from pydiff.run.beginning import start
from pydiff.run.loop import caller, hoist_out
from pydiff.run.options import StageInfo

if TYPE_CHECKING:
    from pydiff.optimize.hoisting import HoistedModel

LEAST_ROWS = 64
"""Rows of the tables, at 200 bytes each: the numbers of steps in use fit the same graphs."""
MAX_SEGMENTS = 8
"""Segments that a program keeps; a longer one takes the place of the least recently used."""


class Program:
    """The loop of one model on samples of one shape. Made for a request, and able to run any of the same layout.

    A run takes: `load`, which fills the buffers, then `run` in one of the modes "eager", "stage", "loop" and "device".
    """

    def __init__(self, request: Request, backend: Backend, pool: Any, keep: bool):
        self.model, self.hoist, self.layout = request.model, request.options.hoist, request.layout
        self.mode = "eager"
        self.replays = 0
        self._backend, self._pool, self._keep = backend, pool, keep
        self._call: Callable[[Any], torch.Tensor] | None = None
        self._hoisted: HoistedModel | None = None
        self._refused = ""
        self._graphs: dict[str, Graph] = {}
        self._segments: OrderedDict[tuple[bool, int], Graph] = OrderedDict()
        self._longest = 0
        self._outputs: dict[Any, torch.Tensor] = {}
        before = backend.memory(request.layout.device)
        with torch.inference_mode(False):
            rows = round_up(max(request.rows_of_tables, LEAST_ROWS))
            self.buffers = Buffers(request.layout, rows, request.arguments)
        self.bytes = max(backend.memory(request.layout.device) - before, 0)
        """Memory that torch took from the device for the buffers and the graphs."""
        self.guard: Guard | None = None

    @property
    def capacity(self) -> int:
        """Rows of the tables."""
        return self.buffers.tables.capacity

    @property
    def graphs(self) -> int:
        """How many CUDA graphs it holds."""
        return len(self._graphs) + len(self._segments)

    # ------------------------------------------------------------------ the work, as a graph records it

    def begin(self) -> None:
        """x_T, the first model input, and what is computed before the loop."""
        t, tables, shape = self.buffers.tensors, self.buffers.tables, self.layout.shape
        x, per_row = t.registers[0], (-1, *([1] * (len(shape) - 1)))
        if self.layout.fresh:
            z = normal(tables["seeds"], INITIAL_DRAW, shape[1:], dtype=x.dtype)
            torch.mul(z, tables["init_std"].view(per_row), out=x)
        if self.layout.starts:
            z = t.noise[0] if t.noise is not None else normal(tables["seeds"], 0, shape[1:], dtype=x.dtype)
            start(x, tables["start_scale"].view(per_row), tables["start_noise"].view(per_row), z)
        write_first_model_input(t)
        if self._hoisted is not None:
            self._hoisted.update()
        elif self._call is None:
            self._hoisted = hoist_out(t, self.model, self.buffers.arguments) if self.hoist else None
            self._call = caller(t, self.model, self.buffers.arguments, self._hoisted)

    def advance(self, stages: int) -> torch.Tensor | None:
        """So many stages. Returns what the model answered in the last of them."""
        t, m = self.buffers.tensors, None
        assert self._call is not None
        for _ in range(stages):
            m = self._call(t.model_input)
            stage(t, m)
        return m

    def _call_model(self) -> None:
        """Changes no state."""
        assert self._call is not None
        self._call(self.buffers.tensors.model_input)

    @contextlib.contextmanager
    def calling(self, wrapper: Callable[[Any], Any]) -> Iterator[None]:
        """Call the model through a wrapper meanwhile."""
        call = self._call
        self._call = wrapper(call)
        try:
            yield
        finally:
            self._call = call

    # ------------------------------------------------------------------ captures

    def capture(self, mode: str) -> None:
        """Make the graphs that a mode needs whatever the number of stages, and use them from now on."""
        if mode != "eager" and not self._graphs:
            begin = self._captured("begin", self.begin)
            self._graphs = {"begin": begin, "stage": self._captured("stage", lambda: self.advance(1), self._keep)}
        if mode == "device" and "device" not in self._graphs:
            t = self.buffers.tensors
            self._graphs["device"] = self._backend.device_loop(
                self._graphs["stage"], t.cursor, t.stop, self.buffers.remaining
            )
        self.mode = mode

    def _captured(self, key: Any, work: Any, keep: bool = False) -> Graph:
        def body() -> None:
            output = work()
            if output is not None:
                self._outputs[key] = output  # as long as it is held, no other graph is given its memory

        device = self.layout.device
        before = self._backend.memory(device)
        with as_captured(device):
            graph = self._backend.capture(body, device, self._pool, keep)
        self.bytes += max(self._backend.memory(device) - before, 0)
        return graph

    def _segment(self, first: bool, stages: int, chosen: bool) -> Graph | None:
        """A graph of just so many stages, or None where the run is to be put together out of single ones.

        A run longer than all so far gets a graph of its own, and so does a stretch between two chosen stages while
        there is room. A shorter run would not be worth its capture.
        """
        key = (first, stages)
        if key in self._segments:
            self._segments.move_to_end(key)
            return self._segments[key]
        longer, room = stages > self._longest, len(self._segments) < MAX_SEGMENTS
        if self._refused or not (longer or (chosen and room)):
            return None
        if not room:
            oldest, graph = self._segments.popitem(last=False)
            self._outputs.pop(oldest, None)
            graph.release()

        def work() -> torch.Tensor | None:
            if first:
                self.begin()
            return self.advance(stages)

        try:
            # Libraries make handles and plans for each thread, and this may be one that never called the model.
            with as_captured(self.layout.device):
                self._backend.warm_up(self._call_model, self.layout.device)
            self._segments[key] = self._captured(key, work)
        except RuntimeError as error:
            self._refused = f"{type(error).__name__}: {str(error):.200}"
            warnings.warn(
                f"pydiff: {stages} stages cannot be captured in one graph, each is replayed on its own: "
                f"{self._refused}",
                stacklevel=2,
            )
            return None
        self._longest = max(self._longest, stages)
        return self._segments[key]

    def release_segments(self) -> None:
        """Keep the one stage only."""
        for key, graph in self._segments.items():
            graph.release()
            self._outputs.pop(key, None)
        self._segments.clear()
        self._longest = 0

    def release(self) -> None:
        """Give all graphs back."""
        self.release_segments()
        for graph in reversed(self._graphs.values()):
            graph.release()
        self._graphs.clear()
        self._outputs.clear()
        self.mode = "eager"

    # ------------------------------------------------------------------ a run

    def load(self, request: Request) -> None:
        """Fill the buffers with what a request brings; with gradients off."""
        self.buffers.write(request)

    def play(self, first: bool, stages: int, chosen: bool = False) -> torch.Tensor | None:
        """Enqueue `stages` stages; first: after what stands before the loop. Returns the last output of the model."""
        if self.mode == "eager":
            with torch.no_grad():
                if first:
                    self.begin()
                return self.advance(stages)
        worth_it = stages > 1 or (first and stages == 1 and not chosen)
        segment = self._segment(first, stages, chosen) if self.mode == "loop" and worth_it else None
        if segment is not None:
            segment.replay()
            return self._outputs[first, stages]
        if first:
            self._graphs["begin"].replay()
        if self.mode == "device":
            self.buffers.remaining.fill_(stages)
            self._graphs["device"].replay()
        else:
            for _ in range(stages):
                self._graphs["stage"].replay()
        return self._outputs["stage"]

    def run(self, request: Request) -> tuple[Any, torch.Tensor | None]:
        """What `pydiff.run_plan` returns for the request, in the program's mode; and the flags of `check_finite`."""
        with torch.no_grad():
            self.load(request)
            self.replays += 1
            if self.layout.starts and request.source is not None and request.source.is_function:
                request.source.draw()
            trajectory = self._play(request)
            result = self.buffers.tensors.registers[0].clone()
            flags = self.buffers.tables["nonfinite"].clone() if request.options.check_finite else None
            return (result if trajectory is None else (result, torch.stack(trajectory))), flags

    def _play(self, request: Request) -> list[torch.Tensor] | None:
        """All stages of a loaded request, or up to where its callback ends it. Returns the trajectory, if wanted."""
        options, done = request.options, 0
        x, trajectory = self.buffers.tensors.registers[0], None
        with tqdm(total=request.total, unit="call") if options.progress else contextlib.nullcontext() as bar:
            if options.return_trajectory:
                self.play(True, 0)
                trajectory = [x.clone()]
            for span in request.spans():
                if request.source is not None:
                    request.source.prepare(done)
                m = self.play(done == 0 and trajectory is None, span, chosen=span < request.total)
                done += span
                if bar is not None:
                    bar.update(span)
                if trajectory is not None:
                    trajectory.append(x.clone())
                if done - 1 in request.stops and options.callback is not None:
                    assert m is not None
                    times = max(request.plans, key=len).model_times
                    info = StageInfo(done - 1, request.total, float(times[done - 1]), x, m.clone())
                    if options.callback(info):
                        break
        return trajectory


@contextlib.contextmanager
def as_captured(device: torch.device) -> Iterator[None]:
    """The modes in which loops are warmed up and captured, whatever the caller's: a compiler, say, makes code for each.

    Autocast keeps the weights it has cast until its block ends, and a graph would go on reading them: no cache.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
            stack.enter_context(torch.autocast(device.type, dtype=dtype, cache_enabled=False))
        yield
