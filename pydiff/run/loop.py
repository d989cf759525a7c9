"""The eager loop: model call, stage, model call, stage, until every row has reached the end of its plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from pydiff.ops.native import is_plain
from pydiff.ops.stage import StageTensors
from pydiff.plans import table
from pydiff.plans.plan import Plan
from pydiff.run.beginning import begin, check_x
from pydiff.run.conditions import join, model_keywords
from pydiff.run.model import Model, check_model, warn_if_training
from pydiff.run.noise_source import check_only_one, from_generator
from pydiff.run.options import Callback, RunOptions, StageInfo, takes
from pydiff.run.state import State, nonfinite_rows, step
from pydiff.run.warning import warn

if TYPE_CHECKING:
    from pydiff.optimize.hoisting import HoistedModel


class NonFiniteError(RuntimeError):
    """The model returned NaN or infinity.

    Args:
        plans, row_plan: the distinct plans of the batch, and which of them each row follows.
        rows: each row concerned, and the stage of its plan where that was first seen; kept as an attribute.
    """

    def __init__(self, plans: Sequence[Plan], row_plan: Sequence[int], rows: dict[int, int]):
        self.rows = rows
        row, stage = min(rows.items(), key=lambda item: item[1])
        time = plans[row_plan[row]].model_times[stage]
        super().__init__(
            f"the model returned NaN or infinity at stage {stage} (time {time:.6g}) in row {row}"
            + (f" and {len(rows) - 1} more rows" if len(rows) > 1 else "")
            + "; check its weights and dtype (fp16 overflows above 65504: try bf16), or pass check_finite=False"
        )


@takes(RunOptions)
def run_plan(plan: Plan | Sequence[Plan], model: Model, x: torch.Tensor, options: RunOptions) -> Any:
    """Run a plan on a model: all its stages (model calls), from x_T to the sample.

    Args (`pydiff.run.options.RunOptions` says them in full):
        plan: one plan, or one for each row.
        model: called as model(x, t, **cond) with x [copies * B, *sample] in `model_dtype` and t [copies * B]; returns a
            tensor like x, or an object that holds it as `.sample`. copies is 1, or 2 where a plan is guided: then the
            rows are [unconditional; conditional].
        x: x_T [B, *sample] at the plan's first noise level (plan.init_std * noise), left as it is.
        seed: of the noise that a stochastic plan adds: s (row k takes s + k), one for each row, or None: random.
        noise: that noise itself, [plan.num_draws, *x.shape], or a function of the draw number.
        generator: a torch.Generator to draw it, or one for each row. At most one of seed, noise and generator.
        cond, uncond: keyword arguments of the model; uncond for the unconditional rows.
        dtype, model_dtype: of the state (float32 or float64; float32 by default), and of the model's input.
        mask, known: where mask is 1 stands known, a clean image (inpainting); both broadcast to x.
        constant, extra: the tensors that a plan's operands of that name stand for; they broadcast to x.
        callback: called with a `StageInfo` after each stage; a true answer ends the run.
        callback_stages: n for every n-th stage and the last, or the numbers of the stages.
        progress: show a progress bar.
        return_trajectory: return x before the first stage and after every stage too.
        check_finite: look for NaN and infinity in what the model returns.
        hoist: compute before the loop what does not depend on x, where `optimize` has made that possible.

    Returns: the sample, [B, *sample] in `dtype` on the device of x; with return_trajectory (sample, trajectory
        [stages + 1, B, *sample]).

    Raises: TypeError or ValueError naming the argument, before the first model call; `NonFiniteError` if the model
        returns NaN or infinity; RuntimeError if it changes its input in place; what the model raises.

    Example:
        model = pydiff.load_model("mnist")
        plan = pydiff.make_plan("unipc", pydiff.VPCosine(), steps=8, prediction="v_prediction")
        x_T = plan.init_std * torch.randn(2, 1, 28, 28)
        x = pydiff.run_plan(plan, model, x_T, cond={"labels": torch.tensor([3, 7])})
    """
    warn_if_training(model)
    return run_with(plan, model, x, options)


def run_with(plan: Plan | Sequence[Plan], model: Model, x: torch.Tensor, options: RunOptions) -> Any:
    """`run_plan` with its arguments in one object."""
    check_only_one(options.seed, options.noise, options.generator)
    check_model(model)
    check_x(x)
    dtype = options.dtype or torch.float32
    noise = options.noise if options.generator is None else from_generator(options.generator, x.to(dtype))
    state = begin(plan, x, options, noise, None)
    guided = state.tensors.copies == 2
    arguments = model_arguments(options, guided, x.shape[0], x.device, options.model_dtype or dtype)
    trajectory = [state.x.clone()] if options.return_trajectory else None
    with torch.no_grad():
        run(state, model, arguments, options, trajectory)
    result = state.x.clone()  # not a view, which would keep the history in memory
    return (result, torch.stack(trajectory)) if trajectory is not None else result


def model_arguments(
    options: RunOptions, guided: bool, rows: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The model's keyword arguments for a whole run, [uncond; cond] where the plan is guided.

    device, dtype: of the model's input, which numpy arrays of floating-point numbers get.

    Raises: TypeError for a guided plan without uncond, and for conditions that are no mappings; ValueError where the
        two do not fit each other.
    """
    conditional = model_keywords("cond", options.cond, device, dtype)
    if not guided:
        return conditional
    if options.uncond is None:
        raise TypeError("guidance_scale is not 1: give uncond=, the model's arguments of the unconditional call")
    return join(model_keywords("uncond", options.uncond, device, dtype), conditional, rows)


def callback_stops(callback: Callback | None, stages: int | Collection[int], total: int) -> frozenset[int]:
    """The stages after which the callback is called, of a run of `total`.

    Raises: TypeError for a callback that cannot be called, ValueError for stages that are neither a number of at least
        1 nor numbers from 0.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable with a StageInfo, got {type(callback).__name__}")
    if isinstance(stages, (int, np.integer)) and not isinstance(stages, bool) and stages >= 1:
        chosen = {*range(int(stages) - 1, total, int(stages)), total - 1}
    elif isinstance(stages, (Collection, np.ndarray)) and all(
        isinstance(k, (int, np.integer)) and k >= 0 for k in stages
    ):
        chosen = {int(k) for k in stages if k < total}
    else:
        raise ValueError(
            f"callback_stages must be a number of stages of at least 1, or stage numbers from 0, got {stages!r}"
        )
    return frozenset(chosen) if callback is not None else frozenset()


def run(
    state: State,
    model: Model,
    arguments: Mapping[str, Any],
    options: RunOptions,
    trajectory: list[torch.Tensor] | None = None,
) -> None:
    """Advance `state` to the end of its plans (or until the callback says stop).

    Args:
        arguments: the model's keywords.
        options: those that concern the loop: callback, callback_stages, progress, check_finite, hoist.
        trajectory: a list that gets x after every stage.

    Raises: `NonFiniteError`; RuntimeError for a model that changes its input in place.
    """
    callback, check_finite = options.callback, options.check_finite
    stops = callback_stops(callback, options.callback_stages, state.total)
    plan = max(state.plans, key=len)
    t = state.tensors
    call = caller(t, model, arguments, hoist_out(t, model, arguments) if options.hoist else None)
    watched = _host_flags(state) if check_finite else None
    with tqdm(total=state.total, initial=state.stages_done, disable=not options.progress, unit="call") as bar:
        while not state.finished:
            i = state.stages_done
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
        warn(f"nothing is hoisted out of the loop: {reason}")
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
