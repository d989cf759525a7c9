"""DDPM and DDIM: one step from s to t, from the posterior of x_t given x_s and the estimated x0."""

from __future__ import annotations

import math

from pydiff.plans.builder import PlanBuilder, Point
from pydiff.solvers.exponential import step_size
from pydiff.solvers.registry import solver


def posterior_variance(s: Point, t: Point) -> tuple[float, float]:
    """Variance of x_t given x_s and x0, and of x_s given x_t (2006.11239 eq. 7, for any alpha and sigma).

    s is the noisier one. sigma_{s|t}^2 = sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2, written as
    sigma_s^2 (1 - exp(-2 h)), does not cancel.
    """
    transition = -(s.sigma**2) * math.expm1(-2.0 * step_size(s, t))
    return transition * t.sigma**2 / s.sigma**2, transition


@solver(
    "ddpm",
    order=1,
    calls="1",
    stochastic=True,
    paper="Denoising Diffusion Probabilistic Models, 2006.11239, Alg. 2 and eq. 7",
)
def ddpm(b: PlanBuilder, variance: str = "small") -> None:
    """Ancestral sampling.

    variance: "small" (the posterior's) or "large" (the forward step's beta).
    """
    if variance not in ("small", "large"):
        raise ValueError(f"variance must be 'small' or 'large', got {variance!r}")
    for s, t in zip(b.points, b.points[1:]):
        d = b.call(s)
        small, transition = posterior_variance(s, t)
        mean = (t.alpha * transition / s.sigma**2) * d + (s.alpha / t.alpha * t.sigma**2 / s.sigma**2) * b.x
        std = math.sqrt(small if variance == "small" else transition) if t.sigma > 0 else 0.0
        b.write(x=mean + std * b.noise() if std else mean)


@solver("ddim", order=1, calls="1", paper="Denoising Diffusion Implicit Models, 2010.02502, eq. 12 and 16")
def ddim(b: PlanBuilder, eta: float = 0.0, use_clipped_model_output: bool = True) -> None:
    """DDIM: the estimated x0 and the estimated noise, put together at the next noise level.

    eta: 0 is deterministic, 1 is DDPM with the small variance. Between them the noise is eta times DDPM's.
    use_clipped_model_output: derive epsilon from the clipped x0 (False: from the raw output, as diffusers does by
    default). They differ only where a clip acts.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    for s, t in zip(b.points, b.points[1:]):
        d = b.call(s)
        std = eta * math.sqrt(posterior_variance(s, t)[0]) if eta else 0.0
        direction = math.sqrt(max(t.sigma**2 - std**2, 0.0))
        if use_clipped_model_output:
            epsilon = (b.x - s.alpha * d) / s.sigma
        else:
            w_x, w_m = b.prediction.weights("epsilon", s.alpha, s.sigma)
            epsilon = w_x * b.x + w_m * b.m
        x = t.alpha * d + direction * epsilon
        b.write(x=x + std * b.noise() if std else x)
