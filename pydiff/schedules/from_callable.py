"""A noise schedule from any decreasing log-SNR, half or full, with a numerical inverse and derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from pydiff.schedules.base import Array, NoiseSchedule, number_argument


def _derivative_weights(nodes: range) -> Array:
    """Weights w with f'(0) = sum_k w_k f(node_k), exact for polynomials of degree len(nodes) - 1."""
    powers = np.vander(np.array(nodes, dtype=np.float64), increasing=True).T
    return np.linalg.solve(powers, np.eye(len(nodes))[1])


_CENTRED = _derivative_weights(range(-4, 5))
_BACKWARD = _derivative_weights(range(-8, 1))


SCALES = {"half": 1.0, "full": 2.0}
"""Multiples of log(alpha / sigma) that go by the name of log-SNR."""


class FromLogSNR(NoiseSchedule):
    """A schedule from any strictly decreasing log-SNR, for instance a learned one.

    t is the argument of fn, in [clean_time, t_start]. A default grid runs evenly in log(alpha / sigma) from t_start to
    t_end, and ends there. With lambda = log(alpha / sigma), half of the papers' log-SNR:

        variance preserving:    alpha^2 = sigmoid(2 lambda),    sigma^2 = sigmoid(-2 lambda)
        otherwise:              alpha = 1,                      sigma = exp(-lambda)

    Args:
        fn: the log-SNR at time t, on the scale that `scale` names. It takes a float64 array, or failing that one
            float at a time, and is called only for times in (clean_time, t_start].
        t_start, t_end: noisiest time, and last noisy time; clean_time < t_end < t_start.
        variance_preserving: which of the two pairs above.
        clean_time: where sigma is 0 by definition, whatever fn tends to.
        scale: "half": fn is lambda = log(alpha / sigma), the half-log-SNR of DPM-Solver (2206.00927), which `log_snr`
            answers with. "full": fn is log(alpha^2 / sigma^2) = 2 lambda, the log-SNR of VDM (2107.00630, eq. 4),
            whose gamma is its negative: give ``lambda t: -gamma(t)`` with scale="full".

    The inverse bisects to the last bit; the derivative is an 8th-order difference, about 1e-10 relative for smooth fn.

    Raises: ValueError if fn is not finite and strictly decreasing on [t_end, t_start], for times out of order, and for
        an unknown scale.

    Example:
        schedule = pydiff.FromLogSNR(lambda t: 13.3 - 18.3 * t, scale="full")  # VDM's linear gamma
        assert abs(schedule.log_snr(0.5) - 0.5 * (13.3 - 18.3 * 0.5)) < 1e-12  # half of it
    """

    final_sigmas_type = "sigma_min"

    def __init__(
        self,
        fn: Callable[[Any], Any],
        t_start: float = 1.0,
        t_end: float = 1e-3,
        variance_preserving: bool = True,
        *,
        clean_time: float = 0.0,
        scale: str = "half",
    ) -> None:
        if scale not in SCALES:
            raise ValueError(
                f"FromLogSNR: scale = {scale!r} is not accepted; give 'half' where fn is log(alpha / sigma), or 'full' "
                "where it is log(alpha^2 / sigma^2)"
            )
        self.fn, self.scale = fn, scale
        self.clean_time = number_argument("FromLogSNR", "clean_time", clean_time, low=-math.inf)
        self.t_end = number_argument("FromLogSNR", "t_end", t_end, low=self.clean_time)
        self.t_start = self.t_max = number_argument("FromLogSNR", "t_start", t_start, low=self.t_end)
        self.variance_preserving = bool(variance_preserving)
        self._t_low = self.clean_time + 1e-6 * (self.t_end - self.clean_time)  # where the inverse stops looking
        grid = np.linspace(self.t_end, self.t_start, 257)
        values = self._call(grid)
        bad = ~np.isfinite(values) | np.concatenate([[False], ~(np.diff(values) < 0.0)])
        if bad.any():
            i = int(bad.argmax())
            raise ValueError(
                f"FromLogSNR: fn({grid[i]:g}) = {values[i] * SCALES[scale]:g} is not accepted; the log-SNR must be "
                f"finite and strictly decreasing on [t_end, t_start] = [{self.t_end:g}, {self.t_start:g}]"
            )

    def _call(self, t: Array) -> Array:
        flat = np.ravel(t)
        try:
            values = np.asarray(self.fn(flat), dtype=np.float64)
        except (TypeError, ValueError):
            values = np.empty(0)
        if values.shape != flat.shape:  # fn takes one number at a time
            values = np.array([float(self.fn(float(x))) for x in flat], dtype=np.float64)
        return values.reshape(np.shape(t)) / SCALES[self.scale]

    def _log_snr(self, t: Array) -> Array:
        clean = t == self.clean_time
        return np.where(clean, np.inf, self._call(np.where(clean, self.t_end, t)))

    def _log_alpha(self, t: Array) -> Array:
        if not self.variance_preserving:
            return np.zeros_like(t)
        return -0.5 * np.logaddexp(0.0, -2.0 * self._log_snr(t))

    def _sigma(self, t: Array) -> Array:
        log_snr = self._log_snr(t)
        return np.exp(-0.5 * np.logaddexp(0.0, 2.0 * log_snr) if self.variance_preserving else -log_snr)

    def _t_of_log_snr(self, log_snr: Array) -> Array:
        low, high = np.full(log_snr.shape, self._t_low), np.full(log_snr.shape, self.t_max)
        unreached = np.isfinite(log_snr) & (log_snr > self._call(low))
        for _ in range(128):  # halves the interval until no float lies inside
            middle = 0.5 * (low + high)
            if np.all((middle == low) | (middle == high)):
                break
            noisier = self._call(middle) < log_snr
            low, high = np.where(noisier, low, middle), np.where(noisier, middle, high)
        nearest = np.where(abs(self._call(low) - log_snr) < abs(self._call(high) - log_snr), low, high)
        return np.where(unreached, np.nan, nearest)

    def _slope(self, t: Array) -> Array:
        """d lambda / dt: 9-point differences with a shrinking step, of which the two that agree best are
        trusted.
        """
        estimates = []
        for level in range(8):
            step = 0.005 * 0.25**level * (t - self.clean_time)
            backward = t + 4.0 * step > self.t_max  # fn may not exist beyond t_max
            estimate = np.zeros_like(t)
            for centred, one_sided, k in zip(_CENTRED, _BACKWARD, range(-4, 5), strict=True):
                values = self._call(t + np.where(backward, k - 4, k) * step)
                estimate += np.where(backward, one_sided, centred) * values / step
            estimates.append(estimate)
        best = np.argmin(np.abs(np.diff(estimates, axis=0)), axis=0)
        return np.asarray(np.take_along_axis(np.asarray(estimates), best[None], axis=0)[0])

    def _drift(self, t: Array) -> Array:
        # d log alpha / d lambda = sigma^2 for VP.
        return self._sigma(t) ** 2 * self._slope(t) if self.variance_preserving else np.zeros_like(t)

    def _diffusion_squared(self, t: Array) -> Array:
        return -2.0 * self._sigma(t) ** 2 * self._slope(t)

    def _key(self) -> Hashable:
        return (self.fn, self.t_start, self.t_end, self.variance_preserving, self.clean_time, self.scale)

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        return f"FromLogSNR({name}, t_start={self.t_start!r}, t_end={self.t_end!r}, scale={self.scale!r})"

    def to_dict(self) -> dict[str, Any]:
        """Raises ValueError: a function cannot be saved. Plans compiled with this schedule can."""
        raise ValueError(
            "FromLogSNR.to_dict: a Python callable cannot be saved; tabulate it, for instance "
            "DiscreteBetas(1 - alpha[1:]**2 / alpha[:-1]**2), or keep the plan in memory"
        )
