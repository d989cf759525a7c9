"""CUDA graphs without a GPU: a backend that records the operators of a function on the CPU, and repeats them.

Like a CUDA graph, a recording repeats operators on the addresses, with the numbers and through the branches of its
capture: no line of Python that made it runs again, and what was read on the host then stays as it was. Each result
goes to the memory that the operator's result had at the capture.
"""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pydiff.graph import program
from pydiff.ops import native, stage


class Recording(TorchDispatchMode):
    """Notes every operator with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[torch.Tensor]]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        self._keep_written(operator, args, kwargs)
        result = operator(*args, **kwargs)
        if not operator.is_view:
            given = {id(t) for t in pytree.tree_leaves((args, kwargs))}
            made = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.calls.append((operator, args, kwargs, [t for t in made if id(t) not in given]))
        return result

    def _keep_written(self, operator: Any, args: tuple, kwargs: dict) -> None:
        arguments = operator._schema.arguments
        for argument, value in [*zip(arguments, args), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]:
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self._before.setdefault(storage._cdata, (storage, storage.clone()))

    def undo(self) -> None:
        """A capture carries nothing out: what was written is put back."""
        for storage, before in self._before.values():
            storage.copy_(before)


class RecordedGraph:
    def __init__(self, calls: list[Any]):
        self.calls = calls
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        assert self.calls is not None, "replayed after its release"
        self.replays += 1
        for operator, args, kwargs, made in self.calls:
            again = [t for t in pytree.tree_leaves(operator(*args, **kwargs)) if isinstance(t, torch.Tensor)]
            for target, value in zip(made, again[-len(made) :] if made else []):
                if target.data_ptr() != value.data_ptr():
                    target.copy_(value)

    def release(self) -> None:
        self.calls = None


class RecordedLoop:
    """The WHILE loop: the decision is that of csrc/while.h."""

    def __init__(self, graph: RecordedGraph, cursor: torch.Tensor, stop: torch.Tensor, remaining: torch.Tensor):
        self.graph, self.cursor, self.stop, self.remaining = graph, cursor, stop, remaining
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        while int(self.remaining) > 0 and bool((self.cursor < self.stop).any()):
            self.graph.replay()
            self.remaining -= 1

    def release(self) -> None:
        self.graph = None


class RecordedGraphs:
    """The backend. `graphs` are all ever made; `fail` is raised by the captures that it is set for."""

    def __init__(self, device_loop: bool = True, times: dict[str, float] | None = None):
        self.graphs: list[Any] = []
        self.has_device_loop, self.times = device_loop, times
        self.busy = False
        self.fail: Exception | None = None
        self.pools: list[object] = []
        self.used_pools: list[object] = []
        self.problems: list[str] = []
        self.measurements = 0

    def __deepcopy__(self, memo: Any) -> RecordedGraphs:
        return self

    @property
    def alive(self) -> int:
        return sum(g.calls is not None for g in self.graphs if isinstance(g, RecordedGraph))

    def available(self, device: torch.device) -> tuple[bool, str]:
        return device.type == "cpu", "recordings are for the CPU"

    def capturing(self, device: torch.device) -> bool:
        return self.busy

    def warm_up(self, function: Any, device: torch.device) -> None:
        function()

    def capture(self, function: Any, device: torch.device, pool: Any, keep: bool = False) -> RecordedGraph:
        if self.fail is not None:
            raise self.fail
        self.used_pools.append(pool)
        recording = Recording()
        try:
            with pytest.MonkeyPatch.context() as patch:  # so that the mode sees pydiff's own operators
                patch.setattr(native, "is_plain", lambda tensor: False)
                patch.setattr(program, "stage", stage._through_operator)
                with recording:
                    function()
        finally:
            recording.undo()
        graph = RecordedGraph(recording.calls)
        self.graphs.append(graph)
        return graph

    def device_loop(self, graph: Any, *tensors: torch.Tensor) -> RecordedLoop:
        if not self.has_device_loop:
            raise native.Unsupported("the driver supports CUDA 12.2")
        self.graphs.append(RecordedLoop(graph, *tensors))
        return self.graphs[-1]

    @contextlib.contextmanager
    def watch(self):
        yield SimpleNamespace(problems=self.problems, model=lambda call: call)

    def new_pool(self, device: torch.device) -> object:
        self.pools.append(object())
        return self.pools[-1]

    def memory(self, device: torch.device) -> int:
        return 1000 * self.alive

    def random_offset(self, device: torch.device) -> int:
        return hash(bytes(torch.default_generator.get_state().tolist()))

    def microseconds(self, function: Any, device: torch.device) -> float:
        if self.times is None:
            start = time.perf_counter()
            function()
            return 1e6 * (time.perf_counter() - start)
        function()
        self.measurements += 1
        return self.times[function.args[-1]]

    def wait(self, device: torch.device) -> None:
        pass

    def ordered(self, device: torch.device) -> Any:
        return contextlib.nullcontext()
