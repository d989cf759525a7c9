"""Plans that start where alpha is 0 and the log-SNR -inf: the first step is of first order, and leaves no history.

So a plan from pure noise is its first step, known in closed form, followed by the same solver started anew one point
later. Both are compared as linear maps (`probing.compose_plan`), number by number. That the closed form is the limit
of a start at a small alpha, and that whole runs reach the solution of the ODE, is checked apart from it.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import pydiff
from tests.oracles.gaussian_mixture import GaussianMixture, mixture
from tests.oracles.probing import compose_plan
from tests.solvers.test_orders import METHODS

STARTS = {
    "zero_snr": (pydiff.DiscreteBetas.named("linear", rescale_betas_zero_snr=True), [999.0, 820.0, 610.5, 400.0, 90.0]),
    "cosine": (pydiff.VPCosine(), [1.0, 0.8, 0.55, 0.3, 0.04]),
    "flow": (pydiff.RectifiedFlow(), [1.0, 0.85, 0.6, 0.3, 0.05]),
}
DETERMINISTIC = [
    *METHODS,
    *[("unipc", {"order": order, "lower_order_final": False}) for order in (2, 3)],
    *[("dpm_solver_2", {"method": "multistep", "solver_type": "heun"}), ("dpm_solver_3", {"nodes": "grid"})],
    *[("dpm_solver_2", {"nodes": "grid"}), ("dpmpp_2s", {"nodes": "grid"}), ("dpmpp_2s", {"solver_type": "heun"})],
    *[(name, {"compat": True, **multistep}) for name, multistep in (("dpmpp_3m", {}), ("dpm_solver_3", METHODS[8][1]))],
    *[(name, {"lower_order_final": False}) for name in ("dpmpp_2m", "dpmpp_3m")],
    *[("dpmpp_3m", {"solver_type": "heun"}), ("ddim", {"use_clipped_model_output": False})],
    *[(name, {"s_churn": 9.0, "s_tmax": 0.0}) for name in ("euler", "heun")],
    *[("euler_ancestral", {"eta": 0.0})],
]
STOCHASTIC = [
    *[("ddpm", {"variance": variance}) for variance in ("small", "large")],
    *[("ddim", {"eta": eta, "use_clipped_model_output": clipped}) for eta in (0.3, 1.0) for clipped in (True, False)],
    *[("euler_ancestral", {"eta": eta, "s_noise": s_noise}) for eta, s_noise in ((1.0, 1.0), (0.4, 1.0), (1.0, 0.9))],
    *[("dpmpp_2m_sde", {"eta": eta, "solver_type": kind}) for eta in (0.3, 1.0) for kind in ("midpoint", "heun")],
]
ONE_CALL = [
    (solver, options)
    for solver, options in [*DETERMINISTIC, *STOCHASTIC]
    if len(pydiff.make_plan(solver, steps=1, **options)) == 1
]


class FirstStep(NamedTuple):
    """Weights of x_T, of the x0 told at the start, of that at the next call, and of a draw, in x after the step."""

    x: float
    first: float
    second: float
    noise: float


def first_step(solver: str, options: dict[str, Any], start: tuple[float, float], end: tuple[float, float]) -> FirstStep:
    """From pure noise x_T = sigma e: DDIM keeps the noise's direction, others replace a part eta of it by a draw."""
    (_, sigma_s), (alpha, sigma) = start, end
    eta = {"ddpm": 1.0, "euler_ancestral": 1.0, "dpmpp_2m_sde": 1.0}.get(solver, 0.0)
    eta = options.get("eta", eta)
    fresh = eta
    if solver == "dpmpp_2m_sde":  # the noise is forgotten at the rate eta h, and h is infinite
        fresh = float(eta > 0)
    kept = math.sqrt(1.0 - fresh**2)
    # the bh2 corrector of an infinite step, B(-inf) = -1: half of what x0 changed by
    halves = solver == "unipc" and options.get("corrector", True) and options.get("variant", "bh2") == "bh2"
    half = 0.5 * alpha if halves and options.get("predict_x0", True) else 0.0
    std = sigma_s if options.get("variance") == "large" else sigma  # large: that of the forward step
    return FirstStep(kept * sigma / sigma_s, alpha - half, half, fresh * std * options.get("s_noise", 1.0))


def joined_map(plan: pydiff.Plan, rest: pydiff.Plan, step: FirstStep) -> np.ndarray:
    """The map of `step` followed by `rest`, laid out as that of `plan`: x_T, every model output (x0), every draw."""
    calls, draws = len(plan), plan.num_draws
    after = np.zeros(1 + calls + draws)
    after[:3] = step.x, step.first, step.second
    own = int(step.noise != 0)
    after[1 + calls : 1 + calls + own] = step.noise
    inner = compose_plan(rest)
    result = np.outer(inner[:, 0], after)
    result[:, 2 : 1 + calls] += inner[:, 1 : 1 + len(rest)]
    result[:, 1 + calls + own :] += inner[:, 1 + len(rest) :]
    return result


def levels(schedule: pydiff.NoiseSchedule, t: float) -> tuple[float, float]:
    return schedule.alpha(t), schedule.sigma(t)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("solver", "options"), [*DETERMINISTIC, *STOCHASTIC], ids=str)
def test_the_first_step_is_of_first_order_and_no_history(solver, options, start) -> None:
    schedule, times = STARTS[start]
    assert schedule.alpha(times[0]) == 0
    plan = first_step_and_rest(solver, options, schedule, times)
    if "epsilon" not in plan.targets:  # what integrates epsilon ends above sigma = 0
        first_step_and_rest(solver, options, schedule, [*times, schedule.clean_time])


def first_step_and_rest(
    solver: str, options: dict[str, Any], schedule: pydiff.NoiseSchedule, times: list[float]
) -> pydiff.Plan:
    """The plan from pure noise, once it is seen to be what the closed form says, and then that of the later times."""
    plan, rest = (
        pydiff.make_plan(solver, schedule, times=t, prediction="sample", **options) for t in (times, times[1:])
    )
    step = first_step(solver, options, levels(schedule, times[0]), levels(schedule, times[1]))
    assert len(plan) == 1 + len(rest) and plan.num_draws == (step.noise != 0) + rest.num_draws
    found = compose_plan(plan)
    alone = np.zeros(found.shape[1])
    alone[:2] = step.x, step.first + step.second  # what a corrector takes back is still there
    if step.noise:
        alone[1 + len(plan)] = step.noise
    np.testing.assert_allclose(found[0], alone, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found[1:], joined_map(plan, rest, step), rtol=1e-11, atol=1e-13)
    return plan


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("solver", "options"), ONE_CALL, ids=str)
def test_one_step_from_a_small_alpha_tends_to_it(solver, options, start) -> None:
    """Solvers of one call a step; in the others the inner points go to infinity with the start."""
    schedule, times = STARTS[start]
    near = schedule.t_of_log_snr(math.log(1e-8))
    ratio = schedule.alpha(near) / schedule.alpha(times[1])
    assert 0 < ratio < 1e-6
    limit, close = (
        pydiff.make_plan(solver, schedule, times=[t, times[1]], prediction="sample", **options)
        for t in (times[0], near)
    )
    # the noise is forgotten as exp(-eta h), everything else of the start as exp(-h), which is the ratio
    rounding = 1e-15 / schedule.alpha(near)  # of an x0 that is told by epsilon
    rate = options["eta"] if solver == "dpmpp_2m_sde" and options["eta"] else 1.0
    np.testing.assert_allclose(compose_plan(close), compose_plan(limit), rtol=0, atol=2 * ratio**rate + rounding)


@pytest.mark.parametrize("start", STARTS)
def test_the_corrector_of_the_infinite_step_is_the_limit_of_finite_ones(start) -> None:
    schedule, times = STARTS[start]
    near = schedule.t_of_log_snr(math.log(1e-8))
    limit, close = (
        compose_plan(pydiff.make_plan("unipc", schedule, times=[t, *times[1:3]], prediction="sample", order=1))
        for t in (times[0], near)
    )
    assert abs(limit[1, 1]) > 0.01  # the corrector leaves something of the first output
    np.testing.assert_allclose(close, limit, rtol=0, atol=1e-6)


@functools.cache
def problem(start: str) -> tuple[GaussianMixture, torch.Tensor, torch.Tensor]:
    """Data, x_T, and where the ODE leads from there: at first along the mean of the data, which is all x0 then is."""
    schedule, times = STARTS[start]
    data = mixture()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    early, late = (levels(schedule, t) for t in (schedule.t_of_log_snr(-16.0), times[-1]))
    return data, x, data.solve_ode(early[1] * x + early[0] * torch.as_tensor(data.mean), early, late)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("solver", "options"), DETERMINISTIC, ids=str)
def test_runs_from_pure_noise_reach_the_exact_solution(solver, options, start) -> None:
    """With nodes even in t, the first of which is at pure noise: its error falls like that of the others."""
    schedule, times = STARTS[start]
    data, x, exact = problem(start)

    def error(steps: int, prediction: str) -> float:
        nodes = np.linspace(times[0], times[-1], steps + 1)
        plan = pydiff.make_plan(solver, schedule, times=nodes, prediction=prediction, **options)
        end = pydiff.run_plan(plan, data.model(schedule, prediction), x, dtype=torch.float64)
        return float((end - exact).square().mean().sqrt())

    coarse, fine = (error(steps, "sample") for steps in (24, 48))
    assert fine < 0.1 and math.log2(coarse / fine) > 0.7
    for prediction in ("v_prediction", "flow_prediction"):
        assert error(24, prediction) == pytest.approx(coarse, rel=1e-7)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("prediction", ["epsilon", "score"])
def test_a_model_that_tells_nothing_of_x0_cannot_start_there(prediction, start) -> None:
    schedule, times = STARTS[start]
    for solver, options in [*DETERMINISTIC, *STOCHASTIC]:
        with pytest.raises(ValueError, match="cannot start at zero terminal SNR; use a v_prediction model or start"):
            pydiff.make_plan(solver, schedule, times=times, prediction=prediction, **options)


@pytest.mark.parametrize("start", STARTS)
def test_where_the_sde_has_no_coefficients_it_is_refused(start) -> None:
    schedule, times = STARTS[start]
    with pytest.raises(ValueError, match="is infinite at t = .*; start below"):
        pydiff.make_plan("euler_maruyama", schedule, times=times, prediction="v_prediction")


@pytest.mark.parametrize("start", STARTS)
def test_the_preconditioned_model_has_no_time_there(start) -> None:
    schedule, times = STARTS[start]
    with pytest.raises(ValueError, match=r"the model has no time ln\(sigma/alpha\)/4 at alpha = 0"):
        pydiff.make_plan("ddim", schedule, times=times, prediction=pydiff.EDMPrecond())
