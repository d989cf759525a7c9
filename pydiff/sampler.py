"""The public face of sampling.

`Sampler` is a model with a compiled plan; `sample` makes one and calls it; `check_capturable` says what keeps its loop
out of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pydiff.check.capturable import STEPS, CaptureReport, check_plan
from pydiff.graph.captured import CapturedLoop, GraphStats
from pydiff.graph.request import make_request
from pydiff.plans.plan import Plan
from pydiff.plans.validation import stage_values
from pydiff.run.conditions import check_condition
from pydiff.run.loop import Model, run_plan
from pydiff.run.noise_source import from_generator
from pydiff.run.state import Seed, check_shape, distinct_plans, initial_noise, row_seeds, seed_values
from pydiff.schedules.base import NoiseSchedule
from pydiff.schedules.closed_form import VPLinear
from pydiff.schedules.prediction import Prediction
from pydiff.solvers.compiler import GuidanceScale, make_plan

DEFAULT_STEPS = 20
GUIDED_PLANS = 16  # plans with another guidance scale that a sampler remembers


class Sampler:
    """A model with a compiled plan, called as often as wanted.

    Args:
        model: any callable model(x, t, **cond). A module's `schedule_config` and `prediction` attributes are the
            defaults of those two arguments.
        solver, steps, schedule, prediction, grid, guidance_scale and all further keywords: see `make_plan`. 20 steps
            by default.
        dtype: float32 (float64 on request), of the state. model_dtype: of the model's input; by default that of a
            module's first parameter, and `dtype` where there is none.
        graph: run the loop as CUDA graphs, captured once for each shape, dtype and structure of the condition:
            "loop" (or True): all stages of the plan in one graph, one launch from noise to sample;
            "stage": one stage in a graph, launched once a stage, the device counting;
            "device": one launch of a loop on the device around the stage; "stage" where CUDA cannot do that;
            "auto": what is fastest, measured once, and no graph where that gains less than 2 %;
            False: no graph. Without a CUDA device the loop runs eagerly, with the same samples.
        max_graphs: how many captured loops are held; the least recently used is released for another.

    Example:
        sampler = Sampler(model, solver="dpmpp_2m", steps=20, grid="karras", guidance_scale=5.0)
        x = sampler((4, 3, 32, 32), cond={"labels": y}, uncond={"labels": null}, seed=[1, 2, 3, 4])
    """

    def __init__(
        self,
        model: Model,
        solver: str = "dpmpp_2m",
        steps: int | None = None,
        *,
        schedule: NoiseSchedule | None = None,
        prediction: str | Prediction | None = None,
        dtype: torch.dtype = torch.float32,
        model_dtype: torch.dtype | None = None,
        graph: bool | str = False,
        max_graphs: int = 4,
        **plan_options: Any,
    ):
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t, **cond), got {type(model).__name__}")
        self.model, self.dtype = model, dtype
        self.schedule = schedule or _model_schedule(model)
        self.prediction = prediction or getattr(model, "prediction", None) or "epsilon"
        self.plan = self.make_plan(solver, steps, **plan_options)
        self._model_dtype = model_dtype
        self._guided: dict[tuple[int, float], tuple[Plan, Plan]] = {}
        self.graphs = CapturedLoop("loop" if graph is True else graph, max_graphs) if graph is not False else None

    @property
    def _parameter(self) -> torch.Tensor | None:
        """The model's first parameter, which says where the model is now and in what dtype."""
        modules = self.model.modules() if isinstance(self.model, torch.nn.Module) else ()
        return next((p for module in modules for p in module._parameters.values() if p is not None), None)

    @property
    def device(self) -> torch.device:
        return self._device_of(self._parameter)

    @property
    def model_dtype(self) -> torch.dtype:
        return self._model_dtype or self._dtype_of(self._parameter)

    @staticmethod
    def _device_of(parameter: torch.Tensor | None) -> torch.device:
        return torch.device("cpu") if parameter is None else parameter.device

    def _dtype_of(self, parameter: torch.Tensor | None) -> torch.dtype:
        return self.dtype if parameter is None or not parameter.dtype.is_floating_point else parameter.dtype

    def __call__(
        self,
        shape_or_x: Sequence[int] | torch.Tensor,
        *,
        x0: torch.Tensor | None = None,
        seed: Seed | None = None,
        guidance_scale: GuidanceScale | None = None,
        plan: Plan | Sequence[Plan] | None = None,
        device: torch.device | str | None = None,
        **run_options: Any,
    ) -> Any:
        """Draw samples.

        Args:
            shape_or_x: shape [B, *sample] to start from noise, or x_T itself at the plan's first time.
            x0: start from this clean sample, noised to the plan's first time (compile with t_start=).
            seed: an integer s (row k takes s + k), one for each row, or None for random ones.
            guidance_scale: in place of the compiled one.
            plan: in place of the compiled one (see `make_plan`), or one for each row.
            device: where to sample, for a shape; the model's device by default.
            run_options: see `run_plan`.
        """
        generator, noise = run_options.get("generator"), run_options.get("noise")
        if generator is not None and seed is not None:
            raise TypeError("give seed or generator, not both: either decides all noise of the run")
        plans = self._plans(plan, guidance_scale)
        parameter = self._parameter
        model_dtype = self._model_dtype or self._dtype_of(parameter)
        options = {"dtype": self.dtype, "model_dtype": model_dtype, **run_options}
        x: torch.Tensor | None = None
        if isinstance(shape_or_x, torch.Tensor):
            if x0 is not None or device is not None:
                raise TypeError("x0 and device go with a shape: a tensor is x_T itself, on its own device")
            x, shape, where = shape_or_x, tuple(shape_or_x.shape), shape_or_x.device
        else:
            shape = check_shape("shape", shape_or_x)
            where = torch.device(device) if device is not None else self._device_of(parameter)
            seeds = seed_values(seed, shape[0])
            seed = seeds if generator is None and noise is None else None
            if self.graphs is None or seed is None or x0 is not None:
                x = self._first(plans, shape, seeds, where, generator, x0)
        if self.graphs is not None:
            fresh = {"seeds": seeds} if x is None else {"seed": seed}
            request = make_request(plans, self.model, x, shape=shape, device=where, **fresh, **options)
            result = self.graphs(request)
            if result is not NotImplemented:
                return result
            seed = request.seeds if request.source is None else None
        if x is None:
            x = self._first(plans, shape, seeds, where, None, None)
        return run_plan(plans, self.model, x, seed=seed, **options)

    def make_plan(self, solver: str, steps: int | None = None, **plan_options: Any) -> Plan:
        """Another plan for this model (see `pydiff.make_plan`): its schedule and prediction, 20 steps by default."""
        if steps is None and plan_options.get("times") is None and plan_options.get("sigmas") is None:
            steps = DEFAULT_STEPS
        return make_plan(solver, self.schedule, steps, prediction=self.prediction, **plan_options)

    def stats(self) -> GraphStats:
        """What the sampler's graphs have done and hold; all zero with graph=False."""
        return GraphStats() if self.graphs is None else self.graphs.stats()

    def release(self) -> None:
        """Give back all captured loops and their memory. The next call captures anew."""
        if self.graphs is not None:
            self.graphs.release()

    def _plans(self, plan: Plan | Sequence[Plan] | None, guidance_scale: GuidanceScale | None) -> Plan | Sequence[Plan]:
        plan = self.plan if plan is None else plan
        if guidance_scale is None:
            return plan
        if not isinstance(plan, Plan):
            raise TypeError("guidance_scale goes with one plan: compile each row's own with its guidance_scale")
        if not isinstance(guidance_scale, (int, float)):
            return plan.with_guidance(_scales(plan, guidance_scale))
        # A plan is checked whenever it is made, which takes longer than a captured loop is launched in.
        key = (id(plan), float(guidance_scale))
        before, guided = self._guided.get(key, (None, plan))
        if before is not plan:  # or it has the number of one that is gone
            guided = plan.with_guidance(_scales(plan, guidance_scale))
            if len(self._guided) >= GUIDED_PLANS:
                self._guided.pop(next(iter(self._guided)), None)
            self._guided[key] = (plan, guided)
        return guided

    def _first(
        self,
        plans: Plan | Sequence[Plan],
        shape: tuple[int, ...],
        seeds: list[int],
        device: torch.device,
        generator: Any,
        x0: torch.Tensor | None,
    ) -> torch.Tensor:
        """x_T [B, *sample]: noise, or x0 at the level of the first time."""
        if generator is None:
            z = initial_noise(shape, row_seeds(seeds, shape[0], device), self.dtype)
        else:
            z = from_generator(generator, torch.empty(shape, dtype=self.dtype, device=device))(0)
        if x0 is None:
            return _init_std(plans, z) * z
        # Below the level of the first call, where the plan begins by churning.
        if not isinstance(plans, Plan):
            raise TypeError("x0 goes with one plan: the rows of several begin at levels of their own")
        start = float(plans.times[0])
        return self.schedule.alpha(start) * _check_x0(x0, z) + self.schedule.sigma(start) * z


def _init_std(plans: Plan | Sequence[Plan], z: torch.Tensor) -> Any:
    if isinstance(plans, Plan):
        return plans.init_std
    distinct_plans(plans, z.shape[0])  # complains of what is no plan
    values = torch.tensor([p.init_std for p in plans], dtype=z.dtype).to(z.device)
    return values.reshape(-1, *([1] * (z.ndim - 1)))


def _scales(plan: Plan, guidance_scale: GuidanceScale) -> Any:
    if callable(guidance_scale):
        return [float(guidance_scale(t)) for t in plan.model_times]
    return stage_values("guidance_scale", guidance_scale, len(plan))


def sample(
    model: Model,
    shape: Sequence[int],
    *,
    solver: str = "dpmpp_2m",
    steps: int | None = None,
    seed: Seed | None = None,
    **options: Any,
) -> Any:
    """Draw samples of `shape` [B, *sample] from a model: a `Sampler` made and called once.

    options: those of `Sampler` and `make_plan` (schedule, prediction, grid, guidance_scale, ...) and those of
    `run_plan` (cond, uncond, callback, progress, ...).
    """
    calling = {k: options.pop(k) for k in list(options) if k in _CALL_OPTIONS}
    return Sampler(model, solver, steps, **options)(shape, seed=seed, **calling)


_CALL_OPTIONS = {
    "x0",
    "device",
    "plan",
    "noise",
    "generator",
    "cond",
    "uncond",
    "mask",
    "known",
    "constant",
    "extra",
    "callback",
    "callback_steps",
    "progress",
    "return_trajectory",
    "check_finite",
    "hoist",
}


def _model_schedule(model: Model) -> NoiseSchedule:
    config = getattr(model, "schedule_config", None)
    return NoiseSchedule.from_dict(config) if isinstance(config, dict) else VPLinear()


def _check_x0(x0: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    if not isinstance(x0, torch.Tensor) or x0.shape[1:] != z.shape[1:] or x0.shape[:1] not in ((1,), z.shape[:1]):
        got = list(x0.shape) if isinstance(x0, torch.Tensor) else type(x0).__name__
        raise ValueError(f"x0 must be a tensor of shape {list(z.shape)} (or one row), got {got}")
    return x0.to(device=z.device, dtype=z.dtype)


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
    sampler = _watched(model, options)
    modules = sampler.model.modules() if isinstance(sampler.model, nn.Module) else ()
    if any(p is not None and is_lazy(p) for module in modules for p in module._parameters.values()):
        raise ValueError("the model has lazy parameters: call it once first")
    return check_plan(
        sampler.plan,
        sampler.model,
        _batch(x, sampler.dtype),
        cond=cond,
        uncond=uncond,
        dtype=sampler.dtype,
        model_dtype=sampler.model_dtype,
    )


def _watched(model: Any, options: dict[str, Any]) -> Sampler:
    if isinstance(model, Sampler):
        if options:
            raise TypeError(f"a Sampler has its options already; leave out {', '.join(sorted(options))}")
        return model
    if all(options.get(name) is None for name in ("steps", "times", "sigmas")):
        options = {**options, "steps": STEPS}
    return Sampler(model, **options)


def _batch(x: Any, dtype: torch.dtype) -> torch.Tensor:
    shape = tuple(x.shape) if isinstance(x, torch.Tensor) else check_shape("x (a tensor, or its shape)", x)
    if not shape or not shape[0]:
        raise ValueError(f"x must have a row at least, got shape {list(shape)}")
    if isinstance(x, torch.Tensor):
        return x
    return torch.empty(shape, dtype=dtype, device="meta")
