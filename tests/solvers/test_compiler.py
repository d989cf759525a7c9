"""From names and numbers to a checked plan: consistency of every solver, options, guidance, times."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import pydiff
from pydiff.plans import table
from pydiff.plans.base import PlanError
from pydiff.plans.consistency import check_mean, mean_defect
from pydiff.schedules.prediction import list_predictions
from pydiff.solvers import registry
from pydiff.solvers.compiler import make_plan
from pydiff.solvers.registry import Solver, get_solver

SOLVERS = [s.name for s in pydiff.list_solvers()]
EXACT = [s.name for s in pydiff.list_solvers() if s.exact_mean]
DISCRETE = pydiff.DiscreteBetas.named("scaled_linear", 1000, 0.00085, 0.012)
ZERO_SNR = pydiff.DiscreteBetas.named("linear", rescale_betas_zero_snr=True)
SCHEDULES = [
    pydiff.VPLinear(),
    pydiff.VPCosine(),
    DISCRETE,
    pydiff.VE(),
    pydiff.EDM(),
    pydiff.RectifiedFlow(),
    pydiff.RectifiedFlow(3.0),
    pydiff.FromLogSNR(pydiff.VPLinear().log_snr),
]
OPTIONS = [
    ("ddim", {"eta": 1.0}),
    ("ddim", {"eta": 0.3, "use_clipped_model_output": False}),
    ("ddim", {"use_clipped_model_output": False}),
    ("ddpm", {"variance": "large"}),
    ("heun", {"s_churn": 20.0}),
    ("euler", {"s_churn": 20.0}),
    ("dpm_solver_2", {"nodes": "grid"}),
    ("dpm_solver_2", {"method": "multistep", "solver_type": "heun"}),
    ("dpm_solver_3", {"nodes": "grid"}),
    ("dpm_solver_3", {"method": "multistep", "compat": True}),
    ("dpmpp_2s", {"nodes": "grid"}),
    ("dpmpp_3m", {"compat": True, "solver_type": "heun"}),
    ("dpmpp_2m_sde", {"eta": 0.5, "solver_type": "heun"}),
    ("unipc", {"order": 3, "variant": "bh1"}),
    ("unipc", {"order": 1}),
    ("unipc", {"corrector": False}),
    ("unipc", {"order": 3, "predict_x0": False}),
]


def compile_at(solver, schedule, steps=7, **options):
    """A plan that starts below pure noise, from where every prediction can be converted."""
    start = 0.98 if isinstance(schedule, pydiff.RectifiedFlow) else None
    return make_plan(solver, schedule, steps, t_start=start, **options)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("solver", EXACT)
def test_data_at_one_point_is_hit_exactly(solver, schedule) -> None:
    for prediction in list_predictions():
        assert mean_defect(compile_at(solver, schedule, prediction=prediction)) < 1e-14


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(
    "solver, options", OPTIONS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_and_with_every_option(solver, options, schedule) -> None:
    for steps in (1, 5, 20):
        # x at alpha = 0.0085 is divided by alpha twice: 1e-16 / alpha^2 is 1.4e-12
        assert mean_defect(compile_at(solver, schedule, steps, **options)) < 2e-12


def with_coefficient(plan, stage, column, change):
    coefficients = plan.coefficients.copy()
    coefficients[stage, column] += change
    return replace(plan, coefficients=coefficients)


@pytest.mark.parametrize("schedule", [pydiff.VPLinear(), pydiff.EDM()], ids=repr)
@pytest.mark.parametrize("solver", EXACT)
def test_one_wrong_coefficient_is_noticed(solver, schedule) -> None:
    plan = make_plan(solver, schedule, 6)
    check_mean(plan)
    used = np.flatnonzero(plan.coefficients[-1, : table.NUM_OPERANDS])
    with pytest.raises(PlanError, match=f"{solver}: the coefficients are inconsistent"):
        check_mean(with_coefficient(plan, -1, used[0], 1e-6))


def test_a_wrong_amount_of_noise_is_noticed() -> None:
    """From pure noise the weight of x carries no mean."""
    wrong = with_coefficient(make_plan("ddim", ZERO_SNR, 6, prediction="v_prediction"), 0, table.X, 1e-6)
    check_mean(wrong, noise=False)
    with pytest.raises(PlanError, match="inconsistent"):
        check_mean(wrong)


def distance_to_the_path(plan) -> float:
    """How far x strays from alpha * c + sigma * e at any call, for data at the point c and initial noise e.

    With no further noise (and e = 0 for solvers that add some) every exact solver stays on that line.
    """
    c, e = 0.7, 0.0 if plan.stochastic else 1.3
    x = torch.full((1, 1), plan.alpha[0] * c + plan.sigma[0] * e, dtype=torch.float64)
    _, path = pydiff.run_plan(
        plan,
        lambda x, t: torch.full_like(x, c),
        x,
        noise=torch.zeros(plan.num_draws, 1, 1),
        dtype=torch.float64,
        return_trajectory=True,
    )
    expected = plan.alpha * c + plan.sigma * e
    return float((np.abs(path.flatten().numpy() - expected) / (1 + np.abs(expected))).max())


@pytest.mark.parametrize("schedule", [pydiff.VPLinear(), pydiff.EDM(), DISCRETE], ids=repr)
@pytest.mark.parametrize("solver", EXACT)
def test_data_at_one_point_is_followed_at_every_call(solver, schedule) -> None:
    plan = make_plan(solver, schedule, 6, prediction="sample")
    assert distance_to_the_path(plan) < 1e-12
    for stage in range(len(plan)):
        for column in np.flatnonzero(plan.coefficients[stage, : table.Z0]):
            assert distance_to_the_path(with_coefficient(plan, stage, column, 1e-3)) > 1e-7


def test_an_inconsistent_solver_does_not_compile(monkeypatch) -> None:
    monkeypatch.setattr(registry, "_SOLVERS", dict(registry._SOLVERS))

    @registry.solver("wrong", order=1, calls="1", paper="none")
    def wrong(b):
        for s, t in zip(b.points, b.points[1:], strict=False):
            b.write(x=(t.sigma / s.sigma) * b.x + t.alpha * b.call(s))

    assert pydiff.get_solver("wrong").build is wrong
    with pytest.raises(ValueError, match="solver 'wrong' is registered twice"):
        registry.solver("wrong", order=1, calls="1", paper="none")(wrong)
    with pytest.raises(PlanError, match="wrong: the coefficients are inconsistent"):
        make_plan("wrong", steps=5)

    @registry.solver("too much noise", order=1, calls="1", paper="none")
    def too_much_noise(b):
        for s, t in zip(b.points, b.points[1:], strict=False):
            b.write(x=(1.01 * t.sigma / s.sigma) * b.x + (t.alpha - 1.01 * t.sigma * s.alpha / s.sigma) * b.call(s))

    with pytest.raises(PlanError, match="too much noise: the coefficients are inconsistent"):
        make_plan("too much noise", steps=5)


@pytest.mark.parametrize("schedule", [pydiff.VPCosine(), pydiff.RectifiedFlow()], ids=repr)
def test_rounding_at_a_start_near_pure_noise_is_no_fault(schedule) -> None:
    """x is divided by a small alpha there, twice: 1e-16 becomes 1e-8 and more in a plan whose formulas are right."""
    plan = make_plan("unipc", schedule, 5, t_start=schedule.t_of_log_snr(-12.0), predict_x0=False)
    with pytest.raises(PlanError, match="inconsistent"):
        check_mean(with_coefficient(plan, -1, table.X, 1e-2))


@pytest.mark.parametrize("start", [ZERO_SNR, pydiff.RectifiedFlow()], ids=repr)
@pytest.mark.parametrize("solver", EXACT)
def test_pure_noise_is_a_possible_start(solver, start) -> None:
    for prediction in ("v_prediction", "sample", "flow_prediction"):
        plan = make_plan(solver, start, 6, prediction=prediction)
        assert plan.alpha[0] == 0 and mean_defect(plan) < 1e-14


def documented_calls(entry: Solver, steps: int, clean_end: bool) -> int:
    each = int(entry.calls[0])
    return each * steps - (each - 1 if clean_end else 0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_plan_is_as_long_as_the_registry_says(solver) -> None:
    for steps in (1, 2, 9):
        for schedule, clean_end in ((pydiff.VPLinear(), False), (pydiff.EDM(), True)):
            plan = make_plan(solver, schedule, steps)
            calls = []
            pydiff.run_plan(plan, lambda x, t, calls=calls: calls.append(t) or x, torch.zeros(1, 2), check_finite=False)
            assert len(calls) == len(plan) == documented_calls(get_solver(solver), steps, clean_end)
            assert len(plan.times) == steps + 1 and plan.stochastic == (
                get_solver(solver).stochastic and steps > clean_end and plan.num_draws > 0
            )


def test_grid_nodes_cost_one_call_each() -> None:
    for solver in ("dpm_solver_2", "dpm_solver_3", "dpmpp_2s"):
        assert [len(make_plan(solver, steps=n, nodes="grid")) for n in (1, 4, 5, 6)] == [1, 4, 5, 6]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_model_is_told_the_time_of_the_schedule(schedule) -> None:
    told = []
    plan = compile_at("dpmpp_2m", schedule, prediction="v_prediction")
    pydiff.run_plan(plan, lambda x, t: told.append(t.clone()) or 0 * x, torch.zeros(2, 3), dtype=torch.float64)
    np.testing.assert_array_equal(torch.stack(told).numpy(), np.stack([plan.times[:-1]] * 2, 1))
    np.testing.assert_array_equal(plan.alpha, schedule.alpha(plan.times))
    np.testing.assert_array_equal(plan.sigma, schedule.sigma(plan.times))


def test_index_times_and_preconditioned_times() -> None:
    assert make_plan("ddim", DISCRETE, 4, grid="trailing").model_times.tolist() == [999, 749, 499, 249]
    plan = make_plan("heun", pydiff.EDM(), 3, prediction=pydiff.EDMPrecond(sigma_data=0.5))
    sigma = plan.sigma[:-1]
    np.testing.assert_allclose(plan.model_times, np.log(sigma) / 4, rtol=1e-15)
    np.testing.assert_allclose(plan.coefficients[:, table.INPUT_SCALE], 1 / np.hypot(sigma, 0.5), rtol=1e-15)
    assert (make_plan("ddim", steps=3).coefficients[:, table.INPUT_SCALE] == 1).all()


def test_guidance_as_number_list_and_function() -> None:
    plan = make_plan("ddim", steps=4)
    assert not plan.guided and make_plan("ddim", steps=4, guidance_scale=1.0) == plan
    scales = make_plan("ddim", steps=4, guidance_scale=[1, 2, 3, 1]).coefficients[:, table.GUIDANCE]
    assert scales.tolist() == [1, 2, 3, 1]
    number = make_plan("ddim", steps=4, guidance_scale=5)
    assert number.guided and (number.coefficients[:, table.GUIDANCE] == 5).all() and number == plan.with_guidance(5)
    interval = make_plan("ddim", steps=4, guidance_scale=lambda t: 3.0 if 0.3 < t < 0.8 else 1.0)
    assert interval.guided
    inside = (plan.model_times > 0.3) & (plan.model_times < 0.8)
    assert inside.any() and (interval.coefficients[:, table.GUIDANCE] == np.where(inside, 3.0, 1.0)).all()


def test_clip_bounds_the_estimated_sample() -> None:
    for clip, bounds in (
        (None, (-math.inf, math.inf)),
        (1.5, (-1.5, 1.5)),
        ((-1, 2), (-1, 2)),
        (math.inf, (-math.inf, math.inf)),
    ):
        columns = make_plan("ddim", steps=2, clip=clip).coefficients[:, table.CLIP : table.CLIP + 2]
        assert (columns == bounds).all()
    clipped = pydiff.run_plan(
        make_plan("ddim", pydiff.EDM(), 3, prediction="sample", clip=1), lambda x, t: x, torch.full((1, 4), 80.0)
    )
    assert (clipped == 1).all()


def test_sigmas_stand_for_times() -> None:
    np.testing.assert_allclose(make_plan("ddim", pydiff.EDM(), sigmas=[80, 4, 0]).times, [80, 4, 0], rtol=1e-14)
    vp = make_plan("ddim", sigmas=[10.0, 1.0, 0.1])
    np.testing.assert_allclose(vp.sigma / vp.alpha, [10.0, 1.0, 0.1], rtol=1e-12)
    assert make_plan("ddim", pydiff.EDM(), sigmas=[80, 4, 0]).init_std == pydiff.EDM().init_std(80) > 79
    assert make_plan("ddim", steps=2, times=[1.0, 0.5, 0.1]) == make_plan("ddim", times=[1.0, 0.5, 0.1])


def test_the_config_says_how_it_was_compiled() -> None:
    plan = make_plan("ddim", DISCRETE, 3, grid="trailing", eta=0.5, prediction="v_prediction")
    assert plan.config["options"] == {"eta": 0.5} and plan.config["grid"] == "trailing"
    assert pydiff.NoiseSchedule.from_dict(plan.config["schedule"]) == DISCRETE
    assert pydiff.Prediction.from_dict(plan.config["prediction"]) == pydiff.get_prediction("v_prediction")
    own = make_plan("ddim", pydiff.FromLogSNR(pydiff.VPLinear().log_snr), 3)  # a function has no description
    own.to_dict()
    assert "FromLogSNR" in str(own.config["schedule"])
    for nodes in ({"times": [0.9, 0.1]}, {"sigmas": [9.0, 1.0]}):
        assert make_plan("ddim", **nodes).config["grid"] == "times"
