"""The eager loop: `sample`, `Sampler` and `run_plan`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from pydiff.compiler import GuidanceScale, make_plan
from pydiff.conditions import check_condition, join
from pydiff.noise_schedule import NoiseSchedule, VPLinear
from pydiff.noise_source import Noise, from_generator
from pydiff.ops import table
from pydiff.plan import Plan, stage_values
from pydiff.prediction import Prediction
from pydiff.state import Seed, State, distinct_plans, init, initial_noise, row_seeds, step

DEFAULT_STEPS = 20

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

    def __init__(self, state: State, rows: dict[int, int]):
        self.rows = rows
        row, stage = min(rows.items(), key=lambda item: item[1])
        time = state.plans[state.row_plan[row]].model_times[stage]
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
        progress: show a progress bar.
        return_trajectory: return (x, trajectory), trajectory [stages + 1, B, *sample].
        check_finite: raise `NonFiniteError` if the model returns NaN or infinity: at once on the CPU, at the end
            elsewhere, so that nothing waits for the device inside the loop.
        hoist: compute before the loop what depends on the times and the condition alone, where `pydiff.optimize` has
            made that possible for the model. The same samples, up to the rounding of matrix products.

    Returns: the sample, [B, *sample] in `dtype`.
    """
    if sum(v is not None for v in (seed, noise, generator)) > 1:
        raise TypeError("give at most one of seed, noise and generator")
    plans, _ = distinct_plans(plan, x)
    if generator is not None:
        noise = from_generator(generator, x.to(dtype))
    guided = any(p.guided for p in plans)
    state = init(plan, x, seed=seed, noise=noise, copies=2 if guided else 1, dtype=dtype, model_dtype=model_dtype,
                 mask=mask, known=known, constant=constant, extra=extra)
    arguments = model_arguments(cond, uncond, guided, x.shape[0])
    trajectory = [state.x.clone()] if return_trajectory else None
    with torch.no_grad():
        run(state, model, arguments, callback=callback, progress=progress, trajectory=trajectory,
            check_finite=check_finite, hoist=hoist)
    result = state.x.clone()  # not a view, which would keep the history in memory
    return (result, torch.stack(trajectory)) if trajectory is not None else result


def model_arguments(cond: Mapping[str, Any] | None, uncond: Mapping[str, Any] | None, guided: bool,
                    rows: int) -> dict[str, Any]:
    """The model's keyword arguments for a whole run, [uncond; cond] where the plan is guided."""
    conditional = check_condition("cond", cond)
    if not guided:
        return conditional
    if uncond is None:
        raise TypeError("guidance_scale is not 1: give uncond=, the model's arguments of the unconditional call")
    return join(check_condition("uncond", uncond), conditional, rows)


def run(state: State, model: Model, arguments: Mapping[str, Any], *, callback: Callback | None = None,
        progress: bool = False, trajectory: list[torch.Tensor] | None = None, check_finite: bool = True,
        hoist: bool = True) -> None:
    """Advance `state` to the end of its plans (or until the callback says stop)."""
    plan = max(state.plans, key=len)
    call = _caller(state, model, arguments, hoist)
    on_host = state.x.device.type == "cpu"
    with tqdm(total=state.total, initial=state.steps_done, disable=not progress, unit="call") as bar:
        while not state.finished:
            i = state.steps_done
            x_in, version = state.model_input, _version(state)
            m = call(x_in)
            if _version(state) != version:
                raise RuntimeError("the model changed its input in place; return a new tensor, or call it through "
                                   "lambda x, t: net(x.clone(), t)")
            step(state, m)
            bar.update()
            if check_finite and on_host:
                _raise_if_nonfinite(state)
            if trajectory is not None:
                trajectory.append(state.x.clone())
            if callback and callback(StageInfo(i, state.total, float(plan.model_times[i]), state.x, m)):
                break
    if check_finite and not on_host:
        _raise_if_nonfinite(state)


def _caller(state: State, model: Model, arguments: Mapping[str, Any], hoist: bool) -> Callable[[Any], torch.Tensor]:
    """The model as a function of its input alone: told where the rows stand, with what it needs besides."""
    if hoist and hasattr(model, "hoist_times"):
        from pydiff.optimize.hoisting import CannotHoist, HoistedModel

        t = state.tensors
        try:
            hoisted = HoistedModel(model, t.coefficients[:, table.TIME], arguments, t.copies * t.rows)
        except CannotHoist as reason:
            warnings.warn(f"pydiff: nothing is hoisted out of the loop: {reason}", stacklevel=2)
        else:
            return lambda x: hoisted(x, t.cursor)
    return lambda x: _output(model(x, state.model_time, **arguments))


def _output(returned: Any) -> torch.Tensor:
    """The tensor in what a model returned: itself, or the `.sample` of diffusers' outputs."""
    return returned if isinstance(returned, torch.Tensor) else getattr(returned, "sample", returned)


def _version(state: State) -> int:
    """Counts in-place changes of x while x itself is the model's input; torch keeps no count in inference mode."""
    return state.x._version if state.tensors.model_input is None else 0


def _raise_if_nonfinite(state: State) -> None:
    flags = state.tensors.nonfinite
    if flags is not None and flags.numel() and int(flags.max()) >= 0:
        raise NonFiniteError(state, state.nonfinite())


class Sampler:
    """A model with a compiled plan, called as often as wanted.

    Args:
        model: any callable model(x, t, **cond). A module's `schedule_config` and `prediction` attributes are the
            defaults of those two arguments.
        solver, steps, schedule, prediction, grid, guidance_scale and all further keywords: see `make_plan`. 20 steps
            by default.
        dtype: float32 (float64 on request), of the state. model_dtype: of the model's input; by default that of a
            module's first parameter, and `dtype` where there is none.

    Example:
        sampler = Sampler(model, solver="dpmpp_2m", steps=20, grid="karras", guidance_scale=5.0)
        x = sampler((4, 3, 32, 32), cond={"labels": y}, uncond={"labels": null}, seed=[1, 2, 3, 4])
    """

    def __init__(self, model: Model, solver: str = "dpmpp_2m", steps: int | None = None, *,
                 schedule: NoiseSchedule | None = None, prediction: str | Prediction | None = None,
                 dtype: torch.dtype = torch.float32, model_dtype: torch.dtype | None = None, **plan_options: Any):
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t, **cond), got {type(model).__name__}")
        self.model, self.dtype = model, dtype
        self.schedule = schedule or _model_schedule(model)
        if steps is None and plan_options.get("times") is None and plan_options.get("sigmas") is None:
            steps = DEFAULT_STEPS
        self.plan = make_plan(solver, self.schedule, steps,
                              prediction=prediction or getattr(model, "prediction", None) or "epsilon", **plan_options)
        self._model_dtype = model_dtype

    @property
    def _parameter(self) -> torch.Tensor | None:
        """The model's first parameter, which says where the model is now and in what dtype."""
        return next(self.model.parameters(), None) if isinstance(self.model, torch.nn.Module) else None

    @property
    def device(self) -> torch.device:
        parameter = self._parameter
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def model_dtype(self) -> torch.dtype:
        parameter = self._parameter
        floating = parameter is not None and parameter.dtype.is_floating_point
        return self._model_dtype or (parameter.dtype if floating and parameter is not None else self.dtype)

    def __call__(self, shape_or_x: Sequence[int] | torch.Tensor, *, x0: torch.Tensor | None = None,
                 seed: Seed | None = None, guidance_scale: GuidanceScale | None = None,
                 device: torch.device | str | None = None, **run_options: Any) -> Any:
        """Draw samples.

        Args:
            shape_or_x: shape [B, *sample] to start from noise, or x_T itself at the plan's first time.
            x0: start from this clean sample, noised to the plan's first time (compile with t_start=).
            seed: an integer s (row k takes s + k), one for each row, or None for random ones.
            guidance_scale: in place of the compiled one.
            device: where to sample, for a shape; the model's device by default.
            run_options: see `run_plan`.
        """
        plan = self.plan if guidance_scale is None else self.plan.with_guidance(self._scales(guidance_scale))
        generator, noise = run_options.get("generator"), run_options.get("noise")
        if generator is not None and seed is not None:
            raise TypeError("give seed or generator, not both: either decides all noise of the run")
        if isinstance(shape_or_x, torch.Tensor):
            if x0 is not None or device is not None:
                raise TypeError("x0 and device go with a shape: a tensor is x_T itself, on its own device")
            return run_plan(plan, self.model, shape_or_x, seed=seed, dtype=self.dtype, model_dtype=self.model_dtype,
                            **run_options)
        shape = _check_shape(shape_or_x)
        where = torch.device(device) if device is not None else self.device
        seeds = row_seeds(seed, shape[0], where)
        z = self._first_noise(shape, seeds, where, generator)
        x = plan.init_std * z if x0 is None else self._noised(x0, z)
        return run_plan(plan, self.model, x, dtype=self.dtype, model_dtype=self.model_dtype,
                        seed=seeds if generator is None and noise is None else None, **run_options)

    def _noised(self, x0: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """x0 at the level of the first time: below that of the first call, where the plan begins by churning."""
        start = float(self.plan.times[0])
        return self.schedule.alpha(start) * _check_x0(x0, z) + self.schedule.sigma(start) * z

    def _scales(self, guidance_scale: GuidanceScale) -> Any:
        if callable(guidance_scale):
            return [float(guidance_scale(t)) for t in self.plan.model_times]
        return stage_values("guidance_scale", guidance_scale, len(self.plan))

    def _first_noise(self, shape: tuple[int, ...], seeds: torch.Tensor, device: torch.device,
                     generator: Any) -> torch.Tensor:
        if generator is None:
            return initial_noise(shape, seeds, self.dtype)
        return from_generator(generator, torch.empty(shape, dtype=self.dtype, device=device))(0)


def sample(model: Model, shape: Sequence[int], *, solver: str = "dpmpp_2m", steps: int | None = None,
           seed: Seed | None = None, **options: Any) -> Any:
    """Draw samples of `shape` [B, *sample] from a model: a `Sampler` made and called once.

    options: those of `Sampler` and `make_plan` (schedule, prediction, grid, guidance_scale, ...) and those of
    `run_plan` (cond, uncond, callback, progress, ...).
    """
    calling = {k: options.pop(k) for k in list(options) if k in _CALL_OPTIONS}
    return Sampler(model, solver, steps, **options)(shape, seed=seed, **calling)


_CALL_OPTIONS = {"x0", "device", "noise", "generator", "cond", "uncond", "mask", "known", "constant", "extra",
                 "callback", "progress", "return_trajectory", "check_finite", "hoist"}


def _model_schedule(model: Model) -> NoiseSchedule:
    config = getattr(model, "schedule_config", None)
    return NoiseSchedule.from_dict(config) if isinstance(config, dict) else VPLinear()


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    values = tuple(shape) if isinstance(shape, Sequence) else ()
    if not values or not all(isinstance(n, int) and n >= 0 for n in values):
        raise ValueError(f"shape must be [batch, *sample], integers of at least 0, got {shape!r}")
    return values


def _check_x0(x0: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    if not isinstance(x0, torch.Tensor) or x0.shape[1:] != z.shape[1:] or x0.shape[:1] not in ((1,), z.shape[:1]):
        got = list(x0.shape) if isinstance(x0, torch.Tensor) else type(x0).__name__
        raise ValueError(f"x0 must be a tensor of shape {list(z.shape)} (or one row), got {got}")
    return x0.to(device=z.device, dtype=z.dtype)
