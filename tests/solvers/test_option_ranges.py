"""The ends of the range of every solver's option are accepted, and mean what they say; what lies beyond is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import pydiff
from pydiff.plans import table
from tests.oracles.probing import compose_plan

EDM = pydiff.EDM()
TIMES = [80.0, 20.0, 5.0, 1.0, 0.2]


def plan(solver: str, **options: Any) -> pydiff.Plan:
    return pydiff.make_plan(solver, EDM, times=TIMES, prediction="sample", **options)


ACCEPTED = [
    *[(name, {"eta": 0.0}) for name in ("ddim", "euler_ancestral", "dpmpp_2m_sde")],
    *[(name, {"eta": 1.0}) for name in ("ddim", "euler_ancestral", "dpmpp_2m_sde")],
    *[(name, {"eta": 2.0}) for name in ("euler_ancestral", "dpmpp_2m_sde")],
    *[(name, {"s_noise": 0.0}) for name in ("euler_ancestral", "dpmpp_2m_sde")],
    *[(name, {"s_churn": 8.0, "s_noise": 0.0}) for name in ("euler", "heun")],
    *[(name, {"s_churn": 8.0, "s_tmin": 5.0, "s_tmax": 5.0}) for name in ("euler", "heun")],
    *[("unipc", {"order": order}) for order in (1, 2, 3)],
]
REFUSED = [
    *[(name, {"eta": -0.1}, "eta") for name in ("ddim", "euler_ancestral", "dpmpp_2m_sde")],
    ("ddim", {"eta": 1.1}, r"eta must be in \[0, 1\], got 1.1"),
    *[(name, {"s_noise": -0.1}, "s_noise=-0.1") for name in ("euler_ancestral", "dpmpp_2m_sde")],
    *[
        (name, {"s_churn": 8.0, **bad}, "churn needs")
        for name in ("euler", "heun")
        for bad in ({"s_churn": -1.0}, {"s_noise": -0.1}, {"s_tmin": -0.1}, {"s_tmin": 2.0, "s_tmax": 1.0})
    ],
    *[("unipc", {"order": order}, "order must be 1, 2 or 3") for order in (0, 4)],
    ("unipc", {"variant": "bh3"}, "variant must be"),
    ("ddpm", {"variance": "medium"}, "variance must be"),
    *[(name, {"nodes": "time"}, "nodes must be one of log_snr, grid") for name in ("dpmpp_2s", "dpm_solver_3")],
    *[
        (name, {"solver_type": "ralston"}, "solver_type must be")
        for name in ("dpmpp_2s", "dpmpp_2m", "dpmpp_2m_sde", "dpm_solver_2")
    ],
    *[(name, {"lower_order_final": "no"}, "lower_order_final must be") for name in ("dpmpp_2m", "dpmpp_2m_sde")],
    ("dpm_solver_2", {"method": "both"}, "method must be"),
    ("dpm_solver_3", {"solver_type": "heun"}, "solver_type 'heun' is defined for order 2"),
]

_MULTISTEP = {"solver_type": "midpoint", "lower_order_final": "auto"}
_SINGLESTEP = {"solver_type": "midpoint", "nodes": "log_snr"}
_CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
DEFAULTS: dict[str, dict[str, Any]] = {
    "ddim": {"eta": 0.0, "use_clipped_model_output": True},
    "ddpm": {"variance": "small"},
    "dpm_solver_1": {},
    "dpm_solver_2": {"method": "singlestep", **_SINGLESTEP, **_MULTISTEP},
    "dpm_solver_3": {"method": "singlestep", **_SINGLESTEP, **_MULTISTEP, "compat": False},
    "dpmpp_2m": _MULTISTEP,
    "dpmpp_2m_sde": {"eta": 1.0, "s_noise": 1.0, **_MULTISTEP},
    "dpmpp_2s": _SINGLESTEP,
    "dpmpp_3m": {**_MULTISTEP, "compat": False},
    "euler": _CHURN,
    "euler_ancestral": {"eta": 1.0, "s_noise": 1.0},
    "euler_maruyama": {"last_noise": False},
    "heun": _CHURN,
    "unipc": {"order": 2, "variant": "bh2", "corrector": True, "predict_x0": True, "lower_order_final": "auto"},
}


def test_the_defaults_are_these() -> None:
    """Samples change with them: whoever changes one says so here."""
    assert {entry.name: entry.options for entry in pydiff.list_solvers()} == DEFAULTS


@pytest.mark.parametrize(("solver", "options"), ACCEPTED, ids=str)
def test_the_ends_are_in(solver, options) -> None:
    assert np.isfinite(compose_plan(plan(solver, **options))).all()


@pytest.mark.parametrize(("solver", "options", "message"), REFUSED, ids=str)
def test_beyond_them_is_out(solver, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan(solver, **options)


@pytest.mark.parametrize(("solver", "options"), [("euler_ancestral", {}), ("dpmpp_2m_sde", {}), ("ddim", {"eta": 0.7})])
def test_without_noise_there_is_none(solver, options) -> None:
    quiet = {"eta": 0.0} if solver == "ddim" else {"s_noise": 0.0}
    assert plan(solver, **options).num_draws > 0 == plan(solver, **{**options, **quiet}).num_draws


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_churn_acts_between_its_bounds_and_on_them(solver) -> None:
    """Of the points 80, 20, 5 and 1, those that noise is added at: not at the noisiest, above which is nothing."""

    def churned(**bounds: float) -> list[float]:
        made = plan(solver, s_churn=1.0, **bounds)
        raised = [sigma for sigma in made.sigma[:-1] if not np.isclose(TIMES, sigma).any()]
        return [t for t in TIMES if any(t < s < 1.3 * t for s in raised)]

    schedule_top = 80.0 in churned()
    rest = [20.0, 5.0, 1.0]
    assert churned() == ([80.0] if schedule_top else []) + rest
    assert churned(s_tmax=20.0) == rest and churned(s_tmax=19.9) == rest[1:]
    assert churned(s_tmin=5.0, s_tmax=50.0) == rest[:2] and churned(s_tmin=5.1, s_tmax=50.0) == rest[:1]


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc"])
@pytest.mark.parametrize("steps", [14, 15])
def test_the_order_is_lowered_at_the_end_of_short_runs(solver, steps) -> None:
    """ "auto" is True below 15 steps and False from there on."""

    def made(lower: Any) -> pydiff.Plan:
        return pydiff.make_plan(solver, EDM, steps, final_sigmas_type="sigma_min", lower_order_final=lower)

    assert made("auto") == made(steps < 15) != made(steps >= 15)


def test_the_last_steps_look_back_less_and_less() -> None:
    made = pydiff.make_plan("dpmpp_3m", EDM, 8, final_sigmas_type="sigma_min", lower_order_final=True)
    reads = (made.weights[:, 0, table.SLOT : table.D] != 0).sum(1)
    assert reads.tolist() == [0, 1, 2, 2, 2, 2, 1, 0]
    free = pydiff.make_plan("dpmpp_3m", EDM, 8, final_sigmas_type="sigma_min", lower_order_final=False)
    assert (free.weights[:, 0, table.SLOT : table.D] != 0).sum(1).tolist() == [0, 1, 2, 2, 2, 2, 2, 2]


def test_the_sde_adds_noise_in_every_step_but_the_last() -> None:
    assert [plan("euler_maruyama", last_noise=last).num_draws for last in (False, True)] == [3, 4]


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_sampling_adds_no_noise_to_the_clean_end(variance) -> None:
    assert pydiff.make_plan("ddpm", EDM, times=[80.0, 9.0, 2.0, 0.0], variance=variance).num_draws == 2


def test_a_solver_says_whether_it_adds_noise_by_default() -> None:
    for entry in pydiff.list_solvers():
        assert entry.stochastic == (pydiff.make_plan(entry.name, EDM, 4).num_draws > 0), entry.name


def test_a_solver_is_summed_up_by_the_first_line_of_its_docstring() -> None:
    for entry in pydiff.list_solvers():
        assert entry.summary and entry.build.__doc__.startswith(entry.summary)


@pytest.mark.parametrize("schedule", [pydiff.VPLinear(), pydiff.RectifiedFlow()], ids=repr)
def test_a_step_of_the_sde_is_its_formula(schedule) -> None:
    """x + [g^2 score - f x] dt' + g dw over dt' = t - s, with x0 = m, so that score = (alpha m - x) / sigma^2."""
    t, s = 0.7, 0.45
    made = pydiff.make_plan("euler_maruyama", schedule, times=[t, s], prediction="sample", last_noise=True)
    f, g2, alpha, sigma = (getattr(schedule, n)(t) for n in ("drift", "diffusion_squared", "alpha", "sigma"))
    expected = [1 - (f + g2 / sigma**2) * (t - s), g2 * alpha / sigma**2 * (t - s), np.sqrt(g2 * (t - s))]
    np.testing.assert_allclose(compose_plan(made)[0], expected, rtol=1e-13)
