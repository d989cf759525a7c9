"""The loops that `whole_call.py` times, and what has to be true of their samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pydiff
from benchmarks.loop_rivals import BETAS

STEPS = 20
COUNTS = (10, 20, 30, 40)
"""Numbers of steps that a line is fitted to."""
BOUND = 1e-5
"""Difference of two samples as a share of the largest element, from the rounding of float32."""
SCHEDULERS = {
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}

Model = Callable[[Tensor, Tensor], Tensor]
Shape = tuple[int, ...]


def free(shape: Shape, device: torch.device) -> Model:
    """A model that costs nothing."""
    m = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    return lambda x, t: m


def attentive(x: Tensor, t: Tensor) -> Tensor:
    """A model that a wrong input or a wrong time would show in."""
    return torch.tanh(x + t.float().reshape(-1, *([1] * (x.ndim - 1))) / 1000)


def make_sampler(solver: str, model: Model, steps: int) -> pydiff.Sampler:
    """A sampler whose plan does what the scheduler does."""
    schedule, prediction, grid = pydiff.from_diffusers_config({"_class_name": SCHEDULERS[solver], **BETAS})
    times = pydiff.make_times(schedule, steps, **grid)
    return pydiff.Sampler(model, solver, schedule=schedule, prediction=prediction, times=times)


def make_scheduler(solver: str) -> Any:
    import diffusers

    return getattr(diffusers, SCHEDULERS[solver])(**BETAS)


def x_T(scheduler: Any, shape: Shape, device: torch.device) -> Tensor:
    z = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
    return z * scheduler.init_noise_sigma


@torch.no_grad()
def diffusers_loop(scheduler: Any, model: Model, steps: int, shape: Shape, device: torch.device) -> Tensor:
    scheduler.set_timesteps(steps, device=device)
    scheduler.set_begin_index(0)
    x = x_T(scheduler, shape, device)
    for t in scheduler.timesteps:
        m = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(m, t, x, return_dict=False)[0]
    return x


def noise(sampler: pydiff.Sampler, shape: Shape, device: torch.device) -> Tensor:
    """What a call with seed 0 starts from."""
    return sampler.plan.init_std * pydiff.initial_noise(shape, torch.arange(shape[0], device=device))


def checks(shape: Shape, device: torch.device) -> list[tuple[int, Model]]:
    """The loops whose samples have to be right: those that are timed, and one whose model sees what it is given."""
    model = free(shape, device)
    return [*((n, model) for n in COUNTS), (STEPS, attentive)]


def check_call(solver: str, shape: Shape, device: torch.device) -> None:
    """Raise unless `sampler(shape, seed)` is `run_plan` on the same noise."""
    for steps, model in checks(shape, device):
        sampler = make_sampler(solver, model, steps)
        expected = pydiff.run_plan(sampler.plan, model, noise(sampler, shape, device), seed=0)
        if not expected.isfinite().all() or not torch.equal(sampler(shape, seed=0, device=device), expected):
            raise AssertionError(f"{solver}, {steps} steps: the call and run_plan return different samples")


def check_rival(solver: str, shape: Shape, device: torch.device) -> float:
    """How far diffusers' samples are from pydiff's of the same noise at most; raises where that is too far."""
    worst, scheduler = 0.0, make_scheduler(solver)
    for steps, model in checks(shape, device):
        sample = diffusers_loop(scheduler, model, steps, shape, device)
        scheduler.set_timesteps(steps, device=device)
        start = scheduler.scale_model_input(x_T(scheduler, shape, device), scheduler.timesteps[0])
        ours = pydiff.run_plan(make_sampler(solver, model, steps).plan, model, start, seed=0)
        apart = float((sample - ours).abs().max() / ours.abs().max())
        if not apart <= BOUND:  # NaN is not either
            raise AssertionError(f"{solver}, {steps} steps: diffusers' sample is {apart:.1e} away from pydiff's")
        worst = max(worst, apart)
    return worst
