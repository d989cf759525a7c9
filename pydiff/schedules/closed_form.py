"""Noise schedules: how much signal and how much noise a sample holds at time t, in float64 on the host.

Every schedule describes x_t = alpha(t) x0 + sigma(t) eps with eps ~ N(0, I), and answers in closed form

    log_snr(t) = log(alpha / sigma)         lambda, the half-log-SNR of DPM-Solver (2206.00927), decreasing
    drift(t) = d log alpha / dt             f of dx = f x dt + g dw (Score SDE, 2011.13456, eq. 5)
    diffusion_squared(t) = g^2 = d sigma^2/dt - 2 f sigma^2 = -2 sigma^2 d lambda/dt

The time is the schedule's own, and is what a model receives: t in [0, 1] for VP and rectified flow, the
(fractional) index for `DiscreteBetas`, sigma itself for VE and EDM. Methods take floats (and return floats)
or numpy arrays. A time outside [clean_time, t_max] and a bad constructor argument raise ValueError.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from pydiff.schedules.base import Array, NoiseSchedule, Value, number_argument

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


class _VariancePreserving(NoiseSchedule):
    """alpha^2 + sigma^2 = 1, so that log alpha determines the rest; g^2 = -2 f."""

    variance_preserving = True

    @abstractmethod
    def _t_of_log_alpha(self, log_alpha: Array) -> Array: ...

    def _sigma(self, t: Array) -> Array:
        # expm1 keeps the relative precision of a small sigma; "0 -" (not unary minus) avoids the square root
        # of -0.0.
        return np.sqrt(0.0 - np.expm1(2.0 * self._log_alpha(t)))

    def _log_snr(self, t: Array) -> Array:
        log_alpha = self._log_alpha(t)
        return log_alpha - 0.5 * np.log(0.0 - np.expm1(2.0 * log_alpha))

    def _t_of_log_snr(self, log_snr: Array) -> Array:
        return self._t_of_log_alpha(-0.5 * np.logaddexp(0.0, -2.0 * log_snr))  # alpha^2 = sigmoid(2 lambda)

    def _diffusion_squared(self, t: Array) -> Array:
        return -2.0 * self._drift(t)


class VPLinear(_VariancePreserving):
    """VP SDE with beta(t) linear in t in [0, 1] (2011.13456, eq. 33): log alpha = -t^2 (b1 - b0)/4 - t
    b0/2.
    """

    t_start, t_end = 1.0, 1e-3
    final_sigmas_type = "sigma_min"
    parameters = ("beta_min", "beta_max")

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_min = number_argument("VPLinear", "beta_min", beta_min)
        self.beta_max = number_argument("VPLinear", "beta_max", beta_max)

    def _log_alpha(self, t: Array) -> Array:
        return -t * (0.25 * t * (self.beta_max - self.beta_min) + 0.5 * self.beta_min)

    def _t_of_log_alpha(self, log_alpha: Array) -> Array:
        # The root of a t^2 + b t = -log alpha in the form without cancellation, valid for a = 0 too.
        a, b = 0.25 * (self.beta_max - self.beta_min), 0.5 * self.beta_min
        return -2.0 * log_alpha / (b + np.sqrt(b * b - 4.0 * a * log_alpha))

    def _drift(self, t: Array) -> Array:
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))


class VPCosine(_VariancePreserving):
    """Continuous cosine schedule (Improved DDPM, 2102.09672, eq. 17), t in [0, 1].

    alpha = cos(theta) / cos(theta_0) with theta = (t + s)/(1 + s) pi/2; alpha(1) = 0 exactly. Sampling starts
    at 0.9946 as in DPM-Solver, since lambda tends to -inf at t = 1.
    """

    t_start, t_end = 0.9946, 1e-3
    final_sigmas_type = "sigma_min"
    parameters = ("s",)

    def __init__(self, s: float = 0.008) -> None:
        self.s = number_argument("VPCosine", "s", s, inclusive=True)
        self._rate = 0.5 * math.pi / (1.0 + self.s)  # d theta / dt
        self._tan0, self._cos0 = math.tan(self.s * self._rate), math.cos(self.s * self._rate)

    def _log_alpha(self, t: Array) -> Array:
        # Each half in the form that does not cancel: 1 - alpha for small t, sin(pi/2 - theta) for large t.
        turn = self._rate * t
        loss = 2.0 * np.sin(0.5 * turn) ** 2 + np.sin(turn) * self._tan0
        noisy = np.log(np.sin(self._rate * (1.0 - t)) / self._cos0)
        return np.where(t < 0.5, np.log1p(-np.minimum(loss, 0.9)), noisy)

    def _t_of_log_alpha(self, log_alpha: Array) -> Array:
        # With tau = tan(rate t / 2) the definition is (2 - u) tau^2 + 2 tan0 tau - u = 0, u = 1 - alpha.
        u = -np.expm1(log_alpha)
        return 2.0 * np.arctan(u / (self._tan0 + np.sqrt(self._tan0**2 + u * (2.0 - u)))) / self._rate

    def _drift(self, t: Array) -> Array:
        return -self._rate / np.tan(self._rate * (1.0 - t))  # -tan(theta) d theta/dt


def named_betas(name: str, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Array:
    """The beta arrays known by name, in float64, with the formulas of diffusers.

    linear (DDPM, 2006.11239), scaled_linear (latent diffusion, 2112.10752), squaredcos_cap_v2 (2102.09672;
    ignores beta_start and beta_end, capped at 0.999), sigmoid (GeoDiff, 2203.02923).
    """
    n = int(num_train_timesteps)
    if n < 2:
        raise ValueError(f"named_betas: num_train_timesteps = {num_train_timesteps!r} is not accepted; give n >= 2")
    if name == "linear":
        return np.linspace(beta_start, beta_end, n)
    if name == "scaled_linear":
        return np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), n) ** 2
    if name == "squaredcos_cap_v2":
        alpha_bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.asarray(np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999))
    if name == "sigmoid":
        return (beta_end - beta_start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, n))) + beta_start
    raise ValueError(f"named_betas: beta schedule {name!r} is unknown; known are {', '.join(BETA_SCHEDULES)}")


def rescale_zero_terminal_snr(betas: Sequence[float] | Array) -> Array:
    """Betas shifted and scaled so that the last alpha is 0 and the first unchanged (2305.08891, algorithm
    1).
    """
    alpha = np.sqrt(np.cumprod(1.0 - np.asarray(betas, dtype=np.float64)))
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    squared = alpha**2
    return 1.0 - np.concatenate([squared[:1], squared[1:] / squared[:-1]])


class DiscreteBetas(_VariancePreserving):
    """A schedule given at N indices; the time is the fractional index, t in [-1, N - 1], and t = -1 is clean.

    Between indices log alpha is piecewise linear, as DPM-Solver interpolates (2206.00927, appendix D.4), with
    log alpha(-1) = 0. When the last beta is 1 (zero terminal SNR, 2305.08891) alpha(N - 1) is exactly 0 and
    log alpha
    has no linear interpolation: on that last segment alpha itself is interpolated. The drift jumps at the
    indices, where it is that of the cleaner segment, the one sampling enters.
    """

    clean_time, t_end = -1.0, 0.0
    default_grid = (
        "trailing"  # the one index spacing that starts at N - 1 and ends in a full step to clean (2305.08891)
    )
    parameters = ("betas",)

    def __init__(self, betas: Sequence[float] | Array, rescale_betas_zero_snr: bool = False) -> None:
        values = np.array(betas, dtype=np.float64)
        if values.ndim != 1 or values.size < 2:
            raise ValueError(
                f"DiscreteBetas: betas of shape {values.shape} is not accepted; give a vector of >= 2 values"
            )
        if rescale_betas_zero_snr:
            values = rescale_zero_terminal_snr(values)
        bad = ~((values > 0.0) & (values < 1.0))
        bad[-1] = not 0.0 < values[-1] <= 1.0
        if bad.any():
            i = int(bad.argmax())
            raise ValueError(
                f"DiscreteBetas: betas[{i}] = {values[i]:g} is not accepted; give 0 < beta < 1 (last: <= 1)"
            )
        with np.errstate(divide="ignore"):
            knots = np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-values))])
        self.betas: Array = values
        self.alphas_cumprod: Array = np.exp(2.0 * knots[1:])
        self.betas.flags.writeable = self.alphas_cumprod.flags.writeable = False
        self.num_train_timesteps = int(values.size)
        self.zero_terminal_snr = bool(values[-1] == 1.0)
        self.t_start = self.t_max = float(values.size - 1)
        self._knots = knots[:-1] if self.zero_terminal_snr else knots  # finite values of log alpha
        self._indices = np.arange(self._knots.size) - 1.0

    @classmethod
    def named(
        cls,
        name: str,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        rescale_betas_zero_snr: bool = False,
    ) -> DiscreteBetas:
        """`DiscreteBetas(named_betas(...))`; names: linear, scaled_linear, squaredcos_cap_v2, sigmoid."""
        return cls(named_betas(name, num_train_timesteps, beta_start, beta_end), rescale_betas_zero_snr)

    def _log_alpha(self, t: Array) -> Array:
        linear = np.asarray(np.interp(t, self._indices, self._knots))
        if not self.zero_terminal_snr:
            return linear
        left = self.t_max - t  # 1 at index N - 2, 0 at N - 1
        return np.where(left < 1.0, self._knots[-1] + np.log(np.minimum(left, 1.0)), linear)

    def _t_of_log_alpha(self, log_alpha: Array) -> Array:
        linear = np.asarray(np.interp(-log_alpha, -self._knots, self._indices))
        if not self.zero_terminal_snr:
            return linear
        return np.where(log_alpha < self._knots[-1], self.t_max - np.exp(log_alpha - self._knots[-1]), linear)

    def _drift(self, t: Array) -> Array:
        segment = np.clip(np.ceil(t).astype(np.int64), 0, self._knots.size - 2)
        slope = np.diff(self._knots)[segment]
        left = self.t_max - t
        return np.where(left < 1.0, -1.0 / left, slope) if self.zero_terminal_snr else slope

    def _key(self) -> Hashable:
        return self.betas.tobytes()

    def __repr__(self) -> str:
        ends = f"{self.betas[0]:.6g} to {self.betas[-1]:.6g}"
        return f"DiscreteBetas(<{self.num_train_timesteps} betas, {ends}>)"

    def to_dict(self) -> dict[str, Any]:
        return {"schedule": "DiscreteBetas", "betas": self.betas.tolist()}


class VE(NoiseSchedule):
    """Variance exploding with sigma as the time: alpha = 1, sigma(t) = t, t in [0, inf) (2206.00364's view of
    2011.13456). Times above sigma_max are valid, since churn raises sigma; f = 0 and g^2 = 2 sigma.
    """

    t_max = math.inf
    default_grid = "karras"
    parameters = ("sigma_min", "sigma_max")

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        name = type(self).__name__
        self.sigma_min = self.t_end = number_argument(name, "sigma_min", sigma_min)
        self.sigma_max = self.t_start = number_argument(name, "sigma_max", sigma_max, low=self.sigma_min)

    def _log_alpha(self, t: Array) -> Array:
        return np.zeros_like(t)

    def _sigma(self, t: Array) -> Array:
        return t.copy()

    def _t_of_log_snr(self, log_snr: Array) -> Array:
        return np.exp(-log_snr)

    def _drift(self, t: Array) -> Array:
        return np.zeros_like(t)

    def _diffusion_squared(self, t: Array) -> Array:
        return 2.0 * t


class EDM(VE):
    """The same mathematics as `VE` with the defaults of EDM (2206.00364, table 1): sigma from 80 to 0.002."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__(sigma_min, sigma_max)


class RectifiedFlow(NoiseSchedule):
    """Straight paths x_t = (1 - t) x0 + t eps, t in [0, 1] (2209.03003); f = -1/(1 - t), g^2 = 2 t/(1 - t).

    `shift` (SD3, 2403.03206, eq. 23) acts on grids through `shift_time` and leaves alpha and sigma alone.
    """

    t_start, t_end = 1.0, 1e-3
    default_grid = "uniform"
    parameters = ("shift",)

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = number_argument("RectifiedFlow", "shift", shift)

    def shift_time(self, u: Value) -> Value:
        """s u / (1 + (s - 1) u): where a uniform node u in [0, 1] lies once shifted towards the noise."""
        return self.shift * u / (self.shift * u + (1.0 - u))  # this form is exactly 1 at u = 1

    def unshift_time(self, t: Value) -> Value:
        """The inverse of `shift_time`."""
        return t / (t + self.shift * (1.0 - t))

    def _alpha(self, t: Array) -> Array:
        return 1.0 - t

    def _log_alpha(self, t: Array) -> Array:
        return np.log1p(-t)

    def _sigma(self, t: Array) -> Array:
        return t.copy()

    def _t_of_log_snr(self, log_snr: Array) -> Array:
        return np.exp(-np.logaddexp(0.0, log_snr))  # t = sigmoid(-lambda)

    def _drift(self, t: Array) -> Array:
        return -1.0 / (1.0 - t)

    def _diffusion_squared(self, t: Array) -> Array:
        return 2.0 * t / (1.0 - t)
