"""The memory of a captured loop: everything that may differ from run to run, at addresses that never change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pydiff.graph.request import Layout, Request
from pydiff.ops.stage import StageTensors
from pydiff.plans import table
from pydiff.plans.plan import Plan
from pydiff.run.beginning import expand_operand
from pydiff.run.conditions import copy_into, map_tensors

_NUMPY: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int32: np.int32,
    torch.int64: np.int64,
}
_ALIGNMENT = 16


class Tables:
    """The plans' tables and where each row stands in them: one piece of device memory, which one copy fills.

    coefficients [capacity, 48], indices [capacity, 4], seeds [B], cursor [B], stop [B], nonfinite [B], and
    init_std, start_scale, start_noise [B]: what a row's plan does to x_T. Types as in `StageTensors`.
    """

    def __init__(self, capacity: int, rows: int, dtype: torch.dtype, device: torch.device):
        self.capacity = capacity
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "coefficients": ((capacity, table.COEFFICIENT_COLUMNS), dtype),
            "indices": ((capacity, table.INDEX_COLUMNS), torch.int32),
            "seeds": ((rows,), torch.int64),
            **{name: ((rows,), torch.int32) for name in ("cursor", "stop", "nonfinite")},
            **{name: ((rows,), dtype) for name in ("init_std", "start_scale", "start_noise")},
        }
        self._places: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]] = {}
        end = 0
        for name, (shape, kind) in fields.items():
            size = math.prod(shape) * kind.itemsize
            self._places[name] = (end, end + size, shape, kind)
            end = -(-(end + size) // _ALIGNMENT) * _ALIGNMENT
        self._bytes = torch.zeros(end, dtype=torch.uint8, device=device)
        self._pinned = device.type == "cuda"
        self._written: tuple[list[int], np.ndarray, Any] | None = None  # of the run before: usually the same plan

    def __getitem__(self, name: str) -> torch.Tensor:
        start, end, shape, kind = self._places[name]
        return self._bytes[start:end].view(kind).view(shape)

    def write(
        self, plans: Sequence[Plan], row_plan: Sequence[int], indices: Sequence[np.ndarray], seeds: Sequence[int]
    ) -> None:
        """Fill everything for a run that begins; the host does not wait for the device."""
        key = [*map(id, plans), *row_plan, *map(id, indices)]
        if self._written is None or self._written[0] != key:
            self._written = (key, self._image(plans, row_plan, indices), (plans, indices))
        # Memory of its own each time: the copy of the run before may still be under way.
        staging = torch.empty(self._bytes.shape, dtype=torch.uint8, pin_memory=self._pinned)
        raw = staging.numpy()
        raw[:] = self._written[1]
        start, end, _, _ = self._places["seeds"]
        raw[start:end].view(np.int64)[:] = seeds
        self._bytes.copy_(staging, non_blocking=True)

    def _image(self, plans: Sequence[Plan], row_plan: Sequence[int], indices: Sequence[np.ndarray]) -> np.ndarray:
        """The bytes that such plans fill the memory with, but for the seeds."""
        raw = np.zeros(len(self._bytes), np.uint8)
        host = {
            name: raw[start:end].view(_NUMPY[kind]).reshape(shape)
            for name, (start, end, shape, kind) in self._places.items()
        }
        first, starts, stops = 0, [], []
        for plan, own in zip(plans, indices):
            last = first + len(plan)
            host["coefficients"][first:last] = plan.coefficients
            host["indices"][first:last] = own
            starts.append(first)
            stops.append(last)
            first = last
        # Rows of the batch that have finished stand one past their plan: what is there has to be a number.
        host["coefficients"][first:] = host["coefficients"][first - 1]
        host["indices"][first:] = -1
        host["cursor"][:] = [starts[k] for k in row_plan]
        host["stop"][:] = [stops[k] for k in row_plan]
        host["nonfinite"][:] = -1
        for name in ("init_std", "start_scale", "start_noise"):
            host[name][:] = [getattr(plans[k], name) for k in row_plan]
        return raw


class Buffers:
    """`tensors`, what the stage operation works on, and `arguments`, the model's; `write` fills them for a run."""

    def __init__(self, layout: Layout, capacity: int, arguments: Mapping[str, Any]):
        device, rows, dtype = layout.device, layout.shape[0], layout.dtype
        self.layout, self.tables = layout, Tables(capacity, rows, dtype, device)

        def own(name: str) -> torch.Tensor | None:
            return torch.zeros(layout.shape, dtype=dtype, device=device) if name in layout.operands else None

        noise = torch.zeros((layout.draws, *layout.shape), dtype=dtype, device=device) if layout.draws else None
        model_shape = (layout.copies * rows, *layout.shape[1:])
        self.tensors = StageTensors(
            # All slots, so that any solver finds room.
            registers=torch.zeros((1 + table.NUM_SLOTS, *layout.shape), dtype=dtype, device=device),
            cursor=self.tables["cursor"],
            stop=self.tables["stop"],
            seeds=self.tables["seeds"],
            coefficients=self.tables["coefficients"],
            indices=self.tables["indices"],
            copies=layout.copies,
            model_input=torch.zeros(model_shape, dtype=layout.model_dtype, device=device),
            model_time=torch.zeros(layout.copies * rows, dtype=dtype, device=device),
            mask=own("mask"),
            known=own("known"),
            constant=own("constant"),
            extra=own("extra"),
            noise=noise,
            nonfinite=self.tables["nonfinite"],
        )
        self.remaining = torch.zeros(1, dtype=torch.int32, device=device)
        self.arguments = map_tensors(dict(arguments), lambda t: torch.empty_like(t, device=device, requires_grad=False))

    def write(self, request: Request) -> None:
        """Everything a run begins with, but what is computed from it on the device."""
        self.tables.write(request.plans, request.row_plan, request.indices, request.seeds)
        t = self.tensors
        if request.x is not None:
            t.registers[0].copy_(request.x, non_blocking=True)
        for name, value in request.operands.items():
            getattr(t, name).copy_(expand_operand(name, value, self.layout.shape), non_blocking=True)
        if request.source is not None and t.noise is not None:
            if request.source.is_function:
                # Draws go straight to where they are read.
                request.source.buffer = t.noise[: len(request.source.buffer)]
            else:
                count = min(len(t.noise), len(request.source.buffer))
                t.noise[:count].copy_(request.source.buffer[:count], non_blocking=True)
        copy_into(self.arguments, request.arguments)
