"""The public face of sampling.

`Sampler` is a model with a compiled plan; `sample` makes one and calls it; `check_capturable` says what keeps its loop
out of a CUDA graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pydiff.check.capturable import STEPS, CaptureReport, check_plan
from pydiff.graph.captured import CapturedLoop, GraphStats
from pydiff.graph.request import make_request
from pydiff.plans.plan import Plan
from pydiff.plans.validation import stage_values
from pydiff.run.beginning import check_shape, distinct_plans, initial_noise, row_seeds, seed_values
from pydiff.run.conditions import check_condition
from pydiff.run.loop import run_with
from pydiff.run.model import Model, check_model, check_schedule_is_known, first_parameter, warn_if_training
from pydiff.run.noise_source import check_only_one, from_generator
from pydiff.run.options import RENAMED, CallOptions, Seed, takes
from pydiff.schedules.base import NoiseSchedule
from pydiff.schedules.closed_form import VPLinear
from pydiff.schedules.prediction import Prediction
from pydiff.solvers.compiler import GuidanceScale, make_plan

DEFAULT_STEPS = 20
GUIDED_PLANS = 16  # plans with another guidance scale that a sampler remembers


class Beginning(NamedTuple):
    """What a call starts from."""

    x: torch.Tensor | None
    """x_T, or None where it is still to be drawn from the seeds."""
    shape: tuple[int, ...]
    """[B, *sample]."""
    device: torch.device
    """Where x is, or will be."""
    seeds: list[int] | None
    """One a row; None where a generator or the caller's noise decides."""


class Sampler:
    """A model with a compiled plan, called as often as wanted.

    Args:
        model: any callable model(x, t, **cond), x [copies * B, *sample] and t [copies * B]: copies is 1, or 2 where the
            guidance scale is not 1, and then the rows are [unconditional; conditional]. A module's `schedule_config`
            and `prediction` attributes are the defaults of those two arguments.
        solver: a registered name, see `list_solvers`.
        steps: intervals of the time grid; 20 by default.
        schedule: the noise schedule that the model was trained with; `VPLinear` by default.
        prediction: what the model returns, see `get_prediction`; "epsilon" by default.
        plan_options: grid, times, guidance_scale, clip, known and all further keywords of `make_plan`.
        dtype: of the state, float32 or float64.
        model_dtype: of the model's input; by default that of a module's first parameter, and `dtype` where there is
            none.
        graph: run the loop as CUDA graphs, captured once for each shape, dtype and structure of the condition:
            "loop" (or True): all stages of the plan in one graph, one launch from noise to sample;
            "stage": one stage in a graph, launched once a stage, the device counting;
            "device": one launch of a loop on the device around the stage; "stage" where CUDA cannot do that;
            "auto": what is fastest, measured once, and no graph where that gains less than 2 %;
            False: no graph. Without a CUDA device the loop runs eagerly, with the same samples.
        max_graphs: how many captured loops are held, at least 1; the least recently used is released for another.

    Attributes:
        model, schedule, prediction, dtype: as above.
        plan: the compiled one.
        graphs: the captured loops, or None with graph=False; see `stats` and `release`.

    Raises: TypeError for a model that cannot be called, a pipeline, or a diffusers model without its schedule;
        ValueError for another `graph` and `max_graphs`; what `make_plan` raises for the others.

    Example:
        model = pydiff.load_model("mnist")  # knows its schedule and prediction
        sampler = pydiff.Sampler(model, solver="dpmpp_2m", steps=6, guidance_scale=2.0)
        labels = {"labels": torch.tensor([3, 7])}
        x = sampler((2, 1, 28, 28), cond=labels, uncond={"labels": model.null_label}, seed=[11, 12])
        print(sampler.plan)
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
        check_model(model)
        self.model, self.dtype = model, dtype
        self.schedule = _model_schedule(model) if schedule is None else schedule
        self.prediction = prediction or getattr(model, "prediction", None) or "epsilon"
        self.plan = self.make_plan(solver, steps, **plan_options)
        self._model_dtype = model_dtype
        self._guided: dict[tuple[int, float], tuple[Plan, Plan]] = {}
        self.graphs = CapturedLoop("loop" if graph is True else graph, max_graphs) if graph is not False else None

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is now; the CPU for a model without any."""
        return _device_of(first_parameter(self.model))

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype of the model's input: the one given, else that of the model's first parameter, else `dtype`."""
        return self._model_dtype or self._dtype_of(first_parameter(self.model))

    def _dtype_of(self, parameter: torch.Tensor | None) -> torch.dtype:
        return self.dtype if parameter is None or not parameter.dtype.is_floating_point else parameter.dtype

    @takes(CallOptions)
    def __call__(self, shape_or_x: Sequence[int] | torch.Tensor, options: CallOptions) -> Any:
        """Draw samples.

        Args:
            shape_or_x: shape [B, *sample] to start from noise, or x_T itself at the plan's first time.
            x0: start from this clean sample, [B, *sample] or one row, noised to the plan's first time (compile with
                t_start=).
            seed: of all noise, x_T's included: an integer s (row k takes s + k), one for each row, or None: random.
            guidance_scale: in place of the compiled one: a number, one for each model call, or a function of the
                model's time.
            plan: in place of the compiled one (see `Sampler.make_plan`), or one for each row.
            device: where to sample, for a shape; the model's device by default.
            dtype, model_dtype: the sampler's by default.
            noise, generator, cond, uncond, mask, known, constant, extra: as in `run_plan`.
            callback, callback_stages, progress, return_trajectory, check_finite, hoist: as in `run_plan`.

        Returns: the samples, [B, *sample] in `dtype` on the device of sampling; with return_trajectory (sample,
            trajectory [stages + 1, B, *sample]).

        Raises: TypeError for arguments that exclude each other (seed and generator; a tensor with x0 or device; x0 or
            guidance_scale with several plans); what `run_plan` raises.

        Example:
            model = pydiff.load_model("mnist")
            sampler = pydiff.Sampler(model, "dpmpp_2m", 6, t_start=0.5)
            x0 = pydiff.sample(model, (1, 1, 28, 28), steps=6, seed=0)
            variations = sampler((4, 1, 28, 28), x0=x0, seed=1)  # from half way
        """
        warn_if_training(self.model)
        plans = self._plans(options.plan, options.guidance_scale)
        options.dtype = dtype = options.dtype or self.dtype  # the options were made for this call
        parameter = first_parameter(self.model)
        options.model_dtype = options.model_dtype or self._model_dtype or self._dtype_of(parameter)
        begin = self._begin(plans, shape_or_x, options, _device_of(parameter))
        options.seed = begin.seeds if options.noise is None else None

        def eagerly() -> Any:
            x = begin.x
            if x is None:
                x = self._noised(plans, _draw(begin.shape, begin.seeds, begin.device, dtype), None)
            return run_with(plans, self.model, x, options)

        if self.graphs is None:
            return eagerly()
        request = make_request(plans, self.model, begin.x, options, shape=begin.shape, device=begin.device)
        return self.graphs.run(request, eagerly)

    def _begin(
        self,
        plans: Plan | Sequence[Plan],
        shape_or_x: Sequence[int] | torch.Tensor,
        options: CallOptions,
        device: torch.device,
    ) -> Beginning:
        """device: where to sample, where the call does not say."""
        generator, dtype = options.generator, options.dtype or self.dtype
        if generator is not None and options.seed is not None:
            raise TypeError("give seed or generator, not both: either decides all noise of the run")
        if isinstance(shape_or_x, torch.Tensor):
            if options.x0 is not None or options.device is not None:
                raise TypeError("x0 and device go with a shape: a tensor is x_T itself, on its own device")
            check_only_one(options.seed, options.noise, generator)
            x, rows = shape_or_x, len(shape_or_x) if shape_or_x.ndim else 0
            seeded = generator is None and options.noise is None
            return Beginning(x, tuple(x.shape), x.device, seed_values(options.seed, rows) if seeded else None)
        shape = check_shape("shape", shape_or_x)
        device = device if options.device is None else torch.device(options.device)
        if generator is not None:
            z = from_generator(generator, torch.empty(shape, dtype=dtype, device=device))(0)
            return Beginning(self._noised(plans, z, options.x0), shape, device, None)
        seeds = seed_values(options.seed, shape[0])
        if self.graphs is not None and options.x0 is None and options.noise is None:
            return Beginning(None, shape, device, seeds)  # which the graph draws
        return Beginning(self._noised(plans, _draw(shape, seeds, device, dtype), options.x0), shape, device, seeds)

    def make_plan(self, solver: str, steps: int | None = None, **plan_options: Any) -> Plan:
        """Another plan for this model: its schedule and prediction, and what `pydiff.make_plan` takes besides.

        Args:
            solver: a registered name.
            steps: intervals of the time grid; 20 by default.
            plan_options: further keywords of `pydiff.make_plan`.

        Raises what `pydiff.make_plan` does.

        Example:
            sampler = pydiff.Sampler(pydiff.load_model("mnist"), steps=6)
            x = sampler((1, 1, 28, 28), plan=sampler.make_plan("unipc", 5), seed=0)
        """
        if steps is None and plan_options.get("times") is None and plan_options.get("sigmas") is None:
            steps = DEFAULT_STEPS
        return make_plan(solver, self.schedule, steps, prediction=self.prediction, **plan_options)

    def stats(self) -> GraphStats:
        """What the sampler's graphs have done and hold; all zero with graph=False."""
        return GraphStats() if self.graphs is None else self.graphs.stats()

    def release(self) -> None:
        """Give back all captured loops and their memory. The next call captures anew.

        Raises: RuntimeError from within a callback of this sampler.
        """
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

    def _noised(self, plans: Plan | Sequence[Plan], z: torch.Tensor, x0: torch.Tensor | None) -> torch.Tensor:
        """x_T [B, *sample]: the noise z at the level of the prior, or x0 with as much of it as the first time has."""
        if x0 is None:
            return _init_std(plans, z) * z
        # Below the level of the first call, where the plan begins by churning.
        if not isinstance(plans, Plan):
            raise TypeError("x0 goes with one plan: the rows of several begin at levels of their own")
        start = float(plans.times[0])
        return self.schedule.alpha(start) * _check_x0(x0, z) + self.schedule.sigma(start) * z


def _device_of(parameter: torch.Tensor | None) -> torch.device:
    return torch.device("cpu") if parameter is None else parameter.device


def _draw(shape: tuple[int, ...], seeds: list[int] | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return initial_noise(shape, row_seeds(seeds, shape[0], device), dtype)


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
    """Draw samples from a model: a `Sampler` made and called once.

    Args:
        model: any callable model(x, t, **cond), x [B, *sample] and t [B], with guidance twice the rows.
        shape: [B, *sample].
        solver: a registered name, see `list_solvers`.
        steps: intervals of the time grid; 20 by default.
        seed: an integer s (row k takes s + k), one for each row, or None for random ones.
        options: those of `Sampler` and `make_plan` (schedule, prediction, grid, guidance_scale, dtype, ...) and those
            of a sampler's call (cond, uncond, callback, progress, ...).

    Returns: the samples, [B, *sample] in `dtype` (float32 by default) on the model's device.

    Raises: TypeError or ValueError naming the argument, before the first model call; `NonFiniteError` if the model
        returns NaN or infinity.

    Example:
        x = pydiff.sample(pydiff.load_model("mnist"), (2, 1, 28, 28), solver="unipc", steps=8, seed=0)
        assert x.shape == (2, 1, 28, 28)
    """
    calling = {name: options.pop(name) for name in list(options) if name in _OF_THE_CALL}
    return Sampler(model, solver, steps, **options)(shape, seed=seed, **calling)


_OF_THE_CALL = {*(field.name for field in dataclasses.fields(CallOptions)), *RENAMED} - {
    "guidance_scale",
    "dtype",
    "model_dtype",
}
"""What `sample` hands to the call; the rest is the sampler's."""


def _model_schedule(model: Model) -> NoiseSchedule:
    config = getattr(model, "schedule_config", None)
    if isinstance(config, dict):
        return NoiseSchedule.from_dict(config)
    check_schedule_is_known(model)
    return VPLinear()


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

    Raises: TypeError or ValueError for a model that is not callable or cannot be copied, for x that is neither tensor
        nor shape, and for options that `Sampler` does not take. An error of the model itself is in the report.

    Example:
        def model(x, t):
            return x * (0.5 if t[0].item() > 0.1 else 0.4)  # waits for the device, and freezes the branch

        report = pydiff.check_capturable(model, (2, 3, 8, 8))
        assert not report and "item" in report.problems[0].what
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
    if options.get("schedule") is None and not hasattr(model, "schedule_config"):
        options = {**options, "schedule": VPLinear()}  # which one does not matter here
    return Sampler(model, **options)


def _batch(x: Any, dtype: torch.dtype) -> torch.Tensor:
    shape = tuple(x.shape) if isinstance(x, torch.Tensor) else check_shape("x (a tensor, or its shape)", x)
    if not shape or not shape[0]:
        raise ValueError(f"x must have a row at least, got shape {list(shape)}")
    if isinstance(x, torch.Tensor):
        return x
    return torch.empty(shape, dtype=dtype, device="meta")
