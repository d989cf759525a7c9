"""The state of a run: everything that changes between model calls, in one explicit object.

    state = init(plan, x)
    while not state.finished:
        m = model(state.model_input, state.model_time)
        state = step(state, m)

A model call changes nothing; `step` commits. So a call that failed can be made again, a state can be cloned, saved in
the middle of a run, and a row of it moved into another batch.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pydiff.ops.native import is_plain
from pydiff.ops.noise import INITIAL_DRAW, normal
from pydiff.ops.stage import FIELDS, MODEL_DTYPES, StageTensors, stage, write_model_input_reference
from pydiff.plans import table
from pydiff.plans.plan import Plan
from pydiff.run.noise_source import Noise, NoiseSource, source_of

Seed = int | Sequence[int] | torch.Tensor


class State:
    """A batch in the middle of its plans. Made by `init`, advanced by `step`.

    Attributes:
        x: [B, *sample], the current sample, float32 (float64 on request). A view: clone it to keep it.
        model_input: [copies * B, *sample] in the model's dtype, what to call the model with; with guidance its rows
            are [unconditional; conditional].
        model_time: [copies * B] the time of each row.
        plans: the distinct plans of the batch; row_plan: which of them each row follows.
        steps_done: how many times `step` has run.
    """

    def __init__(
        self, tensors: StageTensors, plans: Sequence[Plan], row_plan: Sequence[int], source: NoiseSource | None
    ):
        self.tensors, self.plans, self.row_plan, self.source = tensors, tuple(plans), tuple(row_plan), source
        self.steps_done = 0
        self.total = max((len(plans[k]) for k in row_plan), default=0)

    @property
    def x(self) -> torch.Tensor:
        return self.tensors.registers[0]

    @property
    def model_input(self) -> torch.Tensor:
        return self.x if self.tensors.model_input is None else self.tensors.model_input

    @property
    def model_time(self) -> torch.Tensor:
        assert self.tensors.model_time is not None
        return self.tensors.model_time

    @property
    def finished(self) -> bool:
        """Whether every row has reached the end of its plan (or its early stop), counted on the host."""
        return self.steps_done >= self.total

    @property
    def stage(self) -> torch.Tensor:
        """[B] stage that each row is at, counted from the start of its plan."""
        return self.tensors.cursor - self._starts()

    def _starts(self) -> torch.Tensor:
        return torch.as_tensor(_first_stages(self.plans, self.row_plan), dtype=torch.int32, device=self.x.device)

    def nonfinite(self) -> dict[int, int]:
        """Rows whose model output was not finite, with the stage (in the row's plan) at which that was first seen.

        Reads device memory: a synchronisation on a GPU.
        """
        assert self.tensors.nonfinite is not None
        return nonfinite_rows(self.tensors.nonfinite, self.plans, self.row_plan)

    def clone(self) -> State:
        """An independent copy: stepping one leaves the other as it is."""
        self._refuse_noise_function("cloned")
        other = copy.copy(self)
        t = copy.copy(self.tensors)
        for name in ("registers", "cursor", "stop", "seeds", "model_input", "model_time", "nonfinite"):
            value = getattr(t, name)
            setattr(t, name, None if value is None else value.clone())
        other.tensors = t
        return other

    def _refuse_noise_function(self, what: str) -> None:
        if self.source is not None and self.source.is_function:
            raise ValueError(
                f"a state whose noise comes from a function or generator cannot be {what}; use seeds, or a noise tensor"
            )

    def copy_row_from(self, other: State, source: int, row: int) -> None:
        """Move a request: row `row` of this batch continues where row `source` of `other` is.

        Both must have the same sample shape, and this batch must hold the same plan, with room for its slots. What
        belongs to a batch as a whole (noise given by the caller, masks and other operands) does not move.
        """
        self._check_move(other, source, row)
        plan = other.plans[other.row_plan[source]]
        matches = [k for k, p in enumerate(self.plans) if p == plan]
        if not matches or self.x.shape[1:] != other.x.shape[1:]:
            raise ValueError(
                f"row {source} of the other state cannot continue here: this batch holds plans "
                f"{[p.solver for p in self.plans]} on samples {list(self.x.shape[1:])}, the row follows "
                f"{plan.solver} on {list(other.x.shape[1:])}"
            )
        stage_there = int(other.stage[source])
        self.row_plan = tuple(matches[0] if k == row else p for k, p in enumerate(self.row_plan))
        start = int(self._starts()[row])
        t, o = self.tensors, other.tensors
        t.registers[: plan.num_slots + 1, row].copy_(o.registers[: plan.num_slots + 1, source])
        t.seeds[row] = o.seeds[source]
        t.cursor[row] = start + stage_there
        t.stop[row] = start + len(plan)
        if t.nonfinite is not None:
            t.nonfinite[row] = -1
        write_model_input_reference(t)
        remaining = [len(self.plans[p]) - int(s) for p, s in zip(self.row_plan, self.stage)]
        self.total = self.steps_done + max(remaining)

    def _check_move(self, other: State, source: int, row: int) -> None:
        for name, index, batch in (("source", source, other), ("row", row, self)):
            if not 0 <= index < batch.x.shape[0]:
                raise ValueError(f"{name} must be a row in 0 .. {batch.x.shape[0] - 1}, got {index}")
        for name in ("noise", "mask", "known", "constant", "extra"):
            if getattr(self.tensors, name) is not None or getattr(other.tensors, name) is not None:
                raise ValueError(f"a row cannot move between batches that were given {name}=; it is not per row")
        if other.plans[other.row_plan[source]].guided and self.tensors.copies != other.tensors.copies:
            raise ValueError(
                f"the plan of row {source} is guided: both states must have the same copies, "
                f"got {other.tensors.copies} and {self.tensors.copies}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on elsewhere: tensors and the plans' own descriptions. For `torch.save`."""
        self._refuse_noise_function("saved")
        t = self.tensors
        names = [n for n in FIELDS if n != "copies"]
        kept = {n: getattr(t, n).clone() for n in names if getattr(t, n) is not None}
        return {
            "tensors": kept,
            "copies": t.copies,
            "plans": [p.to_dict() for p in self.plans],
            "row_plan": list(self.row_plan),
            "steps_done": self.steps_done,
            "total": self.total,
        }

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> State:
        """The state that `state_dict` described."""
        tensors = StageTensors(**{n: v.clone() for n, v in saved["tensors"].items()}, copies=saved["copies"])
        state = cls(tensors, [Plan.from_dict(p) for p in saved["plans"]], saved["row_plan"], None)
        state.steps_done, state.total = saved["steps_done"], saved["total"]
        return state


def _first_stages(plans: Sequence[Plan], row_plan: Sequence[int]) -> np.ndarray:
    """Where each row's plan begins in the tables."""
    return np.cumsum([0, *(len(p) for p in plans)])[list(row_plan)]


def nonfinite_rows(flags: torch.Tensor, plans: Sequence[Plan], row_plan: Sequence[int]) -> dict[int, int]:
    """Rows flagged by the stage operation ([B] int32), with the stage in the row's plan; waits for the device."""
    starts = _first_stages(plans, row_plan).tolist()
    return {row: flag - start for row, (flag, start) in enumerate(zip(flags.tolist(), starts)) if flag >= 0}


def seed_values(seed: Seed | None, rows: int) -> list[int]:
    """One seed a row: the given ones; from one number s the seeds s, s + 1, ...; from None random ones."""
    if seed is None:
        seed = int(torch.randint(0, 2**62, ()))
    if isinstance(seed, (bool, float)):
        raise TypeError(f"seed must be an integer or one for each row, got {seed!r}")
    if isinstance(seed, (int, np.integer)):
        values = [int(seed) + k for k in range(rows)]
    else:
        try:
            values = [operator.index(s) for s in seed]
        except TypeError as error:
            raise TypeError(f"seed must be an integer or one for each row, got {seed!r:.80}") from error
    if len(values) != rows:
        raise ValueError(f"seed must be one integer or one for each of the {rows} rows, got {len(values)} seeds")
    outside = [s for s in values if not -(2**63) <= s < 2**63]
    if outside:
        raise ValueError(f"seed must fit 64 bits, got {outside[0]}")
    return values


def row_seeds(seed: Seed | None, rows: int, device: torch.device) -> torch.Tensor:
    """int64 [rows] on `device`: see `seed_values`."""
    return _on_device(seed_values(seed, rows), torch.int64, device)


def _on_device(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of the host in a tensor of their own; to a GPU without waiting for what it is doing."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and is_plain(tensor):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def initial_noise(shape: Sequence[int], seeds: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normals [B, *sample] that sampling starts from: draw number `INITIAL_DRAW` of each row's seed."""
    return normal(seeds, INITIAL_DRAW, shape[1:], dtype=dtype)


@torch.no_grad()
def init(
    plan: Plan | Sequence[Plan],
    x: torch.Tensor,
    *,
    seed: Seed | None = None,
    noise: Noise | None = None,
    copies: int | None = None,
    dtype: torch.dtype = torch.float32,
    model_dtype: torch.dtype | None = None,
    mask: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    constant: torch.Tensor | None = None,
    extra: torch.Tensor | None = None,
) -> State:
    """The state before the first model call.

    Args:
        plan: one plan for all rows, or one for each.
        x: [B, *sample] at the plan's first noise level (x_T); it is copied, not changed.
        seed: of the plan's own noise, an integer or one for each row; random if None.
        noise: the caller's noise in its place: [draws, *x.shape], or a function of the draw number. One plan only.
        copies: 2 for classifier-free guidance: the model runs on [unconditional; conditional] rows. By default 2 where
            a plan is guided, and 1 elsewhere; with 1 the guidance scale of a plan has no effect.
        dtype: float32, or float64, of the sample, the history and the coefficients.
        model_dtype: of the model's input; `dtype` by default.
        mask, known: 1 where `known` (a clean sample) stands; broadcast to x. The plan needs ``known=True``.
        constant, extra: tensors that a plan's "constant" and "extra" operands name; broadcast to x.
    """
    check_x(x)
    plans, row_plan = distinct_plans(plan, x.shape[0])
    check_operands(plans, mask, known, constant, extra)
    if copies is None:
        copies = 2 if any(p.guided for p in plans) else 1
    if copies not in (1, 2):
        raise ValueError(f"copies must be 1 or 2, got {copies}")
    model_dtype = model_dtype or dtype
    check_dtypes(dtype, model_dtype)
    device, rows = x.device, x.shape[0]
    seeds = row_seeds(seed, rows, device)
    slots = max((p.num_slots for p in plans), default=0)
    registers = torch.empty((1 + slots, *x.shape), dtype=dtype, device=device)
    registers[0].copy_(x)
    registers[1:].zero_()
    source = source_of(noise, plans, registers[0])
    indices = [p.indices for p in plans] if source is None else [source.indices]
    starts = np.cumsum([0, *(len(p) for p in plans)])
    cursor = _on_device(starts[:-1][row_plan], torch.int32, device)
    stop = _on_device(starts[1:][row_plan], torch.int32, device)

    def operand(name: str, value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None:
            return None
        return expand_operand(name, value, x.shape, device=device, dtype=dtype)

    tensors = StageTensors(
        registers,
        cursor,
        stop,
        seeds,
        _on_device(np.concatenate([p.coefficients for p in plans]), dtype, device),
        _on_device(np.concatenate(indices), torch.int32, device),
        copies,
        model_input=_model_input(plans, registers[0], copies, model_dtype),
        model_time=torch.empty(copies * rows, dtype=dtype, device=device),
        mask=operand("mask", mask),
        known=operand("known", known),
        constant=operand("constant", constant),
        extra=operand("extra", extra),
        noise=source.buffer if source is not None and plans[0].num_draws else None,
        nonfinite=torch.full((rows,), -1, dtype=torch.int32, device=device),
    )
    tensors.checked = True  # made to fit, just now
    _start(plans, row_plan, registers[0], seeds, source)
    write_model_input_reference(tensors)
    return State(tensors, plans, row_plan, source)


def check_dtypes(dtype: torch.dtype, model_dtype: torch.dtype) -> None:
    """Raise unless a state may have the one and a model's input the other."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if model_dtype not in MODEL_DTYPES:
        raise ValueError(f"model_dtype must be one of {', '.join(map(str, MODEL_DTYPES))}, got {model_dtype}")


def check_shape(name: str, shape: Any) -> tuple[int, ...]:
    """The shape of a batch of samples as a tuple; raises `ValueError` for what is none."""
    values = tuple(shape) if isinstance(shape, Sequence) else ()
    if not values or not all(isinstance(n, int) and n >= 0 for n in values):
        raise ValueError(f"{name} must be [batch, *sample], integers of at least 0, got {shape!r:.80}")
    return values


def expand_operand(name: str, value: torch.Tensor, shape: Sequence[int], **to: Any) -> torch.Tensor:
    """mask, known, constant or extra in the shape of x, and on its device (device=) in its dtype (dtype=)."""
    try:
        return value.to(**to).expand(shape) if to else value.expand(shape)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be a tensor that broadcasts to the shape of x, {list(shape)}, "
            f"got {list(getattr(value, 'shape', ())) or type(value).__name__}"
        ) from error


def check_x(x: Any) -> None:
    """Raise unless x is a batch of samples."""
    if not isinstance(x, torch.Tensor) or x.ndim < 1 or not x.dtype.is_floating_point:
        raise TypeError(f"x must be a floating-point tensor [batch, *sample], got {x!r:.80}")


def distinct_plans(plan: Plan | Sequence[Plan], rows: int) -> tuple[list[Plan], list[int]]:
    """The plans of a batch without repetition, and which of them each of its rows follows."""
    if isinstance(plan, Plan):
        return [plan], [0] * rows
    given = list(plan) if isinstance(plan, Sequence) else []
    if not given or len(given) != rows or not all(isinstance(p, Plan) for p in given):
        raise ValueError(
            f"plan must be a Plan from pydiff.make_plan, or one for each of the {rows} rows of x, got {plan!r:.80}"
        )
    distinct = list(dict.fromkeys(given))
    return distinct, [distinct.index(p) for p in given]


def check_operands(plans: list[Plan], mask: Any, known: Any, constant: Any, extra: Any) -> None:
    if (mask is None) != (known is None):
        raise ValueError("mask and known must be given together: where the mask is 1, known stands")
    if mask is not None and not all("known" in p.operands for p in plans):
        raise ValueError(
            "a mask was given, but the plan holds no weights for the known region; "
            "compile it with make_plan(..., known=True)"
        )
    for name, value in (("constant", constant), ("extra", extra)):
        if value is None and any(name in p.operands for p in plans):
            raise ValueError(f"the plan uses the operand {name!r}: give {name}=")


def _model_input(plans: list[Plan], x: torch.Tensor, copies: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A buffer for the model's input, or None where x itself serves: same dtype, no scaling, no guidance."""
    plain = all((p.coefficients[:, table.INPUT_SCALE] == 1).all() for p in plans)
    if plain and copies == 1 and dtype == x.dtype and not torch.is_inference_mode_enabled():
        return None
    return torch.empty((copies * x.shape[0], *x.shape[1:]), dtype=dtype, device=x.device)


def _start(
    plans: list[Plan], row_plan: list[int], x: torch.Tensor, seeds: torch.Tensor, source: NoiseSource | None
) -> None:
    """What a plan does before its first call: x <- start_scale * x + start_noise * z, z being draw 0."""
    if all(p.start_scale == 1 and p.start_noise == 0 for p in plans):
        return
    z = normal(seeds, 0, x.shape[1:], dtype=x.dtype) if source is None else source.draw()
    shape = (-1, *([1] * (x.ndim - 1)))
    scale = _on_device([plans[k].start_scale for k in row_plan], x.dtype, x.device).reshape(shape)
    weight = _on_device([plans[k].start_noise for k in row_plan], x.dtype, x.device).reshape(shape)
    start(x, scale, weight, z)


def start(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, z: torch.Tensor) -> None:
    """x <- scale * x + weight * z in place; a weight of zero reads no z."""
    x.copy_(scale * x + torch.where(weight == 0, 0.0, weight * z))


def step(state: State, m: torch.Tensor) -> State:
    """Commit one stage: `m` is the model's output for `state.model_input`. Returns the same state, advanced.

    Raises, before anything changes, if `m` has the wrong shape, dtype or device.
    """
    if state.source is not None:
        state.source.prepare(state.steps_done)
    stage(state.tensors, m)
    state.steps_done += 1
    return state
