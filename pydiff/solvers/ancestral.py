"""Ancestral sampling in rho = sigma / alpha, as k-diffusion does it: a step down too far, then fresh noise."""

from __future__ import annotations

import math

from pydiff.plans.builder import PlanBuilder, Point
from pydiff.solvers.registry import solver


def ancestral_split(s: Point, t: Point, eta: float) -> tuple[float, float]:
    """(rho_down, rho_up) with rho_down^2 + rho_up^2 = rho_t^2; rho_up is eta times the posterior's deviation."""
    ratio = t.rho / s.rho if math.isfinite(s.rho) else 0.0
    up = min(t.rho, eta * t.rho * math.sqrt(max(1.0 - ratio**2, 0.0)))
    return math.sqrt(max(t.rho**2 - up**2, 0.0)), up


@solver(
    "euler_ancestral",
    order=1,
    calls="1",
    stochastic=True,
    paper="k-diffusion, sample_euler_ancestral; the posterior of 2006.11239 eq. 7 in sigma / alpha",
)
def euler_ancestral(b: PlanBuilder, eta: float = 1.0, s_noise: float = 1.0) -> None:
    """Euler to rho_down, then noise of deviation rho_up. eta = 0 is Euler, eta = 1 is DDPM with the small variance."""
    if eta < 0 or s_noise < 0:
        raise ValueError(f"eta and s_noise must be at least 0, got eta={eta}, s_noise={s_noise}")
    for s, t in zip(b.points, b.points[1:]):
        d = b.call(s)
        down, up = ancestral_split(s, t, eta)
        # Euler on x / alpha from rho_s to rho_down, with alpha_s rho_s = sigma_s so that rho_s may be infinite
        x = (t.alpha * down / s.sigma) * b.x + t.alpha * (1.0 - down / s.rho) * d
        std = t.alpha * up * s_noise
        b.write(x=x + std * b.noise() if std else x)
