"""Predictions: from x and a model output back to x0 and eps, on any alpha and sigma."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiff.schedules import prediction as p
from pydiff.schedules.base import NoiseSchedule
from pydiff.schedules.closed_form import EDM, DiscreteBetas, RectifiedFlow, VPLinear

SCHEDULES = {"vp": VPLinear(), "discrete": DiscreteBetas.named("linear"), "edm": EDM(), "flow": RectifiedFlow()}
NAMES = ["epsilon", "sample", "v_prediction", "score", "flow_prediction"]


def model_output(name: str, x0, eps, alpha, sigma):
    """The definition of each prediction, written independently of the weights."""
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "flow_prediction": eps - x0,
    }[name]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("name", NAMES)
def test_recovers_sample_and_noise(name: str, schedule: NoiseSchedule) -> None:
    rng = np.random.default_rng(0)
    t = np.linspace(schedule.t_end, 0.99 * schedule.t_start, 57)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x0, eps = rng.standard_normal((2, 9, 57))
    x = alpha * x0 + sigma * eps
    m = model_output(name, x0, eps, alpha, sigma)
    kind = p.get_prediction(name)
    for target, expected in (("sample", x0), ("epsilon", eps)):
        w_x, w_m = kind.weights(target, alpha, sigma)
        # x and m are rounded to eps of their size; the weights amplify that and nothing else.
        size = np.abs(w_x) * np.abs(x).max(0) + np.abs(w_m) * np.abs(m).max(0) + 1.0
        assert np.all(np.abs(w_x * x + w_m * m - expected) <= 1e-14 * size)
        # Negative control: the weights of a neighbouring noise level do not recover it.
        w_x, w_m = kind.weights(target, alpha, 1.01 * sigma)
        if kind.to_dict() != {"prediction": target}:
            assert np.abs(w_x * x + w_m * m - expected).max() > 1e-4


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_edm_preconditioning_is_table_1(schedule: NoiseSchedule, sign: int) -> None:
    t = np.linspace(schedule.t_end, 0.99 * schedule.t_start, 41)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    data, s = 0.7, sigma / alpha
    kind = p.EDMPrecond(sigma_data=data, output_sign=sign)
    w_x, w_m = kind.weights("sample", alpha, sigma)
    np.testing.assert_allclose(w_x * alpha, data**2 / (s**2 + data**2), rtol=1e-12)  # c_skip acts on x/alpha
    np.testing.assert_allclose(w_m, sign * s * data / np.sqrt(s**2 + data**2), rtol=1e-12)
    np.testing.assert_allclose(kind.input_scale(alpha, sigma) * alpha, 1 / np.sqrt(s**2 + data**2), rtol=1e-12)
    np.testing.assert_allclose(kind.model_time(t, alpha, sigma), np.log(s) / 4, rtol=1e-12, atol=1e-14)
    # eps = (x - alpha x0) / sigma, for the basis (x, m) = (1, 0) and (0, 1); the subtraction loses digits.
    e_x, e_m = kind.weights("epsilon", alpha, sigma)
    np.testing.assert_allclose(e_x, (1 - alpha * w_x) / sigma, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(e_m, -alpha * w_m / sigma, rtol=1e-12)


def test_edm_with_unit_data_is_v_prediction_up_to_sign() -> None:
    alpha, sigma = VPLinear().alpha(0.3), VPLinear().sigma(0.3)
    flipped = p.EDMPrecond(sigma_data=1.0, output_sign=-1)
    for target in ("sample", "epsilon"):
        assert flipped.weights(target, alpha, sigma) == pytest.approx(
            p.v_prediction.weights(target, alpha, sigma), rel=1e-13
        )


@given(alpha=st.floats(1e-3, 1.0), sigma=st.floats(1e-3, 100.0))
@settings(max_examples=60, deadline=None)
def test_sample_and_epsilon_weights_rebuild_x(alpha: float, sigma: float) -> None:
    # alpha x0 + sigma eps = x for every model output, so the x weights combine to 1 and those of m to 0.
    for kind in (*map(p.get_prediction, NAMES), p.EDMPrecond()):
        (a, b), (c, d) = kind.weights("sample", alpha, sigma), kind.weights("epsilon", alpha, sigma)
        assert alpha * a + sigma * c == pytest.approx(1.0, rel=1e-12)
        assert alpha * b + sigma * d == pytest.approx(0.0, abs=1e-12 * (abs(sigma * d) + 1e-300))


@pytest.mark.parametrize("name", NAMES)
def test_plain_predictions_leave_input_and_time_alone(name: str) -> None:
    kind = p.get_prediction(name)
    assert kind.input_scale(0.6, 0.8) == 1.0 and kind.model_time(17.5, 0.6, 0.8) == 17.5
    assert all(type(w) is float for w in kind.weights("sample", 0.6, 0.8))
    shapes = [w.shape for w in kind.weights("epsilon", np.full((2, 3), 0.6), np.full((2, 3), 0.8))]
    assert shapes == [(2, 3), (2, 3)]


def test_regular_ends() -> None:
    assert p.v_prediction.weights("sample", 0.0, 1.0) == (0.0, -1.0)
    assert p.flow_prediction.weights("sample", 0.0, 1.0) == (1.0, -1.0)
    assert p.flow_prediction.weights("epsilon", 1.0, 0.0) == (1.0, 1.0)
    assert p.EDMPrecond().weights("sample", 0.0, 1.0) == (0.0, 0.5)
    assert p.EDMPrecond().weights("sample", 1.0, 0.0) == (1.0, 0.0)
    assert p.epsilon.weights("sample", 1.0, 0.0) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: p.epsilon.weights("sample", 0.0, 1.0), "epsilon-prediction.*alpha = 0.*zero terminal SNR.*v_pred"),
        (lambda: p.score.weights("sample", 0.0, 1.0), "score-prediction.*smaller t"),
        (lambda: p.sample.weights("epsilon", np.ones(2), np.array([1.0, 0.0])), "sample-prediction.*sigma = 0"),
        (lambda: p.epsilon.weights("x0", 1.0, 1.0), "target = 'x0'"),
        (lambda: p.epsilon.weights("sample", -1.0, 1.0), "alpha = -1"),
        (lambda: p.epsilon.weights("sample", 0.0, 0.0), "not both 0"),
        (lambda: p.sample.input_scale(float("nan"), 1.0), "alpha = nan"),
        (lambda: p.EDMPrecond().model_time(0.0, 1.0, np.array([1.0, 0.0])), "sigma = 0; call it only where"),
        (lambda: p.EDMPrecond().model_time(0.0, 1.0, 0.0), "sigma = 0; call it only where"),
        (lambda: p.EDMPrecond(sigma_data=0.0), "sigma_data = 0.0"),
        (lambda: p.EDMPrecond(output_sign=0), "output_sign = 0"),
        (lambda: p.get_prediction("epsilom"), "did you mean 'epsilon'"),
        (lambda: p.get_prediction(3), "prediction = 3 is unknown"),  # type: ignore[arg-type]
    ],
)
def test_errors_name_the_cause(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("alpha", "sigma"), [(-1, 2), (2, -1), (np.inf, 1), (1, np.inf), (np.nan, 1), (1, np.nan), (0, 0)]
)
@pytest.mark.parametrize("kind", [p.epsilon, p.EDMPrecond()], ids=repr)
def test_levels_that_are_none_are_refused(kind, alpha, sigma) -> None:
    levels = np.array([0.6, alpha]), np.array([0.8, sigma])  # the first two are levels
    for call in (
        lambda: kind.weights("sample", *levels),
        lambda: kind.input_scale(*levels),
        lambda: kind.model_time(np.array([0.5, 0.5]), *levels),
    ):
        with pytest.raises(ValueError, match=f"{kind.name}: alpha = {alpha}, sigma = {sigma} is not accepted"):
            call()


def test_saves_and_compares() -> None:
    kinds = [*map(p.get_prediction, p.list_predictions()), p.EDMPrecond(1.0), p.EDMPrecond(1.0, -1)]
    for kind in kinds:
        again = p.Prediction.from_dict(json.loads(json.dumps(kind.to_dict())))
        assert again == kind == eval(repr(kind), vars(p)) and hash(again) == hash(kind)
    assert len(set(kinds)) == len(kinds) and p.EDMPrecond() == p.EDMPrecond(0.5, 1)
    assert p.sample != p.epsilon != "epsilon"
    assert p.get_prediction(p.score) is p.score
