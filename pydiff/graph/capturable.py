"""`check_capturable`: what in a model keeps its sampling loop from being captured, found without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pydiff.conditions import check_condition
from pydiff.fake_cuda import fake_cuda, fake_mode
from pydiff.graph.problems import Problem
from pydiff.graph.watch import Watch
from pydiff.loop import Model, caller, hoist_out, model_arguments, run
from pydiff.plan import Plan
from pydiff.state import check_shape, init

if TYPE_CHECKING:
    from pydiff.sampler import Sampler

STEPS = 3  # the first call may fill caches, the third has to do what the second did


@dataclass(frozen=True)
class CaptureReport:
    """What keeps a loop from being captured. True where nothing does; prints as a text.

    Attributes:
        problems: what was found, one for each kind and line. calls: model calls that were watched.
        operators: operators that were seen in them and between them.
        stopped_by: the error that ended the run, after which nothing was seen, or None.
    """

    problems: tuple[Problem, ...]
    calls: int
    operators: int
    stopped_by: str | None = None

    @property
    def ok(self) -> bool:
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


def check_capturable(
    model: Model | Sampler,
    x: torch.Tensor | Sequence[int],
    *,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    **options: Any,
) -> CaptureReport:
    """What prevents the capture of a model's sampling loop in a CUDA graph, with file and line.

    The eager loop runs for a few steps on fake CUDA tensors: no GPU is needed, no memory is taken for the weights, and
    neither model nor tensors are changed. What a library decides on the device alone is not seen, and tensors that the
    model holds are taken to be on the device already.

    Args:
        model: any callable model(x, t, **cond), on any device, the meta device included; or a `pydiff.Sampler`, whose
            plan and dtypes are used.
        x: a tensor, or a shape, [B, *sample].
        cond, uncond: keyword arguments of the model; uncond is needed where the guidance scale is not 1.
        options: those of `pydiff.Sampler` (solver, schedule, guidance_scale, model_dtype, ...), 3 steps by default;
            none where a sampler is given.

    Returns: a `CaptureReport`, true where nothing was found.

    Raises `TypeError` or `ValueError` for a model that is not callable or cannot be copied, for x that is neither
    tensor nor shape, and for options that `Sampler` does not take. An error of the model itself is in the report.
    """
    check_condition("cond", cond)
    check_condition("uncond", uncond)
    sampler = _sampler(model, options)
    modules = sampler.model.modules() if isinstance(sampler.model, nn.Module) else ()
    if any(p is not None and is_lazy(p) for module in modules for p in module._parameters.values()):
        raise ValueError("the model has lazy parameters: call it once first")
    return check_plan(
        sampler.plan,
        sampler.model,
        _sample(x, sampler.dtype),
        cond=cond,
        uncond=uncond,
        dtype=sampler.dtype,
        model_dtype=sampler.model_dtype,
    )


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
        arguments = model_arguments(cond, uncond, guided, x.shape[0])
        state = init(plan, x, seed=0, copies=2 if guided else 1, **init_options)
        tensors = state.tensors
        try:
            call = caller(tensors, model, arguments, hoist_out(tensors, model, arguments))
            with watch:
                run(state, watch.model(lambda x, t: call(x)), {}, check_finite=False, hoist=False)
        except Exception as error:  # whatever the model raises on fake tensors is a finding
            watch.failed(error)
            stopped_by = f"{type(error).__name__}: {error}"
    return CaptureReport(watch.problems, watch.calls, watch.operators, stopped_by)


def _sampler(model: Any, options: dict[str, Any]) -> Sampler:
    from pydiff.sampler import Sampler  # which imports this package

    if isinstance(model, Sampler):
        if options:
            raise TypeError(f"a Sampler has its options already; leave out {', '.join(sorted(options))}")
        return model
    if all(options.get(name) is None for name in ("steps", "times", "sigmas")):
        options = {**options, "steps": STEPS}
    return Sampler(model, **options)


def _sample(x: Any, dtype: torch.dtype) -> torch.Tensor:
    shape = tuple(x.shape) if isinstance(x, torch.Tensor) else check_shape("x (a tensor, or its shape)", x)
    if not shape or not shape[0]:
        raise ValueError(f"x must have a row at least, got shape {list(shape)}")
    if isinstance(x, torch.Tensor):
        return x
    return torch.empty(shape, dtype=dtype, device="meta")
