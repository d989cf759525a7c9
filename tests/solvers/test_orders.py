"""Deterministic solvers show the order their registry entry states, on data whose exact solution is known.

The grid is uniform in log-SNR from -1 to 3, where the model's output changes from the first step on. (From pure noise
the output hardly changes in the first steps: a first-order start then costs next to nothing, and a third-order
multistep solver measures 3 although its order is 2; see `test_strict_third_order_from_noise`.)
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

import pydiff
from pydiff.plans import table
from tests.oracles.gaussian_mixture import mixture

SETTINGS = {
    "vp_linear-epsilon": (pydiff.VPLinear(), "epsilon"),
    "vp_cosine-v": (pydiff.VPCosine(), "v_prediction"),
    "edm-sample": (pydiff.EDM(), "sample"),
    "flow-flow": (pydiff.RectifiedFlow(), "flow_prediction"),
}
METHODS = [
    ("ddim", {}),
    ("euler", {}),
    ("heun", {}),
    ("dpm_solver_1", {}),
    ("dpm_solver_2", {}),
    ("dpm_solver_3", {}),
    ("dpm_solver_2", {"solver_type": "heun"}),
    ("dpm_solver_2", {"method": "multistep"}),
    ("dpm_solver_3", {"method": "multistep"}),
    ("dpmpp_2s", {}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m", {"solver_type": "heun"}),
    ("dpmpp_3m", {}),
    ("dpmpp_2m_sde", {"eta": 0.0}),
    *[
        ("unipc", {"order": order, "variant": variant, "corrector": corrector, "predict_x0": predict_x0})
        for order in (1, 2, 3)
        for variant in ("bh1", "bh2")
        for corrector in (True, False)
        for predict_x0 in (True, False)
    ],
]
# the deterministic limit of the SDE solver is DPM-Solver++(2M)
STATED = {"dpmpp_2m_sde": 2}


@functools.cache
def problem(setting: str, low: float = -1.0, high: float = 3.0):
    """Schedule, ends of the grid, perfect model, x_T and the exact solution at the end."""
    schedule, prediction = SETTINGS[setting]
    ends = {"t_start": schedule.t_of_log_snr(low), "t_end": schedule.t_of_log_snr(high)}
    levels = [(schedule.alpha(t), schedule.sigma(t)) for t in ends.values()]
    data = mixture()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64) * math.hypot(*levels[0])
    return schedule, prediction, ends, data.model(schedule, prediction), x, data.solve_ode(x, *levels)


def error(setting: str, solver: str, steps: int, low: float = -1.0, **options) -> float:
    schedule, prediction, ends, model, x, exact = problem(setting, low)
    plan = pydiff.make_plan(
        solver, schedule, steps, grid="logsnr", prediction=prediction, final_sigmas_type="sigma_min", **ends, **options
    )
    end = pydiff.run_plan(plan, model, x, dtype=torch.float64)
    return float((end - exact).square().mean().sqrt())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("solver", "options"), METHODS, ids=str)
def test_measured_order_is_the_stated_one(setting, solver, options):
    # corrected UniPC-3 has a fourth-order part that hides the third-order one of its start until the steps are small
    steps = 640 if options.get("order") == 3 and options["corrector"] else 160
    errors = [error(setting, solver, n, **options) for n in (steps, 2 * steps)]
    stated = STATED.get(solver) or pydiff.get_solver(solver).order_of(**options)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(stated, abs=0.2)
    assert errors[1] < 3.0 ** (1 - stated) * 6e-3  # and it converges to the one exact solution


def test_a_wrong_coefficient_loses_the_order():
    """Negative control: 1 % off in the second-order term of 2M, and the measured order is 1, not 2."""
    schedule, prediction, ends, model, x, exact = problem("edm-sample")

    def broken(steps: int) -> float:
        common = dict(grid="logsnr", prediction=prediction, final_sigmas_type="sigma_min", **ends)
        first = pydiff.make_plan("ddim", schedule, steps, **common)
        plan = pydiff.make_plan("dpmpp_2m", schedule, steps, **common)
        coefficients = plan.coefficients.copy()
        coefficients[:, table.D] = 0.99 * coefficients[:, table.D] + 0.01 * first.coefficients[:, table.D]
        coefficients[:, table.SLOT] *= 0.99
        wrong = dataclasses.replace(plan, coefficients=coefficients)
        end = pydiff.run_plan(wrong, model, x, dtype=torch.float64)
        return float((end - exact).square().mean().sqrt())

    assert math.log2(broken(320) / broken(640)) < 1.3


def test_strict_third_order_from_noise():
    """From pure noise the strict 3M measures order 3; diffusers' coefficients (half the second derivative) 2."""
    strict = [error("vp_linear-epsilon", "dpmpp_3m", n, low=-5.0) for n in (160, 320)]
    compat = [error("vp_linear-epsilon", "dpmpp_3m", n, low=-5.0, compat=True) for n in (160, 320)]
    assert math.log2(strict[0] / strict[1]) > 2.8
    assert math.log2(compat[0] / compat[1]) < 2.2
    assert strict[1] < compat[1] / 8


def test_higher_order_is_better_at_equal_calls():
    """What users come for: at 20 calls from noise the best multistep solvers beat DDIM by more than an order."""
    errors = {name: error("vp_linear-epsilon", name, 20, low=-5.0) for name in ("ddim", "dpmpp_2m", "unipc")}
    assert errors["dpmpp_2m"] < errors["ddim"] / 5
    assert errors["unipc"] < errors["ddim"] / 5


def test_oracle_solution_is_exact_on_a_single_gaussian():
    """The reference itself: for one Gaussian the ODE's solution is x_T rescaled by the standard deviations."""
    data = mixture(components=1)
    schedule = pydiff.VPLinear()
    levels = [(schedule.alpha(t), schedule.sigma(t)) for t in (1.0, 1e-3)]
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    stds = [math.hypot(a * data.stds[0], s) for a, s in levels]
    mean = [a * torch.as_tensor(data.mean) for a, _ in levels]
    expected = mean[1] + (x - mean[0]) * (stds[1] / stds[0])
    np.testing.assert_allclose(data.solve_ode(x, *levels), expected, atol=1e-10)
