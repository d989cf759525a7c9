"""Number by number against the samplers of k-diffusion.

k-diffusion brings a training stack along, so its samplers are stated here once more, in our words and in float64, from
the papers they implement. These run always. Where k-diffusion itself is at hand the same problems go through its code
too, in float64 and in float32: `pip install -c constraints.txt --no-deps k-diffusion` suffices, and `.ci/run` does it.

All of them work on x / alpha at sigma / alpha, so a VP schedule gives the same numbers: this is checked as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import pydiff
from tests.oracles import peers

K_DIFFUSION = peers.load_k_diffusion()
Denoiser = Callable[[torch.Tensor, float], torch.Tensor]
Draws = Iterator[torch.Tensor]


# The samplers, from the papers.


def churned(x: torch.Tensor, sigma: float, n: int, draws: Draws, options: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """EDM (2206.00364), Alg. 2, lines 4 to 6."""
    inside = options.get("s_tmin", 0.0) <= sigma <= options.get("s_tmax", math.inf)
    gamma = min(options.get("s_churn", 0.0) / n, math.sqrt(2) - 1) if inside else 0.0
    hat = sigma * (1 + gamma)
    z = next(draws)  # drawn in any case, as k-diffusion does
    return x + math.sqrt(hat**2 - sigma**2) * options.get("s_noise", 1.0) * z, hat


def euler(model: Denoiser, x: torch.Tensor, sigmas: list[float], draws: Draws, **options: Any) -> torch.Tensor:
    for sigma, target in zip(sigmas, sigmas[1:]):
        x, hat = churned(x, sigma, len(sigmas) - 1, draws, options)
        x = x + (target - hat) * (x - model(x, hat)) / hat
    return x


def heun(model: Denoiser, x: torch.Tensor, sigmas: list[float], draws: Draws, **options: Any) -> torch.Tensor:
    """EDM, Alg. 2: the trapezoid rule, except into sigma = 0."""
    for sigma, target in zip(sigmas, sigmas[1:]):
        x, hat = churned(x, sigma, len(sigmas) - 1, draws, options)
        slope = (x - model(x, hat)) / hat
        end = x + (target - hat) * slope
        if target > 0:
            end = x + (target - hat) * (slope + (end - model(end, target)) / target) / 2
        x = end
    return x


def euler_ancestral(
    model: Denoiser, x: torch.Tensor, sigmas: list[float], draws: Draws, eta: float = 1.0, s_noise: float = 1.0
) -> torch.Tensor:
    """DDPM's posterior (2006.11239, eq. 7) in x / alpha: variance sigma_t^2 (1 - sigma_t^2 / sigma_s^2) for eta = 1."""
    for sigma, target in zip(sigmas, sigmas[1:]):
        up = min(target, eta * target * math.sqrt(1 - (target / sigma) ** 2))
        down = math.sqrt(target**2 - up**2)
        x = x + (down - sigma) * (x - model(x, sigma)) / sigma
        if target > 0:
            x = x + up * s_noise * next(draws)
    return x


def dpmpp_2s(model: Denoiser, x: torch.Tensor, sigmas: list[float], draws: Draws) -> torch.Tensor:
    """DPM-Solver++(2S), 2211.01095, Alg. 1 with r = 1/2."""
    for sigma, target in zip(sigmas, sigmas[1:]):
        d = model(x, sigma)
        if target == 0:
            x = d
            continue
        middle = math.sqrt(sigma * target)
        u = middle / sigma * x + (1 - middle / sigma) * d
        x = target / sigma * x + (1 - target / sigma) * model(u, middle)
    return x


def dpmpp_2m(model: Denoiser, x: torch.Tensor, sigmas: list[float], draws: Draws) -> torch.Tensor:
    """DPM-Solver++(2M), 2211.01095, Alg. 2."""
    return dpmpp_2m_sde(model, x, sigmas, draws, eta=0.0)


def dpmpp_2m_sde(
    model: Denoiser,
    x: torch.Tensor,
    sigmas: list[float],
    draws: Draws,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
) -> torch.Tensor:
    """SDE-DPM-Solver++(2M), 2211.01095, App. B.5, with the noise scaled by eta = tau^2."""
    old, last = None, 0.0
    for sigma, target in zip(sigmas, sigmas[1:]):
        d = model(x, sigma)
        if target == 0:
            return d
        h = math.log(sigma / target)
        k = (1 + eta) * h
        x = target / sigma * math.exp(-eta * h) * x + (1 - math.exp(-k)) * d
        if old is not None:
            weight = (1 - math.exp(-k)) / 2 if solver_type == "midpoint" else 1 - (1 - math.exp(-k)) / k
            x = x + weight * h / last * (d - old)
        if eta:
            x = x + target * math.sqrt(1 - math.exp(-2 * eta * h)) * s_noise * next(draws)
        old, last = d, h
    return x


FORMULAS = {f.__name__: f for f in (euler, heun, euler_ancestral, dpmpp_2s, dpmpp_2m, dpmpp_2m_sde)}
CHURN = {"s_churn": 100.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("euler", {}),
    ("euler", {"s_churn": 8.0}),
    ("euler", CHURN),
    ("heun", {}),
    ("heun", {"s_churn": 8.0}),
    ("heun", CHURN),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.4, "s_noise": 1.1}),
    ("euler_ancestral", {"eta": 1.5}),
    ("dpmpp_2s", {}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"eta": 0.3, "s_noise": 0.9}),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
]
MULTISTEP = ("dpmpp_2m", "dpmpp_2m_sde")  # k-diffusion lowers their order into sigma = 0 only
GRIDS = {
    "karras-1": [80.0, 0.0],
    "karras-18": [*np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 18) ** 7, 0.0],
    "noisy end": [*np.geomspace(40.0, 0.03, 8)],
    "uneven": [14.6, 9.0, 8.0, 2.5, 0.4, 0.39, 0.05, 0.0],
}


def problem(name: str, grid: str, model: peers.Model) -> tuple[torch.Tensor, torch.Tensor, Denoiser, list[float]]:
    sigmas = [float(s) for s in GRIDS[grid]]
    z, noise = peers.problem(len(sigmas), seed=len(name))
    return sigmas[0] * z.double(), noise.double(), lambda x, sigma: model("sample", x, 1.0, float(sigma)), sigmas


def churn_draws(options: dict[str, Any], sigmas: list[float], noise: torch.Tensor) -> torch.Tensor:
    """Of the draws that k-diffusion makes for its churn, those it uses: a plan makes no others."""
    low, high = options.get("s_tmin", 0.0), options.get("s_tmax", math.inf)
    return noise[[i for i, s in enumerate(sigmas[:-1]) if low <= s <= high and options.get("s_churn")]]


def run_plan(
    name: str,
    options: dict[str, Any],
    x: torch.Tensor,
    noise: torch.Tensor,
    model: peers.Model,
    sigmas: list[float],
    schedule: pydiff.NoiseSchedule,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    if name in MULTISTEP:
        options = {"lower_order_final": False, **options}
    plan = pydiff.make_plan(name, schedule, sigmas=sigmas, prediction="sample", **options)
    if name in ("euler", "heun"):
        noise = churn_draws(options, sigmas, noise)

    def at_ratio(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = float(schedule.alpha(float(t[0]))), float(schedule.sigma(float(t[0])))
        return model("sample", x / alpha, 1.0, sigma / alpha)

    start = float(schedule.alpha(plan.times[0])) * x  # plan.alpha[0] is that of the first call, after its churn
    end = pydiff.run_plan(plan, at_ratio, start, noise=noise if plan.num_draws else None, dtype=dtype)
    return end / plan.alpha[-1]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_published_formulas(name: str, options: dict[str, Any], grid: str) -> None:
    for model in (peers.predict, peers.unruly):
        x, noise, denoiser, sigmas = problem(name, grid, model)
        expected = FORMULAS[name](denoiser, x, sigmas, iter(noise), **options)
        schedules = [pydiff.EDM(), peers.RatioVP()]
        if "s_churn" not in options:  # beyond the schedule's noisiest level there is nothing to churn to
            schedules.append(pydiff.VPLinear(0.1, 22.0))
        for schedule in schedules:
            actual = run_plan(name, options, x, noise, model, sigmas, schedule)
            assert peers.relative(actual, expected) <= 1e-11, (schedule, model)


def run_k_diffusion(
    name: str, options: dict[str, Any], x: torch.Tensor, noise: torch.Tensor, model: peers.Model, sigmas: list[float]
) -> torch.Tensor:
    assert K_DIFFUSION is not None
    options, draws = dict(options), iter(noise.to(x.dtype))
    if name == "dpmpp_2s":
        name, options = "dpmpp_2s_ancestral", {"eta": 0.0}
    if name in ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_2s_ancestral"):
        options["noise_sampler"] = lambda sigma, sigma_next: next(draws)
    sampler = getattr(K_DIFFUSION, f"sample_{name}")
    with mock.patch.object(K_DIFFUSION.torch, "randn_like", lambda x: next(draws)):
        return sampler(
            lambda x, sigma: model("sample", x, 1.0, float(sigma[0])),
            x,
            torch.tensor(sigmas, dtype=x.dtype),
            disable=True,
            **options,
        )


@pytest.mark.skipif(K_DIFFUSION is None, reason="needs pip install -c constraints.txt --no-deps k-diffusion")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_k_diffusion_itself(name: str, options: dict[str, Any], grid: str) -> None:
    if (
        name == "dpmpp_2m_sde" and grid == "karras-1"
    ):  # the first step goes to sigma = 0, where k-diffusion has a defect
        x, noise, _, sigmas = problem(name, grid, peers.predict)
        with pytest.raises(UnboundLocalError):
            run_k_diffusion(name, options, x, noise, peers.predict, sigmas)
        return
    # In one step from 80 to 0 k-diffusion computes x - 80 ((x - x0) / 80): float32 leaves it x0 to 80 * 6e-8.
    float32 = 5e-5 if grid == "karras-1" else 1e-5
    for model in (peers.predict, peers.unruly):
        x, noise, _, sigmas = problem(name, grid, model)
        sigmas = [float(np.float32(s)) for s in sigmas]  # the same numbers in both precisions
        for dtype, bound in ((torch.float64, 1e-11), (torch.float32, float32)):
            expected = run_k_diffusion(name, options, x.to(dtype), noise, model, sigmas)
            actual = run_plan(name, options, x.to(dtype), noise, model, sigmas, pydiff.EDM(), dtype)
            assert expected.dtype == dtype
            assert peers.relative(actual, expected) <= bound, (dtype, model)


@pytest.mark.parametrize(
    "name, options, wrong",
    [
        ("euler", {"s_churn": 2.0}, {"s_churn": 2.01}),
        ("heun", {"s_churn": 8.0}, {"s_churn": 8.0, "s_noise": 1.003}),
        ("heun", {}, {"s_churn": 0.01}),
        ("euler_ancestral", {}, {"eta": 0.999}),
        ("dpmpp_2m_sde", {"eta": 0.3}, {"eta": 0.301}),
        ("dpmpp_2m_sde", {}, {"solver_type": "heun"}),
    ],
    ids=str,
)
def test_a_wrong_option_is_seen(name: str, options: dict[str, Any], wrong: dict[str, Any]) -> None:
    x, noise, denoiser, sigmas = problem(name, "noisy end", peers.unruly)
    expected = FORMULAS[name](denoiser, x, sigmas, iter(noise), **options)
    assert peers.relative(run_plan(name, wrong, x, noise, peers.unruly, sigmas, pydiff.EDM()), expected) > 1e-4


def test_diffusers_churn_is_another_thing() -> None:
    """diffusers adds the noise after the model call; a plan does as EDM's Alg. 2 says, and so differs from it."""
    pytest.importorskip("diffusers")
    run = peers.run_diffusers("EDMEulerScheduler", {}, 10, double=True, draws=10, s_churn=8.0)
    plan = pydiff.make_plan("euler", pydiff.EDM(), times=run.levels, prediction=pydiff.EDMPrecond(), s_churn=8.0)
    ours = peers.run_pydiff(plan, run, double=True, draws=10)
    assert peers.relative(ours, run.x) > 1e-3
