"""What a model predicts, as pairs of weights: target = w_x x + w_m m, for x = alpha x0 + sigma eps and output
m.

    name               m                        used by
    epsilon            eps                      DDPM (2006.11239)
    sample             x0                       DDPM appendix; k-diffusion and EDM denoisers
    v_prediction       alpha eps - sigma x0     progressive distillation (2202.00512)
    score              -eps / sigma             score matching (2011.13456)
    flow_prediction    eps - x0                 rectified flow (2209.03003)
    edm                F of x0 = c_skip x + c_out F(c_in x)        EDM (2206.00364, table 1)

Nothing here assumes alpha^2 + sigma^2 = 1. All functions take floats (and return floats) or float64 arrays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import numpy as np

from pydiff.schedules.base import Array, Value, number_argument
from pydiff.schedules.suggestion import suggestion

Weights = tuple[Array, Array]


class Prediction(ABC):
    """What a model predicts: with x = alpha x0 + sigma eps and the model's output m, how (x, m) give x0 or eps.

    Made by name with `get_prediction`, or as `EDMPrecond`. Its functions take floats and return floats, or take float64
    arrays that broadcast; alpha and sigma are the signal and noise level of x, finite, >= 0 and not both 0. Two
    predictions are equal when their `to_dict` are.
    """

    name: str
    """What `get_prediction` knows it by."""

    @abstractmethod
    def _to_sample(self, alpha: Array, sigma: Array) -> Weights: ...

    @abstractmethod
    def _to_epsilon(self, alpha: Array, sigma: Array) -> Weights: ...

    def weights(self, target: str, alpha: Value, sigma: Value) -> tuple[Value, Value]:
        """The weights (w_x, w_m) of target = w_x x + w_m m.

        Args:
            target: "sample" for the clean sample x0, or "epsilon" for the noise.
            alpha, sigma: the levels of x.

        Raises: ValueError for another target, for levels that are not finite, >= 0 and not both 0, and for those from
            which the target cannot be computed (x0 from eps at alpha = 0, eps from x0 at sigma = 0).
        """
        if target not in ("sample", "epsilon"):
            raise ValueError(f"weights: target = {target!r} is not accepted; give 'sample' or 'epsilon'")
        a, s = self._check(alpha, sigma)
        with np.errstate(divide="ignore", invalid="ignore"):
            w_x, w_m = self._to_sample(a, s) if target == "sample" else self._to_epsilon(a, s)
        bad = ~(np.isfinite(w_x) & np.isfinite(w_m))
        if bad.any():
            raise ValueError(self._singular(target, float(a[bad].flat[0]), float(s[bad].flat[0])))
        return _like(w_x), _like(w_m)

    def input_scale(self, alpha: Value, sigma: Value) -> Value:
        """The factor on x, at the levels alpha and sigma, before the model sees it: 1, except for EDM preconditioning.

        Raises: ValueError for levels that are not finite, >= 0 and not both 0.
        """
        return cast(Value, _like(np.ones_like(self._check(alpha, sigma)[0])))

    def model_time(self, t: Value, alpha: Value, sigma: Value) -> Value:
        """The time that the model is told: the schedule's own t, except for EDM preconditioning.

        Args:
            t: the schedule's time.
            alpha, sigma: the levels of x there.

        Raises: ValueError for levels that are not finite, >= 0 and not both 0.
        """
        self._check(alpha, sigma)
        return t

    def _check(self, alpha: float | Array, sigma: float | Array) -> Weights:
        a, s = np.broadcast_arrays(np.asarray(alpha, np.float64), np.asarray(sigma, np.float64))
        bad = ~(np.isfinite(a) & np.isfinite(s) & (a >= 0.0) & (s >= 0.0) & (a + s > 0.0))
        if bad.any():
            raise ValueError(
                f"{self.name}: alpha = {a[bad].flat[0]:g}, sigma = {s[bad].flat[0]:g} is not accepted; "
                "give finite values >= 0, not both 0"
            )
        return a, s

    def _singular(self, target: str, alpha: float, sigma: float) -> str:
        at = f"(alpha = {alpha:g}, sigma = {sigma:g})"
        label = self.name.replace("_prediction", "") + "-prediction"
        if target == "sample":
            return (
                f"{label} gives no sample at alpha = 0 {at}, so it cannot start at zero terminal SNR; "
                "use a v_prediction model or start at a smaller t"
            )
        return (
            f"{label} gives no epsilon at sigma = 0 {at}; "
            "let a solver that works in epsilon end at a time with sigma > 0, or work in the sample"
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description that `Prediction.from_dict` turns back into an equal prediction."""
        return {"prediction": self.name}

    @staticmethod
    def from_dict(description: dict[str, Any]) -> Prediction:
        """The prediction that `to_dict` described; description: {"prediction": name, **constructor arguments}.

        Raises: ValueError for an unknown name.
        """
        arguments = dict(description)
        name = arguments.pop("prediction", None)
        return EDMPrecond(**arguments) if name == "edm" else get_prediction(name)

    def __repr__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prediction) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().items()))


class _Epsilon(Prediction):
    name = "epsilon"

    def _to_sample(self, alpha: Array, sigma: Array) -> Weights:
        return 1.0 / alpha, -sigma / alpha

    def _to_epsilon(self, alpha: Array, sigma: Array) -> Weights:
        return np.zeros_like(alpha), np.ones_like(alpha)


class _Sample(Prediction):
    name = "sample"

    def _to_sample(self, alpha: Array, sigma: Array) -> Weights:
        return np.zeros_like(alpha), np.ones_like(alpha)

    def _to_epsilon(self, alpha: Array, sigma: Array) -> Weights:
        return 1.0 / sigma, -alpha / sigma


class _VPrediction(Prediction):
    """Solves (x, v) = [[alpha, sigma], [-sigma, alpha]] (x0, eps): the determinant is alpha^2 + sigma^2."""

    name = "v_prediction"

    def _to_sample(self, alpha: Array, sigma: Array) -> Weights:
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm

    def _to_epsilon(self, alpha: Array, sigma: Array) -> Weights:
        norm = alpha**2 + sigma**2
        return sigma / norm, alpha / norm


class _Score(Prediction):
    name = "score"

    def _to_sample(self, alpha: Array, sigma: Array) -> Weights:
        return 1.0 / alpha, sigma**2 / alpha

    def _to_epsilon(self, alpha: Array, sigma: Array) -> Weights:
        return np.zeros_like(alpha), -sigma


class _FlowPrediction(Prediction):
    """Solves (x, u) = [[alpha, sigma], [-1, 1]] (x0, eps): the determinant is alpha + sigma."""

    name = "flow_prediction"

    def _to_sample(self, alpha: Array, sigma: Array) -> Weights:
        return 1.0 / (alpha + sigma), -sigma / (alpha + sigma)

    def _to_epsilon(self, alpha: Array, sigma: Array) -> Weights:
        return 1.0 / (alpha + sigma), alpha / (alpha + sigma)


class EDMPrecond(Prediction):
    """The raw network F of EDM (2206.00364, eq. 7 and table 1).

        x0 = c_skip x / alpha + c_out F(c_in x / alpha, c_noise),    c_noise = log(sigma / alpha) / 4

    The model is called on c_in x / alpha with the time c_noise. The table's coefficients are written with
    S^2 = sigma^2 + alpha^2 sigma_data^2 instead of divisions by alpha, so that they hold for any schedule and c_skip,
    c_out and c_in stay regular where alpha or sigma is 0. A denoiser that preconditions itself, as EDM's pickles do,
    predicts the "sample" instead.

    Args:
        sigma_data: standard deviation of the data, > 0.
        output_sign: 1, or -1 for networks that predict -F, which is what diffusers' EDM classes call "v_prediction".

    Raises: ValueError for a sigma_data that is not finite and above 0, and for another sign.

    Example:
        def network(x, c_noise):  # F of data that is 0: then c_out F = -c_skip x
            sigma = torch.exp(4 * c_noise).reshape(-1, 1)
            return -x * 0.5 / sigma

        prediction = pydiff.EDMPrecond(sigma_data=0.5)
        sampler = pydiff.Sampler(network, "heun", steps=6, schedule=pydiff.EDM(), prediction=prediction)
        assert sampler((4, 2), seed=0).abs().max() < 1e-4
    """

    name = "edm"

    def __init__(self, sigma_data: float = 0.5, output_sign: int = 1) -> None:
        self.sigma_data = number_argument("EDMPrecond", "sigma_data", sigma_data)
        if output_sign not in (1, -1):
            raise ValueError(f"EDMPrecond: output_sign = {output_sign!r} is not accepted; give 1 or -1")
        self.output_sign = int(output_sign)

    def _total(self, alpha: Array, sigma: Array) -> Array:
        return np.hypot(sigma, alpha * self.sigma_data)

    def _to_sample(self, alpha: Array, sigma: Array) -> Weights:
        total = self._total(alpha, sigma)
        c_skip = alpha * (self.sigma_data / total) ** 2
        return c_skip, self.output_sign * sigma * self.sigma_data / total

    def _to_epsilon(self, alpha: Array, sigma: Array) -> Weights:
        total = self._total(alpha, sigma)
        return sigma / total**2, -self.output_sign * alpha * self.sigma_data / total

    def input_scale(self, alpha: Value, sigma: Value) -> Value:
        """c_in / alpha, the factor on x itself: 1 / sqrt(sigma^2 + alpha^2 sigma_data^2).

        Raises: ValueError for levels alpha and sigma that are not finite, >= 0 and not both 0.
        """
        return cast(Value, _like(1.0 / self._total(*self._check(alpha, sigma))))

    def model_time(self, t: Value, alpha: Value, sigma: Value) -> Value:
        """c_noise = log(sigma / alpha) / 4, whatever t is.

        Raises: ValueError where alpha or sigma is 0.
        """
        a, s = self._check(alpha, sigma)
        bad = (a == 0.0) | (s == 0.0)
        if bad.any():
            raise ValueError(
                f"edm: the model has no time ln(sigma/alpha)/4 at alpha = {a[bad].flat[0]:g}, "
                f"sigma = {s[bad].flat[0]:g}; call it only where both are > 0"
            )
        return cast(Value, _like(0.25 * np.log(s / a)))

    def to_dict(self) -> dict[str, Any]:
        return {"prediction": "edm", "sigma_data": self.sigma_data, "output_sign": self.output_sign}

    def __repr__(self) -> str:
        sign = "" if self.output_sign == 1 else ", output_sign=-1"
        return f"EDMPrecond(sigma_data={self.sigma_data!r}{sign})"


def _like(value: Array) -> Any:
    """Scalars leave as Python floats."""
    return float(value) if np.ndim(value) == 0 else np.asarray(value)


epsilon: Prediction = _Epsilon()
sample: Prediction = _Sample()
v_prediction: Prediction = _VPrediction()
score: Prediction = _Score()
flow_prediction: Prediction = _FlowPrediction()

_BY_NAME = {p.name: p for p in (epsilon, sample, v_prediction, score, flow_prediction, EDMPrecond())}


def list_predictions() -> list[str]:
    """The names `get_prediction` accepts."""
    return list(_BY_NAME)


def get_prediction(prediction: str | Prediction) -> Prediction:
    """What a model predicts, by its name.

    Args:
        prediction: a name below, or a `Prediction`, which is returned as it is. For x = alpha x0 + sigma eps the model
            returns, by name,

            "epsilon"            eps, the noise (DDPM, 2006.11239)
            "sample"             x0, the clean sample, as the denoisers of k-diffusion and EDM do
            "v_prediction"       alpha eps - sigma x0 (progressive distillation, 2202.00512)
            "score"              -eps / sigma (2011.13456)
            "flow_prediction"    eps - x0, the velocity from data to noise (rectified flow, 2209.03003)
            "edm"                EDM's raw network with sigma_data = 0.5: see `EDMPrecond`

    Raises: ValueError for an unknown name, with a suggestion.
    """
    if isinstance(prediction, Prediction):
        return prediction
    if prediction in _BY_NAME:
        return _BY_NAME[prediction]
    hint = suggestion(prediction, _BY_NAME)
    raise ValueError(f"prediction = {prediction!r} is unknown; known are {', '.join(_BY_NAME)}{hint}")
