"""Ancestral sampling in the noise ratio sigma / alpha, as in k-diffusion: a step down too far, then fresh noise."""

from __future__ import annotations

import math

from pydiff.plans.builder import PlanBuilder, Point
from pydiff.solvers.registry import solver


def ancestral_split(s: Point, t: Point, eta: float) -> tuple[float, float]:
    """The noise ratio at t in two parts, down^2 + up^2 = ratio_t^2; up is eta times the posterior's deviation."""
    shrinking = t.ratio / s.ratio if math.isfinite(s.ratio) else 0.0
    up = min(t.ratio, eta * t.ratio * math.sqrt(max(1.0 - shrinking**2, 0.0)))
    return math.sqrt(max(t.ratio**2 - up**2, 0.0)), up


@solver(
    "euler_ancestral",
    order=1,
    calls="1",
    stochastic=True,
    paper="k-diffusion, sample_euler_ancestral; the posterior of 2006.11239 eq. 7 in sigma / alpha",
)
def euler_ancestral(b: PlanBuilder, eta: float = 1.0, s_noise: float = 1.0) -> None:
    """Euler to below the next noise ratio, then fresh noise up to it.

    eta: 0 is Euler, 1 is DDPM with the small variance. s_noise: factor on the noise.
    """
    if eta < 0 or s_noise < 0:
        raise ValueError(f"eta and s_noise must be at least 0, got eta={eta}, s_noise={s_noise}")
    for s, t in zip(b.points, b.points[1:]):
        d = b.call(s)
        down, up = ancestral_split(s, t, eta)
        # Euler on x / alpha from ratio_s to down, with alpha_s ratio_s = sigma_s so that ratio_s may be infinite
        x = (t.alpha * down / s.sigma) * b.x + t.alpha * (1.0 - down / s.ratio) * d
        std = t.alpha * up * s_noise
        b.write(x=x + std * b.noise() if std else x)
