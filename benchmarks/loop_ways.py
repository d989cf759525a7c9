"""The ways of running a model's loop, and the check that they make the same sample."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pydiff
from benchmarks import loop_rivals
from benchmarks.harness import NotMeasured
from benchmarks.loop_models import Case, LoopModel
from benchmarks.loop_rivals import Run


def ours(graph: str | bool, case: Case) -> Run:
    sampler = pydiff.Sampler(case.model, graph=graph, **loop_rivals.plan_arguments(case))
    return partial(sampler, case.x, cond=case.cond, uncond=case.uncond, seed=0, check_finite=False)


def ours_optimized(case: Case) -> Run:
    from pydiff.optimize import optimize

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "pydiff.optimize: nothing")  # then there is nothing to compare
        optimize(case.model)
    return ours("loop", case)


@dataclass(frozen=True)
class Way:
    """How a loop is run: `make` gives a function that makes one sample from the case's x_T."""

    make: Callable[[Case], Run]
    cuda: bool = True  # it needs CUDA
    late: bool = False  # it takes so long to start that everything else goes first
    graph: bool = False  # a mode of pydiff's graphs; it warns where it takes another one, or none
    changes_model: bool = False  # so it gets one of its own


WAYS = {
    "diffusers": Way(loop_rivals.eager, cuda=False),
    "diffusers graph": Way(loop_rivals.graphed),
    "diffusers compiled": Way(loop_rivals.compiled, late=True),
    "pydiff": Way(partial(ours, False), cuda=False),
    "pydiff stage": Way(partial(ours, "stage"), graph=True),
    "pydiff loop": Way(partial(ours, "loop"), graph=True),
    "pydiff device": Way(partial(ours, "device"), graph=True),
    "pydiff auto": Way(partial(ours, "auto")),
    "pydiff optimized": Way(ours_optimized, graph=True, changes_model=True),
}


def held(run: Run) -> list[str]:
    """The captured loops behind a run, in the words of `Sampler.stats`: which mode "auto" has chosen, for one."""
    sampler = getattr(run, "func", None)
    return sampler.stats().held if isinstance(sampler, pydiff.Sampler) else []


def refusal(way: Way, device: torch.device, compile_on_cpu: bool) -> NotMeasured | None:
    if device.type == "cuda" or not way.cuda:
        return None
    if way.late:
        return None if compile_on_cpu else NotMeasured("compiled on CUDA, or with --compile")
    return NotMeasured("graphs are captured on CUDA alone")


# ------------------------------------------------------------------------------------ right before fast

GATE = 2e-5  # largest difference of two float32 samples, as a share of the largest element
# The same for the samples that are timed, where another order of sums, TF32 or a fused kernel is no mistake.
BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class WrongResult(RuntimeError):
    """Two ways that should make the same sample do not."""


def check_samples(model: LoopModel, device: torch.device, batch: int | None, smoke: bool) -> dict[str, Any]:
    """Run diffusers' loop and pydiff's in float32; the calls they made, and how far apart their samples are.

    Raises WrongResult where that is not the same work.
    """
    case = model.build(device, torch.float32, batch=batch, smoke=smoke)
    calls = {"diffusers": 0, "pydiff": 0}
    samples = {}
    for name in calls:

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        run = WAYS[name].make(case)
        hook = case.model.register_forward_hook(count)
        with exact_float32():
            samples[name] = run()
        hook.remove()
    if calls["pydiff"] != calls["diffusers"]:
        raise WrongResult(f"diffusers calls the model {calls['diffusers']} times, pydiff {calls['pydiff']} times")
    apart = compare(samples["pydiff"], samples["diffusers"], GATE, "in float32 pydiff's sample is not diffusers'")
    return {"difference": apart, "bound": GATE, "calls": calls["pydiff"]}


def compare(sample: Tensor, wanted: Tensor, bound: float, claim: str) -> float:
    """The largest difference as a share of the largest element; raises WrongResult with `claim` beyond the bound."""
    apart = float((sample - wanted).abs().max() / wanted.abs().max())
    if not apart <= bound:  # NaN is not
        raise WrongResult(f"{claim}: they differ by {apart:.1e}, more than {bound:.0e}")
    return apart


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32, whose rounding makes much of the last bit of a float32."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
