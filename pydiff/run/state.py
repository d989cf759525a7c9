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
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from pydiff.ops.stage import FIELDS, StageTensors, stage, write_model_input_reference
from pydiff.plans.plan import Plan
from pydiff.run.noise_source import NoiseSource
from pydiff.run.options import warn_renamed


class State:
    """A batch in the middle of its plans. Made by `init`, advanced by `step`, one stage (model call) at a time.

    A model call changes nothing in it; `step` commits. `copies` is 1, or 2 where the model runs on [unconditional;
    conditional] rows for classifier-free guidance.

    Args:
        tensors: the memory it works in (`pydiff.ops.stage.StageTensors`), `known` and the caller's other tensors
            (`Plan.operands`) among them.
        plans, row_plan: the distinct plans of the batch, and which of them each row follows.
        source: the caller's noise, or None where it comes from the seeds.

    Attributes:
        stages_done: how many times `step` has run.
        total: stages until every row has reached the end of its plan.
    """

    def __init__(
        self, tensors: StageTensors, plans: Sequence[Plan], row_plan: Sequence[int], source: NoiseSource | None
    ):
        self.tensors, self.plans, self.row_plan, self.source = tensors, tuple(plans), tuple(row_plan), source
        self.stages_done = 0
        self.total = max((len(plans[k]) for k in row_plan), default=0)

    @property
    def x(self) -> torch.Tensor:
        """[B, *sample], the current sample, float32 (float64 on request). A view: clone it to keep it."""
        return self.tensors.registers[0]

    @property
    def model_input(self) -> torch.Tensor:
        """[copies * B, *sample] in the model's dtype, what to call the model with. A view that `step` overwrites.

        With copies = 2 its rows are [unconditional; conditional], both with the same x.
        """
        return self.x if self.tensors.model_input is None else self.tensors.model_input

    @property
    def model_time(self) -> torch.Tensor:
        """[copies * B] the time to tell the model of each row. A view that `step` overwrites."""
        assert self.tensors.model_time is not None
        return self.tensors.model_time

    @property
    def finished(self) -> bool:
        """Whether every row has reached the end of its plan (or its early stop), counted on the host."""
        return self.stages_done >= self.total

    @property
    def steps_done(self) -> int:
        """The old name of `stages_done`, for one more release."""
        warn_renamed("State.steps_done", "State.stages_done")
        return self.stages_done

    @property
    def stage(self) -> torch.Tensor:
        """int32 [B], the stage that each row is at, counted from the start of its plan."""
        return self.tensors.cursor - self._starts()

    def _starts(self) -> torch.Tensor:
        return torch.as_tensor(first_stages(self.plans, self.row_plan), dtype=torch.int32, device=self.x.device)

    def nonfinite(self) -> dict[int, int]:
        """Rows whose model output was not finite, with the stage (in the row's plan) at which that was first seen.

        Reads device memory: a synchronisation on a GPU.
        """
        assert self.tensors.nonfinite is not None
        return nonfinite_rows(self.tensors.nonfinite, self.plans, self.row_plan)

    def clone(self) -> State:
        """An independent copy: stepping one leaves the other as it is.

        Raises: ValueError where the noise comes from a function or a generator, which cannot be asked twice.
        """
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

        Args:
            other: the state it comes from, left as it is.
            source, row: rows of `other` and of this batch, from 0; what this row did before is lost.

        Raises: ValueError for rows that there are not, other plans, shapes or (with guidance) copies, and for batches
            that were given noise or operands.
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
        self.total = self.stages_done + max(remaining)

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
        """Everything needed to go on elsewhere: tensors and the plans' own descriptions. For `torch.save`.

        Raises: ValueError where the noise comes from a function or a generator, which cannot be saved.
        """
        self._refuse_noise_function("saved")
        t = self.tensors
        names = [n for n in FIELDS if n != "copies"]
        kept = {n: getattr(t, n).clone() for n in names if getattr(t, n) is not None}
        return {
            "tensors": kept,
            "copies": t.copies,
            "plans": [p.to_dict() for p in self.plans],
            "row_plan": list(self.row_plan),
            "stages_done": self.stages_done,
            "total": self.total,
        }

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> State:
        """The state that `state_dict` described, on the device where the saved tensors are.

        Args:
            saved: what `state_dict` returned.

        Raises: `PlanError` for plans that this version does not read.
        """
        tensors = StageTensors(**{n: v.clone() for n, v in saved["tensors"].items()}, copies=saved["copies"])
        state = cls(tensors, [Plan.from_dict(p) for p in saved["plans"]], saved["row_plan"], None)
        state.stages_done, state.total = saved["stages_done"], saved["total"]
        return state


def first_stages(plans: Sequence[Plan], row_plan: Sequence[int]) -> list[int]:
    """Where each row's plan begins in the tables."""
    starts = [0, *accumulate(map(len, plans))]
    return [starts[k] for k in row_plan]


def nonfinite_rows(flags: torch.Tensor, plans: Sequence[Plan], row_plan: Sequence[int]) -> dict[int, int]:
    """Rows flagged by the stage operation ([B] int32), with the stage in the row's plan; waits for the device."""
    starts = first_stages(plans, row_plan)
    return {row: flag - start for row, (flag, start) in enumerate(zip(flags.tolist(), starts)) if flag >= 0}


def step(state: State, m: torch.Tensor) -> State:
    """Commit one *stage*, that is one model call, and not one step of the time grid, which may take several.

    Args:
        state: from `init`; it is changed in place.
        m: the model's output for `state.model_input`, [copies * B, *sample], float32, bfloat16, float16 or float64, on
            the state's device. With copies = 2 its rows are [unconditional; conditional].

    Returns: the same state, one stage further. Rows at the end of their plan stay what they are.

    Raises: TypeError or ValueError, before anything changes, if m has the wrong shape, dtype or device.

    Example:
        model = pydiff.load_model("mnist")
        plan = pydiff.make_plan("heun", pydiff.VPCosine(), steps=3, prediction="v_prediction")
        state = pydiff.init(plan, plan.init_std * torch.randn(1, 1, 28, 28))
        while not state.finished:
            state = pydiff.step(state, model(state.model_input, state.model_time))
        assert state.stages_done == len(plan) == 6  # two model calls a step
    """
    if state.source is not None:
        state.source.prepare(state.stages_done)
    stage(state.tensors, m)
    state.stages_done += 1
    return state
