"""Euler-Maruyama on the reverse-time SDE in the schedule's own time (2011.13456, eq. 6)."""

from __future__ import annotations

import math

from pydiff.plans.builder import PlanBuilder
from pydiff.solvers.registry import solver


@solver(
    "euler_maruyama",
    order=1,
    calls="1",
    stochastic=True,
    exact_mean=False,
    paper="Score-Based Generative Modeling through SDEs, 2011.13456, eq. 6 and App. D",
)
def euler_maruyama(b: PlanBuilder, last_noise: bool = False) -> None:
    """dx = [f x - g^2 score] dt + g dw, one explicit step an interval. The order is the weak one.

    last_noise: also add the noise of the last step (False: return the mean, as score_sde does).
    """
    for i, (s, t) in enumerate(zip(b.points, b.points[1:])):
        d = b.call(s, "epsilon")
        dt = s.t - t.t
        f, g2 = float(b.schedule.drift(s.t)), float(b.schedule.diffusion_squared(s.t))
        x = (1.0 - f * dt) * b.x - (g2 * dt / s.sigma) * d  # score = -epsilon / sigma
        noisy = last_noise or i < b.steps - 1
        b.write(x=x + math.sqrt(g2 * dt) * b.noise() if noisy else x)
