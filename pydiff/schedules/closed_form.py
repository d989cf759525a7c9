"""Noise schedules: how much signal and how much noise a sample holds at time t, in float64 on the host.

Every schedule describes x_t = alpha(t) x0 + sigma(t) eps with eps ~ N(0, I), and answers in closed form

    log_snr(t) = log(alpha / sigma)         lambda, half of the papers' log-SNR (2206.00927), decreasing
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
    """The variance-preserving SDE with beta(t) linear in t (Score SDE, 2011.13456, eq. 33).

        log alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2,    sigma(t)^2 = 1 - alpha(t)^2

    t lies in [0, 1]: 0 is clean, 1 is nearly all noise. A default grid runs evenly in log(alpha / sigma) from
    t_start = 1 to t_end = 1e-3, and ends there.

    Args:
        beta_min, beta_max: beta(0) and beta(1), > 0.

    Raises: ValueError for a beta that is not finite and above 0.

    Example:
        schedule = pydiff.VPLinear()
        assert abs(schedule.alpha(0.5) ** 2 + schedule.sigma(0.5) ** 2 - 1) < 1e-12
        plan = pydiff.make_plan("dpmpp_2m", schedule, steps=20)
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
    """The cosine schedule in continuous time (Improved DDPM, 2102.09672, eq. 17).

        alpha(t) = cos(theta(t)) / cos(theta(0)),    theta(t) = (t + s) / (1 + s) * pi / 2,    sigma^2 = 1 - alpha^2

    t lies in [0, 1]: 0 is clean, and alpha(1) = 0 exactly. A default grid runs evenly in log(alpha / sigma) from
    t_start = 0.9946, as in DPM-Solver, since that tends to -inf at t = 1, to t_end = 1e-3, and ends there.

    Args:
        s: offset that keeps the noise of the first steps from being too small, >= 0.

    Raises: ValueError for an s that is not finite and at least 0.

    Example:
        schedule = pydiff.VPCosine()
        assert schedule.alpha(1.0) == 0.0
        plan = pydiff.make_plan("dpmpp_2m", schedule, steps=20, prediction="v_prediction")
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
    """The beta arrays known by name, float64 [num_train_timesteps], with the formulas of diffusers.

    Args:
        name: "linear" (DDPM, 2006.11239), "scaled_linear" (latent diffusion, 2112.10752), "squaredcos_cap_v2"
            (2102.09672; ignores beta_start and beta_end, capped at 0.999) or "sigmoid" (GeoDiff, 2203.02923).
        num_train_timesteps: at least 2.
        beta_start, beta_end: the first and the last beta, in (0, 1).

    Raises: ValueError for an unknown name and for fewer than 2 timesteps.
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
    """Betas shifted and scaled so that the last alpha is 0 and the first unchanged (2305.08891, algorithm 1)."""
    alpha = np.sqrt(np.cumprod(1.0 - np.asarray(betas, dtype=np.float64)))
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    squared = alpha**2
    return 1.0 - np.concatenate([squared[:1], squared[1:] / squared[:-1]])


class DiscreteBetas(_VariancePreserving):
    """A schedule given at the N indices a model was trained on (DDPM, 2006.11239, eq. 4).

        alpha(k)^2 = (1 - betas[0]) ... (1 - betas[k]),    sigma(k)^2 = 1 - alpha(k)^2

    t is the index, fractions included, in [-1, N - 1]; t = -1 is clean. A default grid has the "trailing" spacing from
    t_start = N - 1, and ends in a step to the clean time; t_end = 0.

    Between indices log alpha is piecewise linear, as DPM-Solver interpolates (2206.00927, appendix D.4), with
    log alpha(-1) = 0. When the last beta is 1 (zero terminal SNR, 2305.08891) alpha(N - 1) is exactly 0 and log alpha
    has no linear interpolation: on that last segment alpha itself is interpolated. The drift jumps at the indices,
    where it is that of the cleaner segment, the one sampling enters.

    Args:
        betas: [N] variances of the forward steps, N >= 2, each in (0, 1); the last may be 1.
        rescale_betas_zero_snr: shift and scale them so that alpha(N - 1) = 0 (2305.08891, algorithm 1).

    Attributes:
        betas: float64 [N], rescaled where that was asked for.
        alphas_cumprod: float64 [N], alpha^2 at the indices.
        num_train_timesteps: N.
        zero_terminal_snr: whether alpha(N - 1) = 0.

    Raises: ValueError naming the first beta that is out of range, and for fewer than 2.

    Example:
        schedule = pydiff.DiscreteBetas.named("scaled_linear", beta_start=0.00085, beta_end=0.012)  # Stable Diffusion
        assert schedule.t_start == 999 and schedule.alpha(-1.0) == 1.0
        plan = pydiff.make_plan("ddim", schedule, steps=50)
    """

    clean_time, t_end = -1.0, 0.0
    # The one index spacing that starts at N - 1 and ends in a full step to clean (2305.08891).
    default_grid = "trailing"
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
        """A schedule from betas that go by a name, with the formulas of diffusers.

        Args:
            name: "linear" (DDPM, 2006.11239), "scaled_linear" (latent diffusion, 2112.10752), "squaredcos_cap_v2"
                (2102.09672; ignores beta_start and beta_end) or "sigmoid" (GeoDiff, 2203.02923).
            num_train_timesteps: how many betas, at least 2.
            beta_start, beta_end: the first and the last beta, in (0, 1).
            rescale_betas_zero_snr: make the last alpha 0 (2305.08891, algorithm 1).

        Raises: ValueError for an unknown name and for values out of range.
        """
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
    """Variance exploding, with sigma as the time (2011.13456, eq. 9, in the time of 2206.00364).

        alpha(t) = 1,    sigma(t) = t,    f = 0,    g^2 = 2 t

    t lies in [0, inf); times above sigma_max are valid, since churn raises sigma. A default grid is Karras' from
    t_start = sigma_max to t_end = sigma_min, and goes on to 0. x_T has the standard deviation sigma_max.

    Args:
        sigma_min: the last noise level of a default grid, > 0.
        sigma_max: the first, > sigma_min.

    Raises: ValueError unless 0 < sigma_min < sigma_max, both finite.

    Example:
        schedule = pydiff.VE(sigma_min=0.02, sigma_max=100.0)
        assert schedule.alpha(7.0) == 1.0 and schedule.sigma(7.0) == 7.0
        plan = pydiff.make_plan("euler_ancestral", schedule, steps=30)
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
    """The same mathematics as `VE` (alpha = 1, sigma = t) with the noise levels of EDM (2206.00364, table 1).

    t is sigma, in [0, inf); a default grid is Karras' from t_start = sigma_max = 80 to t_end = sigma_min = 0.002, and
    goes on to 0. For a network of EDM's, or a diffusers EDM scheduler, see `EDMPrecond`.

    Args:
        sigma_min: the last noise level of a default grid, > 0.
        sigma_max: the first, > sigma_min.

    Raises: ValueError unless 0 < sigma_min < sigma_max, both finite.

    Example:
        plan = pydiff.make_plan("heun", pydiff.EDM(), steps=18, prediction=pydiff.EDMPrecond(sigma_data=0.5))
        assert len(plan) == 35  # Heun calls the model twice a step, and once in the last
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__(sigma_min, sigma_max)


class RectifiedFlow(NoiseSchedule):
    """Straight paths from data to noise: x_t = (1 - t) x0 + t eps (rectified flow, 2209.03003, eq. 1).

        alpha(t) = 1 - t,    sigma(t) = t,    f = -1 / (1 - t),    g^2 = 2 t / (1 - t)

    t lies in [0, 1]: 0 is clean, 1 is all noise. A default grid is uniform from t_start = 1 to the clean time itself;
    t_end = 1e-3 is the last noisy time of other grids.

    Args:
        shift: > 0; moves the nodes of uniform grids towards the noise (SD3, 2403.03206, eq. 23) and leaves alpha and
            sigma alone. 1 is no shift.

    Raises: ValueError for a shift that is not finite and above 0.

    Example:
        schedule = pydiff.RectifiedFlow(shift=3.0)
        plan = pydiff.make_plan("euler", schedule, steps=28, prediction="flow_prediction")
        assert plan.times[0] == 1.0 and plan.times[-1] == 0.0
    """

    t_start, t_end = 1.0, 1e-3
    default_grid = "uniform"
    parameters = ("shift",)

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = number_argument("RectifiedFlow", "shift", shift)

    def shift_time(self, u: Value) -> Value:
        """shift * u / (1 + (shift - 1) * u): where a uniform node u in [0, 1] lies once shifted towards the noise."""
        return self.shift * u / (self.shift * u + (1.0 - u))  # this form is exactly 1 at u = 1

    def unshift_time(self, t: Value) -> Value:
        """The inverse of `shift_time`: the uniform node that is shifted to time t."""
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
