"""Whether a table is well formed: shapes, finite numbers, no slot read before it is written, no draw unnamed."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydiff.plans import table
from pydiff.plans.base import PlanError, PlanTable


def stage_values(name: str, value: Any, stages: int) -> np.ndarray:
    """A number, or one for each stage, as float64 [stages]; anything else is an error that names `name`."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim > 1 or (array.ndim == 1 and len(array) != stages):
        raise ValueError(
            f"{name} must be a number or one for each of the {stages} model calls, got shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {value}")
    return np.broadcast_to(array, (stages,)).astype(np.float64)


def validate(plan: PlanTable) -> None:
    """Raise `PlanError` unless the table is well formed: shapes, finite numbers, no slot read before it is written."""
    stages = len(plan.coefficients)
    shapes = {
        "coefficients": (stages, table.COEFFICIENT_COLUMNS),
        "indices": (stages, table.INDEX_COLUMNS),
        "alpha": (stages + 1,),
        "sigma": (stages + 1,),
    }
    for name, shape in shapes.items():
        if getattr(plan, name).shape != shape:
            raise PlanError(f"{name} has shape {getattr(plan, name).shape}, expected {shape}")
    if stages == 0:
        raise PlanError("a plan needs at least one stage")
    if len(plan.targets) != stages or not set(plan.targets) <= {"sample", "epsilon"}:
        raise PlanError("targets must name 'sample' or 'epsilon' for each stage")
    if plan.num_slots > table.NUM_SLOTS:
        raise PlanError(f"the plan keeps {plan.num_slots} tensors beside x, at most {table.NUM_SLOTS} are possible")
    if plan.times.ndim != 1 or plan.times.size < 2:
        raise PlanError(f"times has shape {plan.times.shape}, expected steps + 1 >= 2 values")
    for name in ("times", "alpha", "sigma"):
        if not np.isfinite(getattr(plan, name)).all():
            raise PlanError(f"{name} holds a value that is not finite")
    finite = np.isfinite(plan.coefficients)
    finite[:, table.CLIP : table.CLIP + 2] |= np.isinf(plan.coefficients[:, table.CLIP : table.CLIP + 2])
    if not finite.all():
        stage, column = np.argwhere(~finite)[0]
        raise PlanError(
            f"stage {stage} has a coefficient that is not finite (column {column}: "
            f"{plan.coefficients[stage, column]}); the schedule is singular at one of its times"
        )
    if not np.isfinite([plan.start_scale, plan.start_noise, plan.init_std]).all():
        raise PlanError("start_scale, start_noise and init_std must be finite")
    _validate_slots(plan)
    _validate_draws(plan)


def _validate_slots(plan: PlanTable) -> None:
    writes = plan.indices[:, : table.DRAW0]
    outside = (writes < -1) | (writes >= plan.num_slots)
    clash = outside.any(1) | ((writes[:, 0] == writes[:, 1]) & (writes[:, 0] >= 0))
    if clash.any():
        i = int(np.argmax(clash))
        raise PlanError(
            f"stage {i} writes slots {writes[i].tolist()}; they must differ and lie in 0 .. "
            f"{plan.num_slots - 1} (-1: none)"
        )
    reads = (plan.weights[:, :, table.SLOT : table.SLOT + table.NUM_SLOTS] != 0).any(1)
    written = np.arange(table.NUM_SLOTS) == writes[:, :, None]
    before = np.zeros_like(reads)
    before[1:] = np.logical_or.accumulate(written.any(1))[:-1]
    if (reads & ~before).any():
        i, slot = np.argwhere(reads & ~before)[0]
        raise PlanError(f"stage {i} reads slot {slot}, which no earlier stage has written")


def _validate_draws(plan: PlanTable) -> None:
    for k in range(2):
        used = (plan.weights[:, :, table.Z0 + k] != 0).any(1) | (plan.coefficients[:, table.KNOWN + 1 + k] != 0)
        unnamed = used & (plan.indices[:, table.DRAW0 + k] < 0)
        if unnamed.any():
            raise PlanError(f"stage {int(np.argmax(unnamed))} uses draw z{k} but names no draw number")
