"""Drives a diffusers scheduler or a k-diffusion function, and hands the very same problem to pydiff.

The model is a function of the sample and its noise level alone (`predict`), so that the rounding of the times that
some peers tell their models plays no part; noise is drawn beforehand and dealt out to both sides in order. Levels are
written as the ratio sigma / alpha throughout: that is what peers tabulate, and with alpha^2 + sigma^2 = 1 it says all.

Peers tabulate and compute in float32. `float64_arithmetic` runs their own source in double precision throughout, by
putting other meanings of `float32` under the names `torch` and `np` of their module: the formulas stay theirs, the
rounding goes. A plan that agrees with that to 1e-10 has the peer's formulas; what is left in float32 is rounding.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

import pydiff
from pydiff.schedules.base import NoiseSchedule

Model = Callable[[str, torch.Tensor, float, float], torch.Tensor]

SHAPE = (2, 3, 4, 4)
SIGMA_DATA = 0.5  # of the EDM classes


class RatioVP(NoiseSchedule):
    """alpha^2 + sigma^2 = 1 with ratio itself as the time, so that any table of a peer is a valid grid."""

    variance_preserving = True
    t_max = float("inf")
    t_start, t_end = 100.0, 0.01

    def _log_alpha(self, t: np.ndarray) -> np.ndarray:
        return -0.5 * np.log1p(t * t)

    def _sigma(self, t: np.ndarray) -> np.ndarray:
        return t / np.sqrt(1.0 + t * t)

    def _log_snr(self, t: np.ndarray) -> np.ndarray:
        return -np.log(t)

    def _t_of_log_snr(self, log_snr: np.ndarray) -> np.ndarray:
        return np.exp(-log_snr)

    def _drift(self, t: np.ndarray) -> np.ndarray:
        return -t / (1.0 + t * t)

    def _diffusion_squared(self, t: np.ndarray) -> np.ndarray:
        return 2.0 * t / (1.0 + t * t)


def denoise(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """E[x0 | x] for elements that are c or -c (odds e to 1) plus Gaussian noise of deviation 0.2.

    c runs from 0.3 to 1.2, so that a clip at 1 acts; the odds keep the mean away from 0, where nothing is relative.
    """
    c = torch.linspace(0.3, 1.2, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
    variance = (0.2 * alpha) ** 2 + sigma**2
    return (0.04 * alpha * x + sigma**2 * c * torch.tanh(alpha * c * x / variance + 0.5)) / variance


def predict(kind: str, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """What a perfect model answers, computed in float64 and rounded to x's dtype.

    "edm" and "edm-v": the raw network of EDM and its negative, on the scaled input.
    """
    z = x.double()
    if kind.startswith("edm"):
        z = z * np.hypot(sigma, SIGMA_DATA)
    x0 = denoise(z, alpha, sigma)
    if kind.startswith("edm"):  # the raw network F of 2206.00364, table 1
        c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
        out = (x0 - c_skip * z) * np.hypot(sigma, SIGMA_DATA) / (sigma * SIGMA_DATA)
        out = -out if kind == "edm-v" else out
    else:
        epsilon = (z - alpha * x0) / sigma
        out = {
            "epsilon": epsilon,
            "sample": x0,
            "v_prediction": alpha * epsilon - sigma * x0,
            "flow_prediction": epsilon - x0,
        }[kind]
    return out.to(x.dtype)


def unruly(kind: str, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """An output that follows from nothing and ignores the level: unlike a perfect model it forgives no deviation."""
    y = x.double()
    return torch.tanh(0.8 * y.flip(1) + 0.5 * y.roll(1, -1) - 0.3).to(x.dtype)


def problem(draws: int = 0, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    """A unit normal tensor and `draws` more, float32 so that both precisions start from the same numbers."""
    z = torch.randn((draws + 1, *shape), generator=torch.Generator().manual_seed(seed))
    return z[0], z[1:]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|, in the Euclidean norm over everything."""
    return float((a.double() - b.double()).norm() / b.double().norm())


class _Doubled:
    """A module under whose name float32 means float64."""

    def __init__(self, module: Any, double: Any):
        self._module, self.float32 = module, double

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextlib.contextmanager
def float64_arithmetic(module: Any) -> Iterator[None]:
    """The functions and classes of `module` calculate in float64 where their source says float32, or says nothing."""
    doubled = {"torch": _Doubled(torch, torch.float64), "np": _Doubled(np, np.float64)}
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        for name, double in doubled.items():
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, double))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextlib.contextmanager
def dealt_noise(module: Any, noise: torch.Tensor) -> Iterator[None]:
    """`randn_tensor` in `module` hands out `noise` [draws, *shape] in order."""
    rows = iter(noise)

    def deal(shape: Any, generator: Any = None, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return next(rows).to(dtype or torch.get_default_dtype())

    if not hasattr(module, "randn_tensor"):
        yield
        return
    with mock.patch.object(module, "randn_tensor", deal):
        yield


def load_k_diffusion() -> types.ModuleType | None:
    """`k_diffusion.sampling` without the package's __init__ (which wants a training stack), or None if not there.

    What its functions that are compared never call may be missing: torchvision (image files), torchdiffeq (likelihoods)
    and torchsde (the Brownian tree, in whose place the draws are dealt).
    """
    stand_ins: dict[str, Any] = {"k_diffusion": types.ModuleType("k_diffusion")}
    for names in (("torchvision", "torchvision.transforms"), ("torchdiffeq",), ("torchsde",)):
        if importlib.util.find_spec(names[0]) is None:
            stand_ins |= {name: mock.MagicMock() for name in names}
    try:
        root = importlib.metadata.distribution("k-diffusion").locate_file("k_diffusion")
        stand_ins["k_diffusion"].__path__ = [str(root)]
        sys.modules.update(stand_ins)
        return importlib.import_module("k_diffusion.sampling")
    except ImportError:
        return None
    finally:
        for name in [*stand_ins, "k_diffusion.sampling", "k_diffusion.utils"]:
            sys.modules.pop(name, None)


# How a scheduler holds its sample: x itself at levels of `sigmas` or of `alphas_cumprod`; x / alpha; or x of EDM, flow.
SCALINGS = {
    "DDPMScheduler": "table",
    "DDIMScheduler": "table",
    "EulerDiscreteScheduler": "ratio",
    "EulerAncestralDiscreteScheduler": "ratio",
    "HeunDiscreteScheduler": "ratio",
    "EDMEulerScheduler": "edm",
    "EDMDPMSolverMultistepScheduler": "edm",
    "FlowMatchEulerDiscreteScheduler": "flow",
}  # all others: "vp"


@dataclass
class PeerRun:
    """What a peer did: the final sample (as x), the levels it went through, and how often it called the model."""

    x: torch.Tensor
    levels: np.ndarray  # ratio, or the time of a rectified flow
    calls: int
    start: torch.Tensor  # x_T
    scaling: str
    kind: str


def scheduler_class(name: str) -> Any:
    return getattr(importlib.import_module("diffusers"), name)


def level(scaling: str, ratio: float) -> tuple[float, float]:
    """(alpha, sigma) of a level as the scheduler tabulates it."""
    if scaling == "edm":
        return 1.0, ratio
    if scaling == "flow":
        return 1.0 - ratio, ratio
    return (0.0, 1.0) if np.isinf(ratio) else (float(1.0 / np.hypot(1.0, ratio)), float(ratio / np.hypot(1.0, ratio)))


def output_kind(scaling: str, config: dict[str, Any]) -> str:
    """What the scheduler expects of its model, in the words of `predict`."""
    if scaling == "edm":
        return "edm-v" if config.get("prediction_type") == "v_prediction" else "edm"
    return config.get("prediction_type", "flow_prediction" if scaling == "flow" else "epsilon")


def run_diffusers(
    name: str,
    config: dict[str, Any],
    steps: int,
    *,
    double: bool = False,
    draws: int = 0,
    seed: int = 0,
    model: Model = predict,
    generator: torch.Generator | None = None,
    **step_options: Any,
) -> PeerRun:
    """Run a scheduler on the model. `generator`: let it draw its own noise, instead of `problem`'s `draws`."""
    cls = scheduler_class(name)
    module = sys.modules[cls.__module__]
    z, noise = problem(max(draws, 1), seed)
    with contextlib.ExitStack() as stack:
        if double:
            stack.enter_context(float64_arithmetic(module))
        if generator is None:
            stack.enter_context(dealt_noise(module, noise))
        else:
            step_options["generator"] = generator
        scheduler = cls(**config)
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        scaling = "flow" if config.get("use_flow_sigmas") else SCALINGS.get(name, "vp")
        kind, levels = output_kind(scaling, config), _levels(scheduler, scaling)
        start = _start(z.double() if double else z, scaling, levels[0])
        sample = start / level(scaling, levels[0])[0] if scaling == "ratio" else start
        accepted = {k: v for k, v in step_options.items() if k in inspect.signature(scheduler.step).parameters}
        for t in scheduler.timesteps:
            # the flow classes have no scale_model_input
            x = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            m = model(kind, x, *level(scaling, _current_level(scheduler, scaling, t)))
            sample = scheduler.step(m, t, sample, return_dict=False, **accepted)[0]
    if scaling == "ratio":
        sample = sample * level(scaling, levels[-1])[0]
    return PeerRun(sample, levels, len(scheduler.timesteps), start, scaling, kind)


def _start(z: torch.Tensor, scaling: str, ratio: float) -> torch.Tensor:
    """x_T: z for variance preserving schedules, sigma z for EDM and flow."""
    return (level(scaling, ratio)[1] * z.double()).to(z.dtype) if scaling in ("edm", "flow") else z


def _current_level(scheduler: Any, scaling: str, t: torch.Tensor) -> float:
    if scaling == "table":
        return _table_level(scheduler, int(t))
    return float(scheduler.sigmas[scheduler.step_index or 0])  # there is no index before the first step


def _levels(scheduler: Any, scaling: str) -> np.ndarray:
    """The levels of the scheduler's grid as float64, each once."""
    if scaling != "table":
        values = scheduler.sigmas.double().numpy()
        return values[np.concatenate([[True], np.diff(values) != 0])]  # Heun holds inner levels twice
    times = [int(t) for t in scheduler.timesteps]
    if hasattr(scheduler, "final_alpha_cumprod"):  # DDIM: prev_timestep = t - N // n, whatever stands next
        stride = scheduler.config.num_train_timesteps // len(times)
        assert all(t - s == stride for t, s in zip(times, times[1:])), "DDIM leaves its own grid here"
        last = float(1 / scheduler.final_alpha_cumprod.double() - 1) ** 0.5
    else:
        last = 0.0
    return np.array([*(_table_level(scheduler, t) for t in times), last])


def _table_level(scheduler: Any, t: int) -> float:
    squared = float(scheduler.alphas_cumprod[t].double())
    return (1.0 / squared - 1.0) ** 0.5 if squared else float("inf")


def make_peer_plan(solver: str, run: PeerRun, **options: Any) -> pydiff.Plan:
    """The plan for the levels that a peer went through: of as many model calls as it made."""
    prediction: Any = run.kind
    if run.scaling == "edm":
        prediction = pydiff.EDMPrecond(SIGMA_DATA, output_sign=-1 if run.kind == "edm-v" else 1)
    # each of these schedules has the level itself as its time
    schedule = {"edm": pydiff.EDM(), "flow": pydiff.RectifiedFlow()}.get(run.scaling, RatioVP())
    plan = pydiff.make_plan(solver, schedule, times=run.levels, prediction=prediction, **options)
    assert len(plan) == run.calls, f"{solver} makes {len(plan)} calls, the peer {run.calls}"
    told = np.exp(4.0 * plan.model_times) if run.scaling == "edm" else plan.model_times  # c_noise = ln(sigma) / 4
    np.testing.assert_allclose(schedule.sigma(told), plan.sigma[:-1], rtol=1e-12)
    return plan


def stage_model(plan: pydiff.Plan, kind: str, model: Model = predict) -> Callable[..., torch.Tensor]:
    """The model as a plan calls it; the level is the one at which the plan says that x is."""
    levels = iter(zip(plan.alpha.tolist(), plan.sigma.tolist()))
    return lambda x, t: model(kind, x, *next(levels))


def run_pydiff(
    plan: pydiff.Plan, run: PeerRun, *, double: bool = False, draws: int = 0, seed: int = 0, model: Model = predict
) -> torch.Tensor:
    """The problem that `run` solved, through a plan."""
    noise = problem(draws, seed)[1] if plan.num_draws else None
    dtype = torch.float64 if double else torch.float32
    return pydiff.run_plan(plan, stage_model(plan, run.kind, model), run.start, noise=noise, dtype=dtype)
