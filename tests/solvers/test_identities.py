"""Identities between solvers, the catalogued coefficients, call counts, and maps read off by basis probing.

Two plans are the same sampler when they have the same linear map (`probing.compose_plan`): the weights of x_T, of every
model output and of every draw in x after each call. The map is compared, not the table, which may hold the same sum
in another way.
"""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

import pydiff
from tests.oracles import peers
from tests.oracles.probing import compose_plan, probe_diffusers, probe_plan

TOLERANCE = 1e-12
SCHEDULES = {
    "vp_linear": pydiff.VPLinear(),
    "vp_cosine": pydiff.VPCosine(),
    "edm": pydiff.EDM(),
    "discrete": pydiff.DiscreteBetas.named("scaled_linear", 1000, 0.00085, 0.012),
}
PREDICTIONS = ("epsilon", "sample", "v_prediction")

CATALOGUED = [math.sqrt(1 / alpha_bar - 1) for alpha_bar in (0.31, 0.62)]  # sigma / alpha

POSTERIOR = [("ddpm", {"variance": "small"}), ("ddim", {"eta": 1.0}), ("euler_ancestral", {"eta": 1.0})]
DDIM = [
    ("ddim", {}),
    ("dpm_solver_1", {}),
    ("euler", {}),
    ("euler_ancestral", {"eta": 0.0}),
    ("unipc", {"order": 1, "corrector": False}),
    ("unipc", {"order": 1, "corrector": False, "variant": "bh1", "predict_x0": False}),
]
SECOND = [("dpmpp_2m", {}), ("dpmpp_2m_sde", {"eta": 0.0}), ("unipc", {"order": 2, "corrector": False})]


def same(a: pydiff.Plan, b: pydiff.Plan) -> float:
    """Largest difference of the two linear maps, relative to the largest weight."""
    first, second = compose_plan(a), compose_plan(b)
    assert first.shape == second.shape, (a, b)
    return difference(first, second)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, relative to the largest number; 0 where all are 0."""
    return float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float64).tiny))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("family", [POSTERIOR, DDIM, SECOND], ids=["posterior", "ddim", "second order"])
def test_members_of_a_family_coincide(family: list[tuple[str, dict[str, Any]]], name: str) -> None:
    schedule = SCHEDULES[name]
    for steps, prediction, end in itertools.product((1, 2, 7, 16), PREDICTIONS, ("sigma_min", "zero")):
        times = pydiff.make_times(schedule, steps, final_sigmas_type=end)
        first, *others = [
            pydiff.make_plan(solver, schedule, times=times, prediction=prediction, **options)
            for solver, options in family
        ]
        for other in others:
            assert same(first, other) <= TOLERANCE, (steps, prediction, other.solver)


def test_members_of_a_family_give_the_same_sample() -> None:
    """The same on a run, with a model that is not linear and shared noise."""
    z, noise = peers.problem(9)
    for family in (POSTERIOR, DDIM, SECOND):
        ends = []
        for solver, options in family:
            plan = pydiff.make_plan(solver, steps=9, grid="logsnr", **options)
            ends.append(
                pydiff.run_plan(
                    plan,
                    peers.stage_model(plan, "epsilon"),
                    z,
                    dtype=torch.float64,
                    noise=noise.double() if plan.num_draws else None,
                )
            )
        assert max(peers.relative(end, ends[0]) for end in ends) <= TOLERANCE


def test_first_step_of_the_sde_solver_is_the_posterior() -> None:
    """SDE-DPM-Solver++(1), eta = 1: what `dpmpp_2m_sde` does while it has no history."""
    for schedule, (a, b) in itertools.product(SCHEDULES.values(), ((-2.0, 0.5), (0.3, 0.31), (1.0, 2.5))):
        times = [schedule.t_of_log_snr(a), schedule.t_of_log_snr(b)]
        for solver, options in POSTERIOR:
            plan = pydiff.make_plan(solver, schedule, times=times, **options)
            assert same(plan, pydiff.make_plan("dpmpp_2m_sde", schedule, times=times)) <= TOLERANCE


def posterior_std(plan: pydiff.Plan) -> float:
    """The deviation of x_s given x_t and x0 over the plan's one step, 2006.11239, eq. 7."""
    (a_t, a_s), (s_t, s_s) = plan.alpha, plan.sigma
    return float(s_s / s_t * math.sqrt(s_t**2 - (a_t / a_s * s_s) ** 2))


def test_ddim_eta_and_tau_are_different_parameters_of_one_family() -> None:
    """eta_ddim * posterior deviation = sigma_s sqrt(1 - exp(-2 h tau^2)), and k-diffusion's eta is tau^2."""
    schedule = pydiff.VPLinear()
    for tau_squared, (a, b) in itertools.product((0.1, 0.25, 0.7), ((-1.0, 0.2), (0.5, 2.0))):
        times = [schedule.t_of_log_snr(a), schedule.t_of_log_snr(b)]
        sde = pydiff.make_plan("dpmpp_2m_sde", schedule, times=times, eta=tau_squared)
        eta = sde.sigma[1] * math.sqrt(-math.expm1(-2.0 * (b - a) * tau_squared)) / posterior_std(sde)
        assert same(pydiff.make_plan("ddim", schedule, times=times, eta=eta), sde) <= TOLERANCE
        assert same(pydiff.make_plan("ddim", schedule, times=times, eta=tau_squared), sde) > 1e-3
        assert same(pydiff.make_plan("ddim", schedule, times=times, eta=math.sqrt(tau_squared)), sde) > 1e-3
    sde = pydiff.make_plan("dpmpp_2m_sde", peers.RatioVP(), sigmas=CATALOGUED, eta=0.25)
    assert compose_plan(sde)[0, 2] / posterior_std(sde) == pytest.approx(0.6167, abs=5e-5)


@pytest.mark.parametrize(
    "solver, options, expected",
    [
        *((solver, options, (1.41421356, -0.85125653, 0.52474977)) for solver, options in POSTERIOR),
        ("dpmpp_2m_sde", {}, (1.41421356, -0.85125653, 0.52474977)),
        *((solver, options, (1.41421356, -0.55829261)) for solver, options in DDIM),
        ("dpmpp_2m", {}, (1.41421356, -0.55829261)),
        ("dpmpp_2m_sde", {"eta": 0.25}, (1.41421356, -0.65007171, 0.32361932)),
    ],
    ids=str,
)
def test_catalogued_coefficients(solver: str, options: dict[str, Any], expected: tuple[float, ...]) -> None:
    """One step from alphabar = .31 to .62, on (x, epsilon, z), to the eight digits that are known."""
    weights = compose_plan(pydiff.make_plan(solver, peers.RatioVP(), sigmas=CATALOGUED, **options))
    assert weights[0] == pytest.approx(expected, rel=0, abs=5.1e-9)


def test_heun_is_the_textbook_formula() -> None:
    """EDM, Alg. 1 on x with sigma as the time, line for line."""
    schedule, (z, _) = pydiff.EDM(), peers.problem()
    sigmas = pydiff.make_times(schedule, 12)
    plan = pydiff.make_plan("heun", schedule, times=sigmas, prediction="sample")
    x = start = sigmas[0] * z.double()
    for s, t in zip(sigmas, sigmas[1:]):
        d = (x - peers.denoise(x, 1.0, s)) / s
        y = x + (t - s) * d
        x = x + (t - s) * 0.5 * (d + (y - peers.denoise(y, 1.0, t)) / t) if t > 0 else y
    end = pydiff.run_plan(plan, peers.stage_model(plan, "sample"), start, dtype=torch.float64)
    assert peers.relative(end, x) <= TOLERANCE


def test_identities_can_fail() -> None:
    def plan(solver: str, **options: Any) -> pydiff.Plan:
        return pydiff.make_plan(solver, steps=6, grid="logsnr", **options)

    assert same(plan("ddim", eta=1.0), plan("ddpm", variance="large")) > 1e-3
    assert same(plan("dpmpp_2m"), plan("dpmpp_2m", solver_type="heun")) > 1e-3
    assert same(plan("ddim"), plan("unipc", order=2, corrector=False)) > 1e-3
    assert same(plan("dpmpp_2m"), plan("unipc", order=2, corrector=False, variant="bh1")) > 1e-3
    assert same(plan("dpmpp_3m"), plan("dpmpp_3m", compat=True)) > 1e-3


# The plan's length is its number of model calls, and its table is what it does.

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ddim": [{"eta": 0.5}],
    "euler": [{"s_churn": 5.0}],
    "heun": [{"s_churn": 5.0}],
    "ddpm": [{"variance": "large"}],
    "dpm_solver_2": [{"method": "multistep"}, {"nodes": "grid"}],
    "dpm_solver_3": [{"method": "multistep"}, {"nodes": "grid"}],
    "dpmpp_2s": [{"nodes": "grid"}],
    "dpmpp_2m": [{"solver_type": "heun"}],
    "dpmpp_3m": [{"compat": True}],
    "dpmpp_2m_sde": [{"eta": 0.3}],
    "unipc": [{"order": 3}, {"corrector": False}, {"variant": "bh1"}],
}
ALL_PLANS = [(s.name, options) for s in pydiff.list_solvers() for options in [{}, *OPTIONS.get(s.name, [])]]


class CountingModel:
    """Remembers the times it was called at."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.times.append(float(t[0]))
        return 0.1 * x


@pytest.mark.parametrize("solver, options", ALL_PLANS, ids=str)
def test_length_is_the_number_of_calls(solver: str, options: dict[str, Any]) -> None:
    for steps, schedule in itertools.product((1, 2, 5), (pydiff.VPLinear(), pydiff.EDM())):
        plan = pydiff.make_plan(solver, schedule, steps, **options)
        counting = CountingModel()
        pydiff.run_plan(plan, counting, peers.problem()[0], seed=0, dtype=torch.float64)
        assert len(counting.times) == len(plan)
        assert counting.times == plan.model_times.tolist()


@pytest.mark.parametrize("solver, options", ALL_PLANS, ids=str)
def test_a_run_does_what_the_table_says(solver: str, options: dict[str, Any]) -> None:
    """Probing a run gives the product of the table's rows: registers, ring and draws are where the plan believes."""
    plan = pydiff.make_plan(solver, pydiff.VPLinear(), 6, grid="logsnr", **options)
    assert difference(probe_plan(plan), compose_plan(plan)) <= 1e-13


# Peers' linear maps, column by column.

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROBED = [
    ("DDIMScheduler", {"clip_sample": False}, "ddim", {}),
    ("HeunDiscreteScheduler", {}, "heun", {}),
    ("DPMSolverMultistepScheduler", {}, "dpmpp_2m", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_3m", {"compat": True}),
    (
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "solver_type": "heun"},
        "dpmpp_2m",
        {"solver_type": "heun"},
    ),
    ("UniPCMultistepScheduler", {}, "unipc", {"lower_order_final": True}),
    (
        "UniPCMultistepScheduler",
        {"solver_order": 3, "final_sigmas_type": "sigma_min", "predict_x0": False},
        "unipc",
        {"order": 3, "predict_x0": False, "lower_order_final": True},
    ),
]


def probe_peer(name: str, config: dict[str, Any], steps: int, kind: str) -> tuple[np.ndarray, peers.PeerRun]:
    """The scheduler's map and the levels it went through, both in float64 arithmetic."""
    full = {**BETAS, **config, "prediction_type": kind}
    run = peers.run_diffusers(name, full, steps, double=True)
    cls = peers.scheduler_class(name)
    with peers.float64_arithmetic(sys.modules[cls.__module__]):
        weights = probe_diffusers(cls(**full), steps, run.calls)
    return weights, run


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name, config, solver, options", PROBED, ids=str)
def test_probed_map_of_a_peer(name: str, config: dict, solver: str, options: dict, kind: str) -> None:
    pytest.importorskip("diffusers")
    for steps in (1, 4, 10, 20):
        weights, run = probe_peer(name, config, steps, kind)
        plan = peers.make_peer_plan(solver, run, **options)
        mapped = compose_plan(plan)
        if run.scaling == "ratio":  # it holds x / alpha
            mapped /= plan.alpha[1:, None]
            mapped[:, 0] *= plan.alpha[0]
        assert mapped.shape == weights.shape
        for column in range(1 + run.calls):
            assert difference(mapped[:, column], weights[:, column]) <= 1e-10, (steps, column)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_probing_shows_a_wrong_column() -> None:
    """The half second derivative of the published third order changes columns, and by how much can be read off."""
    pytest.importorskip("diffusers")
    weights, run = probe_peer("DPMSolverMultistepScheduler", {"solver_order": 3}, 20, "sample")
    strict = compose_plan(peers.make_peer_plan("dpmpp_3m", run))
    assert difference(strict, weights) > 1e-3
    assert strict.sum(1) == pytest.approx(weights.sum(1), abs=1e-10)  # x0 = c throughout gives the same from both
