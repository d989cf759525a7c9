"""The loop as users of diffusers run it: a scheduler between calls of a model that is plain, compiled or in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pydiff
from benchmarks.loop_models import Case
from pydiff.run.conditions import join

STEPS = 20
SCHEDULER = "DPMSolverMultistepScheduler"  # its defaults are DPM-Solver++(2M)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

Denoiser = Callable[[Tensor, Tensor], Tensor]
Run = Callable[[], Tensor]


def plan_arguments(case: Case) -> dict[str, Any]:
    """What makes a `pydiff.Sampler` do the same arithmetic."""
    config = {"_class_name": SCHEDULER, "prediction_type": case.prediction, **BETAS}
    schedule, prediction, grid = pydiff.from_diffusers_config(config)
    return {
        "solver": "dpmpp_2m",
        "schedule": schedule,
        "prediction": prediction,
        "guidance_scale": case.guidance,
        "times": pydiff.make_times(schedule, STEPS, **grid),
    }


def scheduler_loop(case: Case, denoise: Denoiser) -> Run:
    """A run from x_T to the sample. What stands between two calls is a pipeline's, with two favours: `set_begin_index`
    spares the scheduler a search that waits for the device, and conditions are joined beforehand.

    x stays float32, as pydiff's does; a pipeline keeps it in the model's dtype, and its scheduler casts there and back.
    """
    import diffusers

    scheduler = getattr(diffusers, SCHEDULER)(prediction_type=case.prediction, **BETAS)
    guided, dtype = case.guidance != 1, case.dtype

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(STEPS, device=case.x.device)
        scheduler.set_begin_index(0)
        x = case.x
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            m = denoise(given.to(dtype), t).float()
            if guided:
                unconditional, conditional = m.chunk(2)
                m = unconditional + case.guidance * (conditional - unconditional)
            x = scheduler.step(m, t, x, return_dict=False)[0]
        return x

    return run


def denoiser(case: Case, model: Callable[..., Any]) -> Denoiser:
    """`model`, which is the case's or made from it, with the condition of a whole run."""
    arguments = dict(case.cond)
    if case.uncond is not None:
        arguments = join(case.uncond, case.cond, case.x.shape[0])

    def call(x: Tensor, t: Tensor) -> Tensor:
        output = model(x, t, **arguments, **case.call)
        return output[0] if isinstance(output, tuple) else output

    return call


def eager(case: Case) -> Run:
    return scheduler_loop(case, denoiser(case, case.model))


def compiled(case: Case) -> Run:
    """torch.compile(mode="reduce-overhead"): compiled code, on CUDA in graphs of its own."""
    call = denoiser(case, torch.compile(case.model, mode="reduce-overhead", dynamic=False))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the call before returned is no longer needed
        return call(x, t)

    return scheduler_loop(case, denoise)


def graphed(case: Case) -> Run:
    """What people write themselves: the denoiser's kernels in a graph, with inputs copied into it."""
    call = denoiser(case, case.model)
    rows = case.x.shape[0] * (1 if case.uncond is None else 2)
    x = torch.zeros((rows, *case.x.shape[1:]), dtype=case.dtype, device=case.x.device)
    t = torch.zeros((), dtype=torch.int64, device=case.x.device)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call(x, t)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            output = call(x, t)

    def denoise(given: Tensor, time: Tensor) -> Tensor:
        x.copy_(given)
        t.copy_(time)
        graph.replay()
        return output

    return scheduler_loop(case, denoise)
