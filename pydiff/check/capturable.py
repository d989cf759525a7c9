"""What in a model keeps its sampling loop from being captured, found without a GPU: `pydiff.check_capturable`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pydiff.check.fake_cuda import fake_cuda, fake_mode
from pydiff.check.problems import Problem
from pydiff.check.watch import Watch
from pydiff.plans.plan import Plan
from pydiff.run.beginning import init
from pydiff.run.loop import caller, hoist_out, model_arguments, run
from pydiff.run.model import Model
from pydiff.run.options import RunOptions

STEPS = 3  # the first call may fill caches, the third has to do what the second did


@dataclass(frozen=True)
class CaptureReport:
    """What keeps a loop from being captured. True where nothing does; prints as a text.

    Attributes:
        problems: what was found, one for each kind and line, with place and remedy.
        calls: model calls that were watched.
        operators: operators that were seen in them and between them.
        stopped_by: the error that ended the run, after which nothing was seen, or None.
    """

    problems: tuple[Problem, ...]
    calls: int
    operators: int
    stopped_by: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was found; what the report itself is true for."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        seen = f"{self.calls} model calls, {self.operators} operators"
        if self.ok:
            compared = "" if self.calls >= STEPS else f"; calls were not compared, being fewer than {STEPS}"
            return f"nothing was found that prevents the capture in a CUDA graph ({seen}{compared})"
        lines = [f"in the way of the capture in a CUDA graph: {len(self.problems)} found ({seen})"]
        if all(p.kind == "error" for p in self.problems):
            lines = [f"the loop could not be followed to its end ({seen})"]
        for p in self.problems:
            lines += [
                "",
                f"{p.kind}: {p.what}",
                f"  {p.file}:{p.line} in {p.function}",
                f"    {p.code}",
                f"  {p.remedy}",
            ]
        if self.stopped_by is not None:
            lines += ["", f"There may be more: the run ended in {self.stopped_by}"]
        return "\n".join(lines)


def check_plan(
    plan: Plan | Sequence[Plan],
    model: Model,
    x: torch.Tensor,
    *,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    allocations: bool = False,
    **init_options: Any,
) -> CaptureReport:
    """`check_capturable` for a plan (or one a row); allocations: judge also what the loop itself allocates.

    init_options: of `pydiff.init`: dtype, model_dtype, mask, known, constant, extra, noise.
    """
    watch, stopped_by = Watch(allocations=allocations), None
    model, x, cond, uncond, init_options = fake_cuda((model, x, cond, uncond, init_options))
    with torch.no_grad(), fake_mode():
        guided = any(p.guided for p in ([plan] if isinstance(plan, Plan) else plan))
        dtype = init_options.get("model_dtype") or init_options.get("dtype") or torch.float32
        arguments = model_arguments(RunOptions(cond=cond, uncond=uncond), guided, x.shape[0], x.device, dtype)
        state = init(plan, x, seed=0, copies=2 if guided else 1, **init_options)
        tensors = state.tensors
        try:
            call = caller(tensors, model, arguments, hoist_out(tensors, model, arguments))
            with watch:
                run(state, watch.model(lambda x, t: call(x)), {}, RunOptions(check_finite=False, hoist=False))
        except Exception as error:  # whatever the model raises on fake tensors is a finding
            watch.failed(error)
            stopped_by = f"{type(error).__name__}: {error}"
    return CaptureReport(watch.problems, watch.calls, watch.operators, stopped_by)
