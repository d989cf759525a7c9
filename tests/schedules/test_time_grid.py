"""Time grids: their defining spacing, their ends, and the numbers of diffusers and k-diffusion."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiff.schedules import grid_nodes
from pydiff.schedules.closed_form import EDM, VE, DiscreteBetas, RectifiedFlow, VPCosine, VPLinear
from pydiff.schedules.from_callable import FromLogSNR
from pydiff.schedules.from_config import from_diffusers_config
from pydiff.schedules.prediction import EDMPrecond
from pydiff.schedules.time_grid import check_times, list_grids, make_times
from pydiff.solvers.compiler import make_plan

DISCRETE = DiscreteBetas.named("scaled_linear", 1000, 0.00085, 0.012)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = [
    VPLinear(),
    VPCosine(),
    DISCRETE,
    VE(),
    EDM(),
    RectifiedFlow(),
    RectifiedFlow(3.0),
    FromLogSNR(VPLinear().log_snr),
]
INDEX_GRIDS = ["linspace", "leading", "trailing"]
RATIO_GRIDS = ["logsnr", "karras", "exponential"]


def read_config(scheduler, **options):
    """The config as it is saved, which unlike the one in memory holds the class name."""
    return from_diffusers_config({**scheduler.config, "_class_name": type(scheduler).__name__}, **options)


def ratio(schedule, times):
    return np.exp(-schedule.log_snr(times))


@given(
    schedule=st.sampled_from(SCHEDULES),
    grid=st.sampled_from(list_grids()),
    steps=st.integers(1, 60),
    final=st.sampled_from(["zero", "sigma_min"]),
)
@settings(max_examples=200, deadline=None)
def test_every_grid_is_valid_or_refused_with_a_reason(schedule, grid, steps, final) -> None:
    start = 0.999 if isinstance(schedule, RectifiedFlow) and grid in RATIO_GRIDS else None
    if grid in INDEX_GRIDS and schedule is not DISCRETE:
        with pytest.raises(ValueError, match="needs a DiscreteBetas schedule"):
            make_times(schedule, steps, grid, final_sigmas_type=final)
        return
    if grid == "leading" and final == "sigma_min":
        with pytest.raises(ValueError, match="do not decrease"):
            make_times(schedule, steps, grid, final_sigmas_type=final)
        return
    times = make_times(schedule, steps, grid, final_sigmas_type=final, t_start=start)
    assert times.shape == (steps + 1,) and times.dtype == np.float64
    np.testing.assert_array_equal(check_times(schedule, times), times)
    assert times[-1] == (schedule.clean_time if final == "zero" else schedule.t_end)
    if grid != "leading":
        assert times[0] == (schedule.t_start if start is None else start)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_defaults_come_from_the_schedule(schedule) -> None:
    times = make_times(schedule, 8)
    explicit = make_times(schedule, 8, schedule.default_grid, final_sigmas_type=schedule.final_sigmas_type)
    np.testing.assert_array_equal(times, explicit)
    assert times[-1] == (schedule.clean_time if schedule.final_sigmas_type == "zero" else schedule.t_end)


def test_each_spacing_is_even_where_it_says() -> None:
    schedule = VPLinear()

    def spread(grid: str, axis, **options) -> float:
        gaps = np.diff(axis(make_times(schedule, 17, grid, **options)))
        return float(np.ptp(gaps) / np.abs(gaps).mean())

    axes = {
        "uniform": lambda t: t,
        "sgm_uniform": lambda t: t,
        "quadratic": np.sqrt,
        "logsnr": schedule.log_snr,
        "exponential": schedule.log_snr,
        "karras": lambda t: ratio(schedule, t) ** (1 / 7),
    }
    for grid, axis in axes.items():
        assert spread(grid, axis) < 1e-10, grid
    for rho in (0.5, 1.0, 3.0):
        assert spread("karras", lambda t: ratio(schedule, t) ** (1 / rho), rho=rho) < 1e-10  # noqa: B023
    # Negative control: the wrong axis is far from even.
    assert spread("karras", axes["logsnr"]) > 0.1
    assert spread("uniform", np.sqrt) > 0.1
    indices = make_times(DISCRETE, 17, "quadratic")[:-1]
    np.testing.assert_allclose(np.sqrt(indices + 1), np.linspace(np.sqrt(1000), 1, 17), rtol=1e-12)


def test_flow_grids() -> None:
    np.testing.assert_allclose(make_times(RectifiedFlow(), 4), [1, 0.75, 0.5, 0.25, 0], atol=1e-15)
    for flow in map(RectifiedFlow, (0.5, 2.0, 3.0)):
        np.testing.assert_allclose(make_times(flow, 4), flow.shift_time(np.linspace(1, 0, 5)), atol=1e-15)
    ended = make_times(flow, 4, t_end=0.01)
    assert ended[-2:].tolist() == [0.01, 0.0] and ended.size == 5


@pytest.mark.parametrize("grid", [g for g in list_grids() if g not in INDEX_GRIDS])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_both_ends_may_lie_between_indices_and_anywhere_else(schedule, grid) -> None:
    start, end = (schedule.t_of_log_snr(level) for level in (-1.9, 2.1))
    assert start % 1 and end % 1
    for n in (1, 2, 7):
        ends = {"t_start": start, "t_end": end}
        noisy = make_times(schedule, n, grid, final_sigmas_type="sigma_min", **ends)
        clean = make_times(schedule, n, grid, final_sigmas_type="zero", **ends)
        assert (noisy[0], noisy[-1], noisy.size) == (start, end, n + 1)
        assert (clean[0], clean[-1], clean.size) == (start, schedule.clean_time, n + 1)
        if n > 1 and grid != "sgm_uniform":  # whose clean time takes the place of t_end
            assert clean[-2] == end
            np.testing.assert_array_equal(
                clean[:-1], make_times(schedule, n - 1, grid, final_sigmas_type="sigma_min", **ends)
            )
        for final, times in (("sigma_min", noisy), ("zero", clean)):
            plan = make_plan("ddim", schedule, n, grid=grid, final_sigmas_type=final, **ends)
            np.testing.assert_array_equal(plan.times, times)
            np.testing.assert_array_equal(plan.alpha, schedule.alpha(times))


def test_one_end_alone_may_be_given() -> None:
    for ends in ({"t_start": 640.25}, {"t_end": 3.5}):
        times = make_times(DISCRETE, 5, "karras", **ends)
        assert (times[0], times[-2]) == (ends.get("t_start", 999.0), ends.get("t_end", DISCRETE.t_end))


def test_whole_ends_of_an_index_grid() -> None:
    ends = {"t_start": 700.0, "t_end": 100.0}
    assert make_times(DISCRETE, 3, "linspace", **ends).tolist() == [700, 400, 100, -1]
    assert make_times(DISCRETE, 3, "linspace", final_sigmas_type="sigma_min", **ends).tolist() == [700, 500, 300, 100]
    ends = {"t_end": 100.0, "final_sigmas_type": "sigma_min"}
    assert make_times(DISCRETE, 4, "trailing", **ends).tolist() == [999, 749, 499, 249, 100]


def test_index_grids_of_one_step_and_of_all() -> None:
    for grid, first in zip(INDEX_GRIDS, (999, 0, 999), strict=True):
        assert make_times(DISCRETE, 1, grid).tolist() == [first, -1]
        assert make_times(DISCRETE, 1000, grid).tolist() == list(range(999, -2, -1))
    assert make_times(DISCRETE, 2, "linspace").tolist() == [999, 0, -1]


def test_a_grid_of_ones_own_is_checked(monkeypatch) -> None:
    monkeypatch.setattr(grid_nodes, "_GRIDS", dict(grid_nodes._GRIDS))

    @grid_nodes.register_grid("own")
    def own(schedule, n, t_start, t_end, *, beyond=0.0):
        return np.linspace(t_start, t_end - beyond, n)

    options = {"t_end": 0.5, "final_sigmas_type": "sigma_min"}
    assert make_times(VPLinear(), 2, "own", **options).tolist() == [1.0, 0.75, 0.5]
    with pytest.raises(ValueError, match=r"runs from 1 to -0.5, outside \[0, 1\]"):
        make_times(VPLinear(), 2, "own", beyond=1.0, **options)


@pytest.mark.parametrize("grid", ["karras", "exponential", "beta"])
def test_a_span_starts_where_the_index_grid_does(grid: str) -> None:
    for span in INDEX_GRIDS:
        times, indices = make_times(DISCRETE, 10, grid, span=span), make_times(DISCRETE, 10, span)
        assert (times[0], *times[-2:]) == (indices[0], *indices[-2:])
    assert make_times(DISCRETE, 10, grid, span="leading", steps_offset=1)[[0, -2]].tolist() == [901, 1]


def test_beta_grid_is_the_quantile_function() -> None:
    stats = pytest.importorskip("scipy.stats")
    times = make_times(DISCRETE, 9, "beta", alpha=0.5, beta=0.7)[:-1]
    np.testing.assert_allclose(stats.beta.cdf(times / 999, 0.5, 0.7), np.linspace(1, 0, 9), atol=1e-9)


def test_beta_without_scipy_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ImportError, match=r"pip install 'pydiff\[scipy\]'"):
        make_times(DISCRETE, 9, "beta")


# Number by number against diffusers.

COUNTS = [2, 3, 5, 7, 10, 20, 25, 30, 33, 48, 50, 77, 100, 123, 250, 333, 499]
SAME_SPACING = {
    "DDIMScheduler": {},
    "DPMSolverMultistepScheduler": {"drop_last": True},
    "EulerDiscreteScheduler": {"integers": False},
}


@pytest.mark.parametrize("spacing", INDEX_GRIDS)
@pytest.mark.parametrize("name", SAME_SPACING)
def test_index_grids_match_set_timesteps(name: str, spacing: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    offset = 1 if spacing == "leading" else 0
    scheduler = getattr(diffusers, name)(timestep_spacing=spacing, steps_offset=offset, **SD)
    accepted = {"linspace": {"drop_last", "integers"}, "leading": {"drop_last", "steps_offset"}, "trailing": set()}
    options = {**SAME_SPACING[name], "steps_offset": offset}
    options = {key: value for key, value in options.items() if key in accepted[spacing]}
    for n in COUNTS:
        scheduler.set_timesteps(n)
        # For n = 499 their trailing spacing rounds to one timestep too many.
        expected = scheduler.timesteps.numpy().astype(np.float64)[:n]
        times = make_times(DISCRETE, n, spacing, final_sigmas_type="zero", **options)
        # Euler's fractional indices are float32; everything else is whole and equal.
        np.testing.assert_allclose(times[:-1], expected, rtol=1e-6 if name.startswith("Euler") else 0)
        assert times[-1] == -1.0


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("spacing", INDEX_GRIDS)
def test_sigma_grids_match_euler(kind: str, spacing: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    flag = {f"use_{kind}_sigmas": True}
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing=spacing, steps_offset=1, **SD, **flag)
    schedule, prediction, options = read_config(scheduler)
    assert schedule == DISCRETE and prediction == "epsilon" and options["grid"] == kind
    for n in (2, 5, 20, 50, 99):
        scheduler.set_timesteps(n)
        times = make_times(schedule, n, **options)
        # Their betas are float32, which leaves 1e-5 in the smallest sigmas.
        np.testing.assert_allclose(ratio(schedule, times), scheduler.sigmas.numpy(), rtol=3e-5, atol=1e-7)


def test_karras_and_exponential_match_k_diffusion() -> None:
    n, low, high, rho = 13, 0.03, 14.6, 7.0
    ramp = np.linspace(0, 1, n)
    karras = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    exponential = np.exp(np.linspace(np.log(high), np.log(low), n))
    schedule = VE(low, high)
    np.testing.assert_allclose(make_times(schedule, n, "karras"), [*karras, 0.0], rtol=1e-13)
    np.testing.assert_allclose(make_times(schedule, n, "exponential"), [*exponential, 0.0], rtol=1e-13)


CONFIGS = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIMScheduler", {"steps_offset": 1}),
    ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": False}),
    ("DDIMScheduler", {"timestep_spacing": "linspace", "set_alpha_to_one": False}),
    ("DDIMScheduler", {"set_alpha_to_one": False}),
    ("DDPMScheduler", {"prediction_type": "sample", "timestep_spacing": "trailing"}),
    ("PNDMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -2.0}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("DPMSolverSinglestepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 5.0, "prediction_type": "flow_prediction"}),
    ("UniPCMultistepScheduler", {"prediction_type": "v_prediction"}),
    ("DEISMultistepScheduler", {}),
    ("DEISMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("SASolverScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
    ("LMSDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_karras_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_beta_sigmas": True}),
    ("EDMEulerScheduler", {}),
    ("EDMEulerScheduler", {"rho": 5.0}),
    ("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential", "sigma_max": 20.0}),
]


@pytest.mark.parametrize(("name", "arguments"), CONFIGS)
def test_configs_give_the_sigmas_of_diffusers(name: str, arguments: dict) -> None:
    diffusers = pytest.importorskip("diffusers")
    betas = {} if name.startswith(("Flow", "EDM")) else SD
    scheduler = getattr(diffusers, name)(**betas, **arguments)
    schedule, prediction, options = read_config(scheduler)
    expected_prediction = "flow_prediction" if name.startswith("Flow") else scheduler.config.get("prediction_type")
    assert prediction in (expected_prediction, EDMPrecond(0.5))
    n = 15
    scheduler.set_timesteps(n)
    times = make_times(schedule, n, **options)
    if hasattr(scheduler, "sigmas"):
        sigma = schedule.sigma(times) if isinstance(schedule, RectifiedFlow) else ratio(schedule, times)
        expected = scheduler.sigmas.numpy()
        if name == "HeunDiscreteScheduler":  # which lists the sigmas of both its calls
            expected = np.append(expected[:1], expected[1::2])
        # They interpolate sigma, we log alpha: up to 2e-4 between indices; and alphas are float32.
        np.testing.assert_allclose(sigma, expected, rtol=3e-4, atol=1e-6)
    else:
        own = scheduler.timesteps.numpy().astype(float)
        expected = np.array(sorted(set(own), reverse=True))  # PLMS repeats its second timestep
        np.testing.assert_array_equal(times[:-1], expected)
        to_clean = arguments.get("set_alpha_to_one", True) or own[-1] == 0.0  # no second call at 0
        assert times[-1] == (-1.0 if to_clean else 0.0)


@pytest.mark.parametrize(
    "name", sorted({name for name, _ in CONFIGS} | {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler"})
)
def test_config_defaults_are_those_of_the_class(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    full = dict(getattr(diffusers, name)().config)
    assert from_diffusers_config({"_class_name": name}) == from_diffusers_config({**full, "_class_name": name})


def test_what_a_config_leaves_out() -> None:
    """Options hold what the schedule does not say itself, and what flow sigmas assume."""
    assert from_diffusers_config({"_class_name": "DDIMScheduler"})[2] == {
        "grid": "leading",
        "final_sigmas_type": "zero",
        "steps_offset": 0,
    }
    for name, ending in (("DDIMScheduler", "zero"), ("PNDMScheduler", "sigma_min")):  # their set_alpha_to_one
        config = {"_class_name": name, "steps_offset": 1}
        assert from_diffusers_config(config)[2]["final_sigmas_type"] == ending
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        config = {**FLOW_SIGMAS, "_class_name": name}
        full = {**config, "num_train_timesteps": 1000, "flow_shift": 1.0}
        assert from_diffusers_config(config) == from_diffusers_config(full)


def test_an_index_at_lambda_min_clipped_stays() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "trained_betas": DISCRETE.betas.tolist()}
    schedule, _, options = from_diffusers_config({**config, "lambda_min_clipped": DISCRETE.log_snr(900.0)})
    assert schedule == DISCRETE and options["t_start"] == 900.0


def test_networks_that_predict_the_negative_of_edms() -> None:
    config = {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_data": 0.7}
    assert from_diffusers_config(config)[1] == EDMPrecond(0.7, -1)


def test_a_linear_shift_is_mu_itself() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    assert from_diffusers_config({**config, "time_shift_type": "linear"}, mu=2.5)[0] == RectifiedFlow(2.5)


FLOW_SIGMAS = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}


def test_strict_flow_shifts_once_and_dynamic_needs_mu() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    last = [make_times(s, 5, **o)[-2] for s, _, o in (from_diffusers_config(config, strict=k) for k in (False, True))]
    assert last == pytest.approx([0.00893, 0.002994], rel=1e-3)
    dynamic = {**config, "use_dynamic_shifting": True}
    with pytest.raises(ValueError, match="needs mu"):
        from_diffusers_config(dynamic)
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(7, mu=0.9)
    schedule, _, options = read_config(scheduler, mu=0.9)
    np.testing.assert_allclose(make_times(schedule, 7, **options), scheduler.sigmas.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "EulerDiscretScheduler"}, "did you mean 'EulerDiscreteScheduler'"),
        ({}, "_class_name = None"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "x0"}, "prediction_type = 'x0'"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "laplace"}, "'laplace'"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1}, "shift_terminal = 0.1"),
        ({"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": 1, "use_beta_sigmas": 1}, "exclude"),
        ({**FLOW_SIGMAS, "final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min'"),
        ({**FLOW_SIGMAS, "shift_terminal": 0.1}, "shift_terminal = 0.1"),
        ({**FLOW_SIGMAS, "use_karras_sigmas": True}, "use_flow_sigmas with the karras grid"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas = True"),
        ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "interpolation_type"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "sigma_min": 0.1}, "given together"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "sigma_max": 9.0}, "given together"),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": 99.0}, "lambda_min_clipped = 99 leaves"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "prediction_type = 'sample'"),
    ],
)
def test_unsupported_configs_are_named(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_diffusers_config(config)


# Errors.


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((DISCRETE, 0), {}, "steps = 0"),
        ((DISCRETE, 2.5), {}, "steps = 2.5"),
        ((DISCRETE, True), {}, "steps = True"),
        ((DISCRETE, 10, "karas"), {}, "did you mean 'karras'"),
        ((DISCRETE, 10, "karras"), {"rh": 3}, "option 'rh' is unknown; it takes on, rho"),
        ((DISCRETE, 10, "uniform"), {"on": "time"}, "option 'on' is unknown; it takes no options"),
        ((DISCRETE, 10, "karras"), {"rho": 0.0}, "rho = 0.0"),
        ((DISCRETE, 10, "karras"), {"on": "sigma"}, "on = 'sigma'"),
        ((DISCRETE, 10, "karras"), {"span": "uniform"}, "span = 'uniform' is not an index grid"),
        ((VPLinear(), 10, "karras"), {"span": "leading"}, "needs a DiscreteBetas schedule"),
        ((DISCRETE, 10, "beta"), {"alpha": -1.0}, "alpha = -1.0"),
        ((DISCRETE, 10, "beta"), {"alpha": 0.0}, "alpha = 0.0"),
        ((DISCRETE, 10, "beta"), {"beta": math.inf}, "beta = inf"),
        ((DISCRETE, 10), {"final_sigmas_type": "one"}, "final_sigmas_type = 'one'"),
        ((DISCRETE, 10), {"t_start": 1000.0}, "t_start = 1000.0"),
        *[
            (
                (DISCRETE, 10, grid),
                {**ends, "final_sigmas_type": "sigma_min"},
                "t_start = .* and t_end = .* must be whole",
            )
            for grid in INDEX_GRIDS
            for ends in ({"t_start": 700.5}, {"t_end": 0.5}, {"t_start": 700.5, "t_end": 0.5})
        ],
        ((DISCRETE, 10, "trailing"), {"t_end": 100.0}, "ends where its stride leads: t_end = 100 would not be used"),
        ((DISCRETE, 10, "leading"), {"t_end": 0.0}, "t_end = 0 would not be used; leave it out"),
        ((DISCRETE, 10, "trailing"), {"rho": 5.0}, "option 'rho' is unknown; it takes no options"),
        ((VPLinear(), 10, "uniform"), {"rho": 5.0}, "grid 'uniform': option 'rho' is unknown"),
        ((DISCRETE, 10), {"t_end": -1.5}, r"t_end = -1.5 is not accepted by .* \[-1, 999\]"),
        ((EDM(), 10), {"t_end": math.nan}, "t_end = nan"),
        ((DISCRETE, 10), {"t_start": 10.0, "t_end": 10.0}, "t_start = 10 must be above t_end = 10"),
        ((VPLinear(), 10), {"t_start": 0.1, "t_end": 0.2}, "t_start = 0.1 must be above t_end = 0.2"),
        ((DISCRETE, 1001, "trailing"), {}, "more than the 1000 training timesteps; use fewer steps"),
        ((DISCRETE, 1000, "linspace"), {"drop_last": True}, "nodes 499 and 500 are 500 and 500 .* use fewer"),
        ((DISCRETE, 1000, "leading"), {"steps_offset": 1}, r"outside \[-1, 999\]; use fewer steps or a smaller"),
        ((RectifiedFlow(), 10, "karras"), {}, "infinite at t_start = 1"),
        ((VPLinear(), 10, "logsnr"), {"t_end": 0.0}, "sigma is 0 at t_end"),
        ((RectifiedFlow(), 10, "exponential"), {"on": "time", "t_end": 0.0}, "give t_end > 0"),
    ],
)
def test_bad_requests_are_named(arguments, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_times(*arguments, **options)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0], r"times of shape \(1,\)"),
        ([1.0, np.nan], r"times\[1\] = nan"),
        ([1.2, 0.5], r"times\[0\] = 1.2 .* \[0, 1\]"),
        ([1.0, 0.5, 0.5], r"times\[1\] = .*0.5.* and times\[2\] = .*0.5.* do not decrease"),
        ([0.1, 1.0], r"the noisiest first"),
    ],
)
def test_user_times_are_checked(times, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_times(VPLinear(), times)


def test_user_sigmas_become_times() -> None:
    assert check_times(VPLinear(), [1.0, 0.0]).tolist() == [1.0, 0.0]
    np.testing.assert_allclose(check_times(EDM(), sigmas=[80.0, 1.0, 0.0]), [80.0, 1.0, 0.0], rtol=1e-14)
    times = check_times(DISCRETE, sigmas=[14.0, 1.0, 0.0])
    assert times[-1] == -1.0
    np.testing.assert_allclose(ratio(DISCRETE, times), [14.0, 1.0, 0.0], rtol=1e-12)
    with pytest.raises(ValueError, match=r"sigmas\[1\] = -1"):
        check_times(EDM(), sigmas=[80.0, -1.0])
    with pytest.raises(ValueError, match="exactly one"):
        check_times(EDM())
