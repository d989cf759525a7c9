"""Noise schedules: closed forms against each other, against numerical derivatives and against diffusers."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiff.schedules.base import NoiseSchedule
from pydiff.schedules.closed_form import (
    BETA_SCHEDULES,
    EDM,
    VE,
    DiscreteBetas,
    RectifiedFlow,
    VPCosine,
    VPLinear,
    named_betas,
    rescale_zero_terminal_snr,
)
from pydiff.schedules.from_callable import FromLogSNR, _derivative_weights
from pydiff.schedules.time_grid import make_times

EPS = np.finfo(np.float64).eps
STABLE_DIFFUSION = ("scaled_linear", 1000, 0.00085, 0.012)

CLOSED = {
    "vp_linear": VPLinear(),
    "vp_linear_constant": VPLinear(3.0, 3.0),
    "vp_cosine": VPCosine(),
    "vp_cosine_no_offset": VPCosine(0.0),
    "linear": DiscreteBetas.named("linear"),
    "scaled_linear": DiscreteBetas.named(*STABLE_DIFFUSION),
    "squaredcos": DiscreteBetas.named("squaredcos_cap_v2"),
    "sigmoid": DiscreteBetas.named("sigmoid"),
    "zero_snr": DiscreteBetas.named(*STABLE_DIFFUSION, rescale_betas_zero_snr=True),
    "ve": VE(),
    "edm": EDM(),
    "flow": RectifiedFlow(3.0),
}
CALLABLE = {
    "callable_vp": FromLogSNR(VPLinear().log_snr),
    "callable_ve": FromLogSNR(lambda t: -math.log(t), t_start=80.0, t_end=0.002, variance_preserving=False),
}
ALL = CLOSED | CALLABLE
every = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())
closed = pytest.mark.parametrize("schedule", CLOSED.values(), ids=CLOSED.keys())


def interior(schedule: NoiseSchedule, n: int = 401) -> np.ndarray:
    """Times strictly between the ends, off the knots of piecewise schedules."""
    low, high = schedule.t_end, schedule.t_start
    return low + (high - low) * (np.arange(n) + 0.37) / (n + 0.5)


@pytest.fixture(autouse=True)
def no_numpy_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@every
def test_inverse_of_log_snr(schedule: NoiseSchedule) -> None:
    # lambda carries a rounding of a few eps (|lambda| + 1), which the inverse turns into a time through
    # 1/|lambda'|; times counted from clean_time add their own rounding. |lambda'| = g^2 / (2 sigma^2).
    t = interior(schedule)
    log_snr = schedule.log_snr(t)
    slope = schedule.diffusion_squared(t) / (2.0 * schedule.sigma(t) ** 2)
    bound = 16 * EPS * (np.abs(t) + abs(schedule.clean_time) + (np.abs(log_snr) + 1.0) / slope)
    assert np.all(np.abs(schedule.t_of_log_snr(log_snr) - t) <= bound)


@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine", "ve", "edm", "flow"])
@given(fraction=st.floats(0.0, 1.0))
@settings(max_examples=50, deadline=None)
def test_inverse_is_exact_to_1e_12(name: str, fraction: float) -> None:
    schedule = CLOSED[name]
    t = schedule.t_end * (0.999 * schedule.t_start / schedule.t_end) ** fraction
    assert schedule.t_of_log_snr(schedule.log_snr(t)) == pytest.approx(t, rel=1e-12)


@every
def test_ends(schedule: NoiseSchedule) -> None:
    assert schedule.sigma(schedule.clean_time) == 0.0 and schedule.alpha(schedule.clean_time) == 1.0
    assert schedule.log_snr(schedule.clean_time) == math.inf
    assert schedule.t_of_log_snr(math.inf) == schedule.clean_time
    start = schedule.log_snr(schedule.t_start)
    if math.isfinite(start):
        assert schedule.t_of_log_snr(start) == pytest.approx(schedule.t_start, rel=1e-12)
    assert schedule.clean_time < schedule.t_end < schedule.t_start <= schedule.t_max


@pytest.mark.parametrize("name", ["vp_cosine", "zero_snr", "flow"])
def test_zero_alpha_is_exact(name: str) -> None:
    schedule = CLOSED[name]
    assert schedule.alpha(schedule.t_max) == 0.0 and schedule.sigma(schedule.t_max) == 1.0
    assert schedule.log_alpha(schedule.t_max) == schedule.log_snr(schedule.t_max) == -math.inf
    assert schedule.t_of_log_snr(-math.inf) == schedule.t_max
    with pytest.raises(ValueError, match="start below t"):
        schedule.drift(schedule.t_max)


@every
def test_monotone(schedule: NoiseSchedule) -> None:
    t = np.linspace(schedule.t_end, schedule.t_start, 2001)
    assert np.all(np.diff(schedule.log_snr(t)) < 0.0)
    assert np.all(np.diff(schedule.alpha(t)) <= 0.0) and np.all(np.diff(schedule.sigma(t)) >= 0.0)


def test_which_schedules_preserve_variance() -> None:
    assert [name for name in ALL if not ALL[name].variance_preserving] == ["ve", "edm", "flow", "callable_ve"]


@every
def test_variance_preserving_and_prior(schedule: NoiseSchedule) -> None:
    t = interior(schedule)
    if schedule.variance_preserving:
        np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=4 * EPS)
        np.testing.assert_array_equal(schedule.init_std(t), 1.0)
    else:
        np.testing.assert_array_equal(schedule.init_std(t), schedule.sigma(t))
    np.testing.assert_allclose(schedule.log_alpha(t), np.log(schedule.alpha(t)), atol=1e-15, rtol=1e-12)
    ratio = np.log(schedule.alpha(t) / schedule.sigma(t))
    np.testing.assert_allclose(schedule.log_snr(t), ratio, rtol=1e-10, atol=1e-12)


def numerical_derivative(function, t: np.ndarray, step: np.ndarray) -> np.ndarray:
    weights = _derivative_weights(range(-4, 5))
    return sum(w * function(t + k * step) for k, w in zip(range(-4, 5), weights, strict=True)) / step


@every
def test_drift_and_diffusion_are_the_derivatives(schedule: NoiseSchedule) -> None:
    t = interior(schedule, 53)
    room = np.minimum(t - schedule.clean_time, schedule.t_start - t)
    step = 0.01 * room
    if isinstance(schedule, DiscreteBetas):  # the nine points must stay inside one linear piece
        t = np.floor(t) + 0.5
        step = np.full_like(t, 0.1)
    drift = schedule.drift(t)
    np.testing.assert_allclose(drift, numerical_derivative(schedule.log_alpha, t, step), rtol=1e-8, atol=1e-8)
    variance = numerical_derivative(lambda s: schedule.sigma(s) ** 2, t, step)
    expected = variance - 2.0 * drift * schedule.sigma(t) ** 2
    np.testing.assert_allclose(schedule.diffusion_squared(t), expected, rtol=1e-7, atol=1e-8)


def test_discrete_drift_is_the_slope_of_its_segment() -> None:
    plain, zero = CLOSED["scaled_linear"], CLOSED["zero_snr"]
    # At an index it is that of the cleaner segment; alpha is linear on the last one before a zero terminal SNR.
    middles = {-0.5: -0.5, 0.0: -0.5, 10.0: 9.5, 997.5: 997.5, 998.0: 997.5}
    for schedule, segments in ((plain, middles | {998.5: 998.5, 999.0: 998.5}), (zero, middles)):
        for t, middle in segments.items():
            slope = (schedule.log_alpha(middle + 0.25) - schedule.log_alpha(middle - 0.25)) / 0.5
            assert schedule.drift(t) == pytest.approx(slope, rel=1e-10)
    assert (zero.drift(998.5), zero.drift(998.75)) == (-2.0, -4.0)


@pytest.mark.parametrize("clean_time", [-5.0, 5.0])
def test_a_callables_times_may_begin_anywhere(clean_time: float) -> None:
    ends = {"t_start": clean_time + 1.0, "t_end": clean_time + 1e-3, "clean_time": clean_time}
    schedule = FromLogSNR(lambda t: -np.log(t - clean_time), variance_preserving=False, **ends)
    t = clean_time + np.array([1e-5, 1e-3, 0.1, 1.0])
    np.testing.assert_allclose(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=2 * EPS)
    np.testing.assert_allclose(schedule.diffusion_squared(t[1:]), 2.0 * (t[1:] - clean_time), rtol=1e-7)


def test_the_derivative_of_a_callable_that_bends_sharply() -> None:
    schedule = FromLogSNR(lambda t: -10.0 * t - 0.009 * np.sin(1000.0 * t), variance_preserving=False)
    t = np.linspace(0.5, 1.0, 33)
    slope = -schedule.diffusion_squared(t) / (2.0 * schedule.sigma(t) ** 2)
    np.testing.assert_allclose(slope, -10.0 - 9.0 * np.cos(1000.0 * t), rtol=1e-7)


def test_a_callable_is_inverted_to_the_last_bit() -> None:
    t = np.random.default_rng(0).uniform(1e-3, 1.0, 64)
    np.testing.assert_array_equal(FromLogSNR(np.negative).t_of_log_snr(-t), t)


def test_callable_derivative_is_accurate_up_to_both_ends() -> None:
    t = np.geomspace(1e-3, 1.0, 101)
    np.testing.assert_allclose(CALLABLE["callable_vp"].drift(t), VPLinear().drift(t), rtol=1e-9)


@every
def test_scalars_return_floats_and_arrays_keep_their_shape(schedule: NoiseSchedule) -> None:
    for name in ("alpha", "sigma", "log_alpha", "log_snr", "drift", "diffusion_squared", "init_std"):
        method = getattr(schedule, name)
        t = interior(schedule, 6)
        assert type(method(float(t[2]))) is float
        values = method(t.reshape(2, 3))
        assert values.shape == (2, 3) and values.dtype == np.float64
        assert values[0, 2] == pytest.approx(method(float(t[2])), rel=1e-14)
    assert type(schedule.t_of_log_snr(0.5)) is float


@every
def test_out_of_range_times_are_refused(schedule: NoiseSchedule) -> None:
    bad = [math.nan, math.inf, schedule.clean_time - 0.01]
    bad += [schedule.t_max + 0.01] if math.isfinite(schedule.t_max) else []
    for t in bad:
        with pytest.raises(ValueError, match="is not accepted; give finite times in"):
            schedule.log_snr(t)
    with pytest.raises(ValueError, match="is not reached"):
        schedule.t_of_log_snr(math.nan)


def test_unreachable_log_snr_is_refused() -> None:
    for schedule in (VPLinear(), CALLABLE["callable_vp"]):
        with pytest.raises(ValueError, match="log_snr = -50 is not reached"):
            schedule.t_of_log_snr(-50.0)
    with pytest.raises(ValueError, match="is not reached"):
        VE().t_of_log_snr(-math.inf)
    with pytest.raises(ValueError, match="log_snr = 50 is not reached"):  # no time with so little noise was found
        CALLABLE["callable_vp"].t_of_log_snr(50.0)


@closed
def test_saves_compares_and_hashes(schedule: NoiseSchedule) -> None:
    again = NoiseSchedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule and hash(again) == hash(schedule) and again is not schedule
    others = [other for other in CLOSED.values() if other is not schedule]
    assert all(other != schedule for other in [*others, repr(schedule), None])
    t = interior(schedule)
    np.testing.assert_array_equal(again.log_snr(t), schedule.log_snr(t))
    assert type(schedule).__name__ in repr(schedule)


@pytest.mark.parametrize("lowest", [-0.5, -5.0, -600.0])
def test_rounding_does_not_lead_out_of_reach(lowest: float) -> None:
    schedule = FromLogSNR(lambda t: lowest * t)
    assert schedule.t_of_log_snr(lowest * (1.0 + 16 * EPS)) == schedule.t_max
    with pytest.raises(ValueError, match="is not reached"):
        schedule.t_of_log_snr(lowest * (1.0 + 1e-9))


def test_a_schedule_of_ones_own_may_have_other_bases() -> None:
    class Listed:
        names: ClassVar[list[str]] = []

        def __init_subclass__(cls, under: str, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            cls.names.append(under)

    class Own(VPLinear, Listed, under="own"):
        pass

    assert Listed.names == ["own"]
    assert NoiseSchedule.from_dict(Own(0.2).to_dict()) == Own(0.2) != VPLinear(0.2)


def test_callables_cannot_be_saved_and_bad_descriptions_are_named() -> None:
    with pytest.raises(ValueError, match="cannot be saved"):
        CALLABLE["callable_vp"].to_dict()
    with pytest.raises(ValueError, match="schedule = 'VPLiner' is unknown"):
        NoiseSchedule.from_dict({"schedule": "VPLiner"})
    assert FromLogSNR(math.cos, 1.0, 0.1) == FromLogSNR(math.cos, 1.0, 0.1) != FromLogSNR(math.cos, 2.0, 0.1)


@pytest.mark.parametrize(
    ("made", "meant", "t_start", "t_end"),
    [
        (VPLinear(), VPLinear(0.1, 20.0), 1.0, 1e-3),
        (VPCosine(), VPCosine(0.008), 0.9946, 1e-3),
        (VE(), VE(0.02, 100.0), 100.0, 0.02),
        (EDM(), EDM(0.002, 80.0), 80.0, 0.002),
        (RectifiedFlow(), RectifiedFlow(1.0), 1.0, 1e-3),
        (DiscreteBetas.named("linear"), DiscreteBetas(np.linspace(1e-4, 0.02, 1000)), 999.0, 0.0),
        (DiscreteBetas(named_betas("linear")), DiscreteBetas(np.linspace(1e-4, 0.02, 1000)), 999.0, 0.0),
        (FromLogSNR(math.cos), FromLogSNR(math.cos, 1.0, 1e-3, True, clean_time=0.0, scale="half"), 1.0, 1e-3),
    ],
)
def test_defaults_are_the_papers(made: NoiseSchedule, meant: NoiseSchedule, t_start: float, t_end: float) -> None:
    assert made == meant and (made.t_start, made.t_end) == (t_start, t_end)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VPLinear(beta_min=0.0), "VPLinear: beta_min = 0.0"),
        (lambda: VPLinear(beta_max=math.nan), "VPLinear: beta_max = nan"),
        (lambda: VPCosine(s=-1.0), "VPCosine: s = -1.0"),
        (lambda: VE(sigma_min=2.0, sigma_max=1.0), "VE: sigma_max = 1.0 is not accepted; .* > 2"),
        (lambda: EDM(sigma_min=-1.0), "EDM: sigma_min = -1.0"),
        (lambda: RectifiedFlow(shift=0.0), "RectifiedFlow: shift = 0.0"),
        (lambda: DiscreteBetas([0.1]), r"betas of shape \(1,\)"),
        (lambda: DiscreteBetas([0.1, 0.0, 0.2]), r"betas\[1\] = 0 "),
        (lambda: DiscreteBetas([0.1, 1.0, 0.2]), r"betas\[1\] = 1 "),
        (lambda: DiscreteBetas([0.1, 1.1]), r"betas\[1\] = 1.1"),
        (lambda: DiscreteBetas([0.1, 0.2, 1.1]), r"betas\[2\] = 1.1"),
        (lambda: DiscreteBetas([0.1, 0.2, 0.0]), r"betas\[2\] = 0 "),
        (lambda: DiscreteBetas([[0.1, 0.2], [0.3, 0.4]]), r"betas of shape \(2, 2\)"),
        (lambda: named_betas("cosine"), "'cosine' is unknown; known are linear"),
        (lambda: named_betas("linear", 1), "num_train_timesteps = 1"),
        (lambda: FromLogSNR(lambda t: t), "strictly decreasing"),
        (lambda: FromLogSNR(lambda t: np.minimum(-t, -0.5)), "strictly decreasing"),
        (lambda: FromLogSNR(math.cos, t_start=0.1, t_end=0.2), "t_start = 0.1"),
        # The first of several times that is refused.
        (lambda: VPLinear().alpha(np.array([0.5, 2.0, 3.0])), "t = .*2.0.* is not accepted"),
        (lambda: VPLinear().t_of_log_snr(np.array([0.0, -50.0, -60.0])), "log_snr = -50 is not reached"),
        (lambda: RectifiedFlow().drift(np.array([0.5, 1.0])), "drift is infinite at t = 1 "),
    ],
)
def test_bad_arguments_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# diffusers keeps betas and their product in float32, where 1000 factors leave about 1e-6.


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("n", [1000, 47, 2])
def test_named_betas_match_diffusers(name: str, n: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(n, beta_start=0.00085, beta_end=0.012, beta_schedule=name)
    schedule = DiscreteBetas.named(name, n, 0.00085, 0.012)
    np.testing.assert_allclose(schedule.betas, scheduler.betas.numpy(), rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=1e-5, atol=1e-6)
    at_indices = schedule.alpha(np.arange(float(n))) ** 2
    np.testing.assert_allclose(at_indices, schedule.alphas_cumprod, rtol=1e-13)
    # Negative control: another beta range is told apart.
    other = DiscreteBetas.named(name, n, 0.00085, 0.0121)
    if name != "squaredcos_cap_v2":
        assert np.abs(other.alphas_cumprod - scheduler.alphas_cumprod.numpy()).max() > 1e-5


def test_zero_terminal_snr_matches_diffusers() -> None:
    ddim = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    torch = pytest.importorskip("torch")
    betas = named_betas(*STABLE_DIFFUSION)
    expected = ddim.rescale_zero_terminal_snr(torch.tensor(betas, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(rescale_zero_terminal_snr(betas), expected, rtol=1e-12)
    scheduler = ddim.DDIMScheduler(
        1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    schedule = DiscreteBetas(betas, rescale_betas_zero_snr=True)
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), atol=1e-6)
    assert schedule.alphas_cumprod[-1] == 0.0 and schedule.betas[-1] == 1.0


def test_discrete_interpolation_is_linear_in_log_alpha() -> None:
    schedule = CLOSED["scaled_linear"]
    middle = 0.5 * (schedule.log_alpha(10.0) + schedule.log_alpha(11.0))
    assert schedule.log_alpha(10.5) == pytest.approx(middle, rel=1e-14)
    assert schedule.log_alpha(-0.5) == pytest.approx(0.5 * schedule.log_alpha(0.0), rel=1e-14)
    zero = CLOSED["zero_snr"]
    assert zero.alpha(998.5) == pytest.approx(0.5 * zero.alpha(998.0), rel=1e-14)
    for t in (997.5, 998.0, 998.25):
        assert zero.t_of_log_snr(zero.log_snr(t)) == pytest.approx(t, rel=1e-14)


def test_betas_are_the_schedules_own() -> None:
    """Schedules compare and hash by their betas, which therefore stay what they were."""
    given_betas = named_betas("linear", 5)
    schedule = DiscreteBetas(given_betas)
    for values in (schedule.betas, schedule.alphas_cumprod):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0.5
    given_betas[0] = 0.5
    assert schedule == DiscreteBetas.named("linear", 5)


@given(beta=st.lists(st.floats(1e-5, 0.9), min_size=2, max_size=20), fraction=st.floats(0.0, 1.0))
@settings(max_examples=100, deadline=None)
def test_any_betas_invert(beta: list[float], fraction: float) -> None:
    schedule = DiscreteBetas(beta)
    t = -1.0 + fraction * len(beta)
    # alpha^2 = sigmoid(2 lambda) loses up to |log alpha| eps, divided by the smallest slope beta/2.
    bound = 16 * EPS * (len(beta) + (abs(schedule.log_alpha(schedule.t_max)) + 1.0) / (0.5 * min(beta)))
    assert schedule.t_of_log_snr(schedule.log_snr(t)) == pytest.approx(t, abs=bound)


@given(u=st.floats(0.0, 1.0), shift=st.floats(0.1, 20.0))
def test_shift_time_inverts_and_keeps_the_ends(u: float, shift: float) -> None:
    flow = RectifiedFlow(shift)
    assert flow.unshift_time(flow.shift_time(u)) == pytest.approx(u, rel=1e-12)
    assert (flow.shift_time(0.0), flow.shift_time(1.0)) == (0.0, 1.0)


def gamma(t):
    """VDM's linear gamma (2107.00630): alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma)."""
    return -13.3 + 18.3 * t


def test_the_papers_log_snr_is_twice_ours() -> None:
    t = np.linspace(1e-3, 1.0, 33)
    schedule = FromLogSNR(lambda t: -gamma(t), scale="full")
    np.testing.assert_allclose(schedule.alpha(t) ** 2, 1 / (1 + np.exp(gamma(t))), rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma(t) ** 2, 1 / (1 + np.exp(-gamma(t))), rtol=1e-12)
    np.testing.assert_allclose(2 * schedule.log_snr(t), -gamma(t), rtol=1e-12)
    half = FromLogSNR(lambda t: -0.5 * gamma(t))
    np.testing.assert_allclose(half.alpha(t), schedule.alpha(t), rtol=1e-14)
    assert schedule != FromLogSNR(schedule.fn) and "scale='full'" in repr(schedule)
    assert make_times(schedule, 5).tolist() == pytest.approx(make_times(half, 5).tolist(), rel=1e-12)


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="scale = 'log2' is not accepted; give 'half' .*or 'full'"):
        FromLogSNR(lambda t: -t, scale="log2")
    with pytest.raises(ValueError, match=r"fn\(0.00490234\) = 0.00490234 is not accepted"):  # the value that fn gave
        FromLogSNR(lambda t: t, scale="full")
