"""The eager loop: model call, stage, model call, stage, until every row has reached the end of its plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from pydiff.ops.native import is_plain
from pydiff.ops.stage import StageTensors
from pydiff.plans import table
from pydiff.plans.plan import Plan
from pydiff.run.conditions import check_condition, join
from pydiff.run.noise_source import Noise, check_only_one, from_generator
from pydiff.run.state import Seed, State, check_x, distinct_plans, init, nonfinite_rows, step

if TYPE_CHECKING:
    from pydiff.optimize.hoisting import HoistedModel

Model = Callable[..., torch.Tensor]


class StageInfo(NamedTuple):
    """What a callback is told after a stage."""

    stage: int
    """The stage just done, from 0."""
    total: int
    time: float
    """The time the model was called with (in a batch of several plans: in the longest of them)."""
    x: torch.Tensor
    """The sample after the stage: a view that the next stage overwrites, clone it to keep it."""
    model_output: torch.Tensor


Callback = Callable[[StageInfo], Any]


class NonFiniteError(RuntimeError):
    """The model returned NaN or infinity. `rows` maps each row concerned to the stage where it was first seen."""

    def __init__(self, plans: Sequence[Plan], row_plan: Sequence[int], rows: dict[int, int]):
        self.rows = rows
        row, stage = min(rows.items(), key=lambda item: item[1])
        time = plans[row_plan[row]].model_times[stage]
        super().__init__(
            f"the model returned NaN or infinity at stage {stage} (time {time:.6g}) in row {row}"
            + (f" and {len(rows) - 1} more rows" if len(rows) > 1 else "")
            + "; check its weights and dtype (fp16 overflows above 65504: try bf16), or pass check_finite=False"
        )


def run_plan(
    plan: Plan | Sequence[Plan],
    model: Model,
    x: torch.Tensor,
    *,
    seed: Seed | None = None,
    noise: Noise | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    model_dtype: torch.dtype | None = None,
    mask: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    constant: torch.Tensor | None = None,
    extra: torch.Tensor | None = None,
    callback: Callback | None = None,
    callback_steps: int | Collection[int] = 1,
    progress: bool = False,
    return_trajectory: bool = False,
    check_finite: bool = True,
    hoist: bool = True,
) -> Any:
    """Run a plan on a model.

    Args:
        plan: one plan, or one for each row.
        model: called as model(x, t, **cond) with x [B, *sample] (twice the rows with guidance: unconditional first)
            and t [B]; returns a tensor like x, or an object that holds it as `.sample`.
        x: x_T [B, *sample] at the plan's first noise level, left as it is.
        seed, noise, generator: of the noise a stochastic plan adds; at most one of them. seed: an integer s (row k
            takes s + k) or one for each row. noise: [draws, *x.shape] or a function of the draw number.
        cond, uncond: keyword arguments of the model; uncond is needed where the plan's guidance scale is not 1.
        dtype: float32 or float64, of the state and the arithmetic. model_dtype: of the model's input.
        mask, known, constant, extra: see `pydiff.init`.
        callback: called with a `StageInfo` after each stage; a true return value ends the run there.
        callback_steps: n to call it after every n-th stage and the last, or the numbers of the stages, from 0.
        progress: show a progress bar.
        return_trajectory: return (x, trajectory), trajectory [stages + 1, B, *sample].
        check_finite: raise `NonFiniteError` if the model returns NaN or infinity: at once on the CPU, at the end
            elsewhere, so that nothing waits for the device inside the loop.
        hoist: compute before the loop what depends on the times and the condition alone, where `pydiff.optimize` has
            made that possible for the model. The same samples, up to the rounding of matrix products.

    Returns: the sample, [B, *sample] in `dtype`.
    """
    check_only_one(seed=seed, noise=noise, generator=generator)
    check_x(x)
    plans, _ = distinct_plans(plan, x.shape[0])
    if generator is not None:
        noise = from_generator(generator, x.to(dtype))
    guided = any(p.guided for p in plans)
    state = init(
        plan,
        x,
        seed=seed,
        noise=noise,
        copies=2 if guided else 1,
        dtype=dtype,
        model_dtype=model_dtype,
        mask=mask,
        known=known,
        constant=constant,
        extra=extra,
    )
    arguments = model_arguments(cond, uncond, guided, x.shape[0])
    stops = callback_stages(callback, callback_steps, state.total)
    trajectory = [state.x.clone()] if return_trajectory else None
    with torch.no_grad():
        run(
            state,
            model,
            arguments,
            callback=callback,
            stops=stops,
            progress=progress,
            trajectory=trajectory,
            check_finite=check_finite,
            hoist=hoist,
        )
    result = state.x.clone()  # not a view, which would keep the history in memory
    return (result, torch.stack(trajectory)) if trajectory is not None else result


def model_arguments(
    cond: Mapping[str, Any] | None, uncond: Mapping[str, Any] | None, guided: bool, rows: int
) -> dict[str, Any]:
    """The model's keyword arguments for a whole run, [uncond; cond] where the plan is guided."""
    conditional = check_condition("cond", cond)
    if not guided:
        return conditional
    if uncond is None:
        raise TypeError("guidance_scale is not 1: give uncond=, the model's arguments of the unconditional call")
    return join(check_condition("uncond", uncond), conditional, rows)


def callback_stages(callback: Callback | None, callback_steps: int | Collection[int], total: int) -> frozenset[int]:
    """The stages after which the callback is called."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable with a StageInfo, got {type(callback).__name__}")
    if isinstance(callback_steps, int) and not isinstance(callback_steps, bool) and callback_steps >= 1:
        chosen = {*range(callback_steps - 1, total, callback_steps), total - 1}
    elif isinstance(callback_steps, Collection) and all(isinstance(k, int) and k >= 0 for k in callback_steps):
        chosen = {k for k in callback_steps if k < total}
    else:
        raise ValueError(
            f"callback_steps must be a number of stages of at least 1, or stage numbers from 0, got {callback_steps!r}"
        )
    return frozenset(chosen) if callback is not None else frozenset()


def run(
    state: State,
    model: Model,
    arguments: Mapping[str, Any],
    *,
    callback: Callback | None = None,
    stops: Collection[int] = (),
    progress: bool = False,
    trajectory: list[torch.Tensor] | None = None,
    check_finite: bool = True,
    hoist: bool = True,
) -> None:
    """Advance `state` to the end of its plans (or until the callback says stop)."""
    plan = max(state.plans, key=len)
    t = state.tensors
    call = caller(t, model, arguments, hoist_out(t, model, arguments) if hoist else None)
    watched = _host_flags(state) if check_finite else None
    with tqdm(total=state.total, initial=state.steps_done, disable=not progress, unit="call") as bar:
        while not state.finished:
            i = state.steps_done
            x_in, version = state.model_input, _version(state)
            m = call(x_in)
            if _version(state) != version:
                raise RuntimeError(
                    "the model changed its input in place; return a new tensor, or call it through "
                    "lambda x, t: net(x.clone(), t)"
                )
            step(state, m)
            bar.update()
            if watched is not None and (watched >= 0).any():
                raise_if_nonfinite(state.tensors.nonfinite, state.plans, state.row_plan)
            if trajectory is not None:
                trajectory.append(state.x.clone())
            if i in stops and callback and callback(StageInfo(i, state.total, float(plan.model_times[i]), state.x, m)):
                break
    if check_finite and watched is None:
        raise_if_nonfinite(state.tensors.nonfinite, state.plans, state.row_plan)


def caller(
    t: StageTensors, model: Model, arguments: Mapping[str, Any], hoisted: HoistedModel | None
) -> Callable[[Any], torch.Tensor]:
    """The model as a function of its input alone: told where the rows stand, with what it needs besides."""
    if hoisted is not None:
        return lambda x: hoisted(x, t.cursor)
    return lambda x: _output(model(x, t.model_time, **arguments))


def hoist_out(t: StageTensors, model: Model, arguments: Mapping[str, Any]) -> HoistedModel | None:
    """What does not depend on x, computed for every row of the tables; None for a model that allows no such thing."""
    if not hasattr(model, "hoist_times"):
        return None
    from pydiff.optimize.hoisting import CannotHoist, HoistedModel

    try:
        return HoistedModel(model, t.coefficients[:, table.TIME], arguments, t.copies * t.rows)
    except CannotHoist as reason:
        warnings.warn(f"pydiff: nothing is hoisted out of the loop: {reason}", stacklevel=3)
        return None


def _output(returned: Any) -> torch.Tensor:
    """The tensor in what a model returned: itself, or the `.sample` of diffusers' outputs."""
    return returned if isinstance(returned, torch.Tensor) else getattr(returned, "sample", returned)


def _version(state: State) -> int:
    """Counts in-place changes of x while x itself is the model's input; torch keeps no count in inference mode."""
    return state.x._version if state.tensors.model_input is None else 0


def _host_flags(state: State) -> np.ndarray | None:
    """The flags of rows that are not finite, as the host sees them without a copy; None where it would have to wait."""
    flags = state.tensors.nonfinite
    return flags.numpy() if flags is not None and flags.device.type == "cpu" and is_plain(flags) else None


def raise_if_nonfinite(flags: torch.Tensor | None, plans: Sequence[Plan], row_plan: Sequence[int]) -> None:
    """Raise `NonFiniteError` if a row is flagged; on a GPU the host waits for the answer."""
    rows = {} if flags is None else nonfinite_rows(flags, plans, row_plan)
    if rows:
        raise NonFiniteError(plans, row_plan, rows)
