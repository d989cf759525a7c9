"""The captured loop of a sampler: which graph serves a call, when one is made, and when there is none."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from pydiff.graph.backend import Backend, CudaGraphs
from pydiff.graph.guards import Guard, settings
from pydiff.graph.program import Program, as_captured
from pydiff.graph.request import Request
from pydiff.graph.warm_up import Uncapturable, check_device, warm_up
from pydiff.ops.measured import Measured
from pydiff.run.conditions import structure
from pydiff.run.loop import raise_if_nonfinite
from pydiff.run.warning import warn

MODES = ("auto", "loop", "stage", "device")
MAX_REFUSED = 64
TRIAL_STAGES = 8
"""As many as are timed to choose a mode."""


@dataclass
class GraphStats:
    """What a sampler's graphs have done so far."""

    captures: int = 0
    """Captured loops made; each holds several graphs."""
    recaptures: int = 0
    """Of these, how many because the model had changed."""
    evictions: int = 0
    """Loops released to make room for others."""
    replays: int = 0
    """Calls of the sampler that replayed graphs."""
    eager: int = 0
    """Calls that ran eagerly, because no graph could be made or none pays."""
    held: list[str] = field(default_factory=list)
    """The loops held now, the most recently used last: shape, dtype, mode, graphs, replays."""
    graphs: int = 0
    """Graphs held now."""
    bytes: int = 0
    """Memory that torch took from the device while the held loops were made."""
    refused: list[str] = field(default_factory=list)
    """Shapes of which calls run eagerly, and why."""

    def __str__(self) -> str:
        lines = [
            f"{self.replays} calls replayed graphs, {self.eager} ran eagerly; {self.captures} captures "
            f"({self.recaptures} of changed models), {self.evictions} evictions",
            f"{self.graphs} graphs in {len(self.held)} loops, {self.bytes / 2**20:.1f} MiB",
        ]
        lines += [f"  {loop}" for loop in self.held]
        return "\n".join([*lines, *(f"  eager: {refusal}" for refusal in self.refused)])


class Refusal(NamedTuple):
    """Why a loop is not captured."""

    shape: str
    """Of the samples."""
    reason: str
    """What is said of it, in `GraphStats` and in the warning."""
    guard: Guard | None
    """The model it was of: a changed one is tried again. None where every call changes it, or it cannot be guarded."""


class CapturedLoop:
    """A bounded store of captured loops for one sampler, safe to use from several threads and streams.

    Args:
        mode: "stage", "loop", "device" or "auto", see `pydiff.Sampler`.
        max_graphs: how many loops (of different shapes, dtypes, structures of the condition) are held.
        backend: where graphs come from; torch's CUDA graphs by default.
    """

    def __init__(self, mode: str, max_graphs: int = 4, backend: Backend | None = None):
        if mode not in MODES:
            raise ValueError(f"graph must be True, False or one of {', '.join(map(repr, MODES))}, got {mode!r}")
        if not isinstance(max_graphs, int) or isinstance(max_graphs, bool) or max_graphs < 1:
            raise ValueError(f"max_graphs must be an integer of at least 1, got {max_graphs!r}")
        self.mode, self.max_graphs, self._given_backend = mode, max_graphs, backend
        self._backend: Backend = backend or CudaGraphs()
        self._lock = threading.RLock()
        self._running = False
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()
        self._refused: OrderedDict[Hashable, Refusal] = OrderedDict()
        self._pools: dict[torch.device, Any] = {}
        self._measured: dict[torch.device, Measured] = {}
        self._stats = GraphStats()
        self._warned: set[str] = set()

    def __reduce__(self) -> Any:
        # Graphs belong to a process and a device; a copy makes its own.
        return type(self), (self.mode, self.max_graphs, self._given_backend)

    def run(self, request: Request, eagerly: Callable[[], Any]) -> Any:
        """The result of a request, that of `eagerly` where it cannot run as a graph."""
        replayed = self._replay(request)
        if replayed is None:
            self._stats.eager += 1
            return eagerly()
        result, flags = replayed
        raise_if_nonfinite(flags, request.plans, request.row_plan)  # waits for the device, and for no other thread
        return result

    def _replay(self, request: Request) -> tuple[Any, torch.Tensor | None] | None:
        """The result and the flags of rows that were not finite; None where the loop has to run eagerly."""
        device = request.layout.device
        available, reason = self._backend.available(device)
        if not available or 0 in request.layout.shape or not request.total:
            if not available and self.mode != "auto":
                self._warn("available", f"the loop runs without a graph: {reason}")
            return None
        if self._backend.capturing(device):
            raise RuntimeError(
                "this sampler captures CUDA graphs, and was called while another capture is under way "
                "on the current stream; make it with graph=False to be captured, or call it outside"
            )
        with self._lock, self._backend.ordered(device):
            # A callback may call its own sampler, whose buffers are in use.
            program = None if self._running else self._program(request)
            if program is None:
                return None
            self._running = True
            try:
                replayed = program.run(request)
            finally:
                self._running = False
            self._stats.replays += 1
        return replayed

    # ------------------------------------------------------------------ which program

    def _program(self, request: Request) -> Program | None:
        key = _key(request)
        program = self._programs.get(key)
        if program is not None and program.guard is not None and not program.guard.holds():
            self._drop_changed(program.guard.difference())
            program = None
        if program is not None and program.capacity < request.rows_of_tables:
            self._drop(key)
            program = None
        if program is not None:
            self._programs.move_to_end(key)
            return program
        refusal = self._refused.get(key)
        if refusal is not None and (refusal.guard is None or refusal.guard.holds()):
            return None
        self._refused.pop(key, None)
        return self._make(key, request)

    def _drop_changed(self, difference: str) -> None:
        """Release every loop that no longer fits its model: what one of them noticed concerns the others too."""
        self._warn(
            "changed",
            f"{difference or 'the model changed'} since the loop was captured: it is captured anew. "
            "Change weights in place (copy_) to keep the graphs",
        )
        changed = [key for key, program in self._programs.items() if program.guard and not program.guard.holds()]
        for key in changed:
            self._drop(key)
        self._stats.recaptures += len(changed)

    def _make(self, key: Hashable, request: Request) -> Program | None:
        device = request.layout.device
        check_device(request.model, device)
        while len(self._programs) >= self.max_graphs:
            self._drop(next(iter(self._programs)))
            self._stats.evictions += 1
        if self._stats.evictions == 2 * self.max_graphs:
            self._warn(
                "turns",
                "calls take turns with more shapes and conditions than max_graphs, and capture again "
                "and again: raise max_graphs, and make objects in cond once",
            )
        program = None
        try:
            with as_captured(device):
                program = Program(request, self._backend, self._pool(device), keep=self.mode in ("auto", "device"))
                program.load(request)
                draws = warm_up(program, request, self._backend)
                program.load(request)
                self._choose(key, program, request, draws)
        except torch.OutOfMemoryError as error:  # there may be more memory next time
            self._release(program, device)
            self._warn("out of memory", f"the loop runs without a graph: {error}")
            return None
        except Uncapturable as error:
            self._give_up(key, request, program, str(error))
            return None
        except BaseException:
            self._release(program, device)
            raise
        if program.mode == "eager":
            self._give_up(key, request, program, self._why_not(key, device))
            return None
        self._programs[key] = program
        self._stats.captures += 1
        return program

    def _choose(self, key: Hashable, program: Program, request: Request, draws_random: bool) -> None:
        """Capture, in the mode that was asked for or the one measured fastest."""
        candidates: tuple[str, ...] = ("eager", "stage", "device", "loop") if self.mode == "auto" else (self.mode,)
        if draws_random and "device" in candidates:
            # A replay of torch's own advances its generator; a loop on the device would repeat the same numbers.
            candidates = tuple(c for c in candidates if c != "device") or ("stage",)
            self._warn("random", "the model draws random numbers: its stages are replayed one by one")
        if len(candidates) == 1:
            return self._capture(program, candidates[0])

        # In the order of the memory they take: `Measured` wants 2 % for each further step.
        device = request.layout.device
        timer = partial(self._backend.microseconds, device=device)
        measured = self._measured.setdefault(device, Measured(timer=timer, may_measure=lambda: True))
        found = measured.choose(key, {mode: partial(_run_once, program, request, mode) for mode in candidates})
        program.release_segments()
        self._capture(program, found)

    def _why_not(self, key: Hashable, device: torch.device) -> str:
        choice = self._measured[device].choices()[key]
        times = ", ".join(f"{mode} {us:.0f} us" for mode, us in choice.microseconds.items())
        if len(choice.microseconds) == 1:
            return next(iter(choice.refused.values()))
        return f"a graph gains less than 2 % on this model and shape (up to {TRIAL_STAGES} stages: {times})"

    def _capture(self, program: Program, mode: str) -> None:
        try:
            program.capture(mode)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if mode == "device":
                self._warn("device", f"there is no loop on the device, stages are replayed one by one: {error}")
                return self._capture(program, "stage")
            raise Uncapturable.from_error(error) from error

    # ------------------------------------------------------------------ giving back

    def _give_up(self, key: Hashable, request: Request, program: Program | None, reason: str) -> None:
        guard = program.guard if program is not None else None
        self._release(program, request.layout.device)
        while len(self._refused) >= MAX_REFUSED:
            self._refused.popitem(last=False)
        lasting = guard is None or not guard.holds()
        self._refused[key] = Refusal(str(list(request.layout.shape)), reason, None if lasting else Guard(request.model))
        self._warn(reason, f"the loop runs without a graph: {reason}")

    def _pool(self, device: torch.device) -> Any:
        if device not in self._pools:
            self._pools[device] = self._backend.new_pool(device)
        return self._pools[device]

    def _drop(self, key: Hashable) -> None:
        program = self._programs.pop(key)
        self._release(program, program.layout.device)

    def _release(self, program: Program | None, device: torch.device) -> None:
        if program is not None:
            self._backend.wait(device)
            program.release()
        if not any(p.layout.device == device for p in self._programs.values()):
            # torch frees a pool with its last graph, and takes none twice.
            self._pools.pop(device, None)

    def release(self) -> None:
        """Give back all graphs and their memory; the next call captures anew."""
        with self._lock:
            if self._running:
                raise RuntimeError("release() was called from a callback, in the middle of a run; call it afterwards")
            for key in list(self._programs):
                self._drop(key)
            self._refused.clear()
            self._measured.clear()
            self._warned.clear()

    def stats(self) -> GraphStats:
        """Counts since the sampler was made, and what it holds now."""
        s, programs, refused = self._stats, list(self._programs.values()), list(self._refused.values())
        held = [
            f"{list(p.layout.shape)} {str(p.layout.model_dtype).removeprefix('torch.')}, {p.mode}, {p.graphs} "
            f"graphs, {p.replays} runs"
            for p in programs
        ]
        return GraphStats(
            s.captures,
            s.recaptures,
            s.evictions,
            s.replays,
            s.eager,
            held,
            sum(p.graphs for p in programs),
            sum(p.bytes for p in programs),
            [f"{r.shape}: {r.reason}" for r in refused],
        )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn(message)


def _run_once(program: Program, request: Request, mode: str) -> None:
    program.capture(mode)
    program.load(request)
    program.play(True, min(request.total, TRIAL_STAGES))


class _Identity:
    """An object by which it is, without keeping it: its number alone may be another's when it is gone."""

    def __init__(self, value: Any):
        self._hash = id(value)
        self._reference: Callable[[], Any]
        try:
            self._reference = weakref.ref(value)
        except TypeError:  # of a class that allows no such thing
            self._reference = lambda: value

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        mine = self._reference()
        return mine is not None and isinstance(other, _Identity) and other._reference() is mine


def _key(request: Request) -> Hashable:
    """What a captured loop is bound to. Everything else is a matter of what lies in its buffers, or of its guard."""
    model = request.model
    training = model.training if isinstance(model, nn.Module) else None
    return (
        _Identity(model),
        training,
        request.layout,
        request.options.hoist,
        structure(request.arguments),
        settings(request.layout.device),
    )
