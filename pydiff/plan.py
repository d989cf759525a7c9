"""The plan: a sampler compiled to a table, one row (a *stage*) for each call of the model.

A plan holds float64 numbers and nothing else: it prints, hashes, compares, saves and concatenates. What a row means is
the contract of the stage operation (`pydiff.ops.stage`); its columns are those of `pydiff.ops.table`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pydiff.ops import table

FORMAT = "pydiff-plan"
FORMAT_VERSION = 1


class PlanError(ValueError):
    """A table that is not a valid plan."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A compiled sampler of S stages.

    Attributes:
        solver: name of the solver that it was compiled from.
        coefficients: float64 [S, 48], columns as in `pydiff.ops.table`.
        indices: int32 [S, 4]: the two write slots and the two draw numbers of each stage, -1 for none.
        times: float64 [n + 1], the time grid, from the noisiest time to where sampling ends.
        alpha, sigma: float64 [S + 1], signal and noise level of x at each model call, and at the end.
        targets: for each stage what d is: "sample" (the data estimate) or "epsilon" (the noise estimate).
        start_scale, start_noise: x = start_scale * x_T + start_noise * z before the first call; z is draw 0.
        init_std: standard deviation of x_T, when it is drawn.
        slot_names: what each slot holds, for printing ("h" for history, "base").
        config: how it was compiled: schedule, prediction, grid and options, JSON-able.
    """

    solver: str
    coefficients: np.ndarray
    indices: np.ndarray
    times: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    targets: tuple[str, ...]
    start_scale: float = 1.0
    start_noise: float = 0.0
    init_std: float = 1.0
    slot_names: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype in _ARRAYS.items():
            array = np.array(getattr(self, name), dtype=dtype)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "slot_names", tuple(self.slot_names))
        validate(self)

    def __len__(self) -> int:
        """The number of model calls."""
        return len(self.coefficients)

    @property
    def weights(self) -> np.ndarray:
        """[S, 3, 12]: the combinations written to x and to the two slots."""
        return self.coefficients[:, : 3 * table.NUM_OPERANDS].reshape(-1, 3, table.NUM_OPERANDS)

    @property
    def model_times(self) -> np.ndarray:
        """[S]: the time that the model is told at each call."""
        return self.coefficients[:, table.TIME]

    @property
    def num_slots(self) -> int:
        return len(self.slot_names)

    @cached_property
    def num_draws(self) -> int:
        """How many Gaussian tensors a run consumes, apart from the x_T it starts from."""
        highest = int(self.indices[:, table.DRAW0 :].max(initial=-1))
        return max(highest + 1, int(self.start_noise != 0))

    @property
    def stochastic(self) -> bool:
        return self.num_draws > 0

    @cached_property
    def guided(self) -> bool:
        """Whether any stage has a guidance scale other than 1."""
        return bool((self.coefficients[:, table.GUIDANCE] != 1).any())

    @cached_property
    def operands(self) -> frozenset[str]:
        """Which of the caller's tensors a stage has weights for: "known", "constant", "extra"."""
        columns = {
            "constant": self.weights[:, :, table.CONSTANT],
            "extra": self.weights[:, :, table.EXTRA],
            "known": self.coefficients[:, table.KNOWN],
        }
        return frozenset(name for name, column in columns.items() if (column != 0).any())

    def with_guidance(self, scale: float | np.ndarray) -> Plan:
        """The same plan with another guidance scale: a number, or one for each stage."""
        coefficients = self.coefficients.copy()
        coefficients[:, table.GUIDANCE] = stage_values("guidance_scale", scale, len(self))
        return replace(self, coefficients=coefficients)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return int(self.digest()[:15], 16)

    def digest(self) -> str:
        """Hexadecimal hash of everything that decides what the plan computes, and nothing else."""
        h = hashlib.blake2b(digest_size=16)
        for name in ("coefficients", "indices"):
            h.update(getattr(self, name).tobytes())
        h.update(repr((self.start_scale, self.start_noise, self.init_std, self.num_slots)).encode())
        return h.hexdigest()

    def __add__(self, other: Plan) -> Plan:
        return concatenate(self, other)

    def __str__(self) -> str:
        from pydiff.plan_text import format_plan

        return format_plan(self)

    def __repr__(self) -> str:
        return f"Plan({self.solver!r}, stages={len(self)}, slots={self.num_slots}, draws={self.num_draws})"

    def to_dict(self) -> dict[str, Any]:
        arrays = {name: _json_numbers(getattr(self, name)) for name in _ARRAYS}
        scalars = {name: getattr(self, name) for name in _SCALARS}
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            **scalars,
            **arrays,
            "targets": list(self.targets),
            "slot_names": list(self.slot_names),
            "config": self.config,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        if data.get("format") != FORMAT:
            raise PlanError(f"not a plan: field 'format' is {data.get('format')!r}, expected {FORMAT!r}")
        if data.get("version") != FORMAT_VERSION:
            raise PlanError(
                f"plan format version {data.get('version')!r} is not supported, expected {FORMAT_VERSION}; "
                "compile the plan again with this version of pydiff"
            )
        names = [*_SCALARS, *_ARRAYS, "targets", "slot_names", "config"]
        missing = [name for name in names if name not in data]
        if missing:
            raise PlanError(f"not a complete plan: missing {', '.join(missing)}")
        try:
            return cls(**{name: data[name] for name in names})
        except (TypeError, ValueError) as error:
            raise PlanError(f"not a valid plan: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; float64 values survive exactly. The file appears whole or not at all."""
        path = Path(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                json.dump(self.to_dict(), f, allow_nan=False)
            os.chmod(temporary, 0o644)  # mkstemp's files are private to their owner
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote. Raises `PlanError` naming the file if it is not a valid plan."""
        content = Path(path).read_bytes()
        try:
            data = json.loads(content)
        except ValueError as error:  # no JSON, or no text at all
            raise PlanError(f"{path} is not a plan file (truncated?): {error}; save the plan again") from error
        try:
            return cls.from_dict(data if isinstance(data, dict) else {})
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


_ARRAYS = {
    "coefficients": np.float64,
    "indices": np.int32,
    "times": np.float64,
    "alpha": np.float64,
    "sigma": np.float64,
}
_SCALARS = ("solver", "start_scale", "start_noise", "init_std")


def _json_numbers(array: np.ndarray) -> list[Any]:
    """The array as nested lists; infinities, which JSON lacks, as the strings that numpy reads them from."""
    if array.dtype == np.float64 and np.isinf(array).any():
        return np.where(np.isinf(array), array.astype(str).astype(object), array.astype(object)).tolist()
    return array.tolist()


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


def validate(plan: Plan) -> None:
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


def _validate_slots(plan: Plan) -> None:
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


def _validate_draws(plan: Plan) -> None:
    for k in range(2):
        used = (plan.weights[:, :, table.Z0 + k] != 0).any(1) | (plan.coefficients[:, table.KNOWN + 1 + k] != 0)
        unnamed = used & (plan.indices[:, table.DRAW0 + k] < 0)
        if unnamed.any():
            raise PlanError(f"stage {int(np.argmax(unnamed))} uses draw z{k} but names no draw number")


def _meet_known(row: np.ndarray, second: Plan, renoising: list[int]) -> None:
    """What stands in a masked region after the row goes to the level that `second` begins at."""
    known = row[table.KNOWN : table.KNOWN + 3]
    if known[0] == 0 or not (second.start_noise or second.start_scale != 1):
        return
    draw = next((k for k in range(2) if known[1 + k] != 0), None)
    known[0] = second.alpha[0]
    if second.sigma[0] != 0:
        known[1 + (renoising[0] if draw is None else draw)] = second.sigma[0]


def concatenate(first: Plan, second: Plan) -> Plan:
    """Run `second` from where `first` ends: one plan whose stages are those of both.

    What `second` does before its first call (adding noise, scaling) is folded into the last stage of `first`. Its draw
    numbers follow those of `first`. Raises `PlanError` if the noise levels do not meet.
    """
    begin = np.array([second.alpha[0], second.sigma[0]])
    end = np.array(
        [first.alpha[-1] * second.start_scale, np.hypot(first.sigma[-1] * second.start_scale, second.start_noise)]
    )
    if not np.allclose(begin, end, rtol=1e-6, atol=1e-9):
        raise PlanError(
            f"the first plan ends at (alpha, sigma) = {tuple(end)}, the second begins at {tuple(begin)}; "
            "compile the second with t_start where the first ends"
        )
    offset = first.num_draws
    if ("known" in first.operands) != ("known" in second.operands):
        raise PlanError("one plan is compiled with known=True and the other is not: a mask would serve one only")
    head, head_index = first.coefficients.copy(), first.indices.copy()
    tail_index = second.indices.copy()
    tail_index[:, table.DRAW0 :] += np.where(tail_index[:, table.DRAW0 :] >= 0, offset, 0)
    last = head[-1, : table.NUM_OPERANDS]
    last *= second.start_scale
    free: list[int] = []
    if second.start_noise:
        free = [k for k in range(2) if head_index[-1, table.DRAW0 + k] < 0]
        if not free:
            raise PlanError("the last stage of the first plan already uses two draws; no room for the renoising one")
        last[table.Z0 + free[0]] = second.start_noise
        head_index[-1, table.DRAW0 + free[0]] = offset
    _meet_known(head[-1], second, free)
    names = max(first.slot_names, second.slot_names, key=len)
    return Plan(
        solver=first.solver if first.solver == second.solver else f"{first.solver}+{second.solver}",
        coefficients=np.concatenate([head, second.coefficients]),
        indices=np.concatenate([head_index, tail_index]),
        times=np.concatenate([first.times, second.times[1:] if second.times[0] == first.times[-1] else second.times]),
        alpha=np.concatenate([first.alpha[:-1], second.alpha]),
        sigma=np.concatenate([first.sigma[:-1], second.sigma]),
        targets=first.targets + second.targets,
        start_scale=first.start_scale,
        start_noise=first.start_noise,
        init_std=first.init_std,
        slot_names=names,
        config={"concatenated": [first.config, second.config]},
    )
