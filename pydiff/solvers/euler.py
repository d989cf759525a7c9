"""Euler and Heun on d(x / alpha) / d(sigma / alpha) = epsilon, with EDM's churn (2206.00364, Alg. 2)."""

from __future__ import annotations

import math

from pydiff.plans.builder import PlanBuilder, Point
from pydiff.plans.combination import Combination
from pydiff.solvers.registry import solver


def euler_step(b: PlanBuilder, s: Point, t: Point, d: Combination) -> Combination:
    """x at t after an Euler step in the noise ratio from x at s, with the estimate d of x0. Equal to DDIM's."""
    return (t.sigma / s.sigma) * b.x + (t.alpha - t.sigma * s.alpha / s.sigma) * d


def slope_weight(s: Point, t: Point) -> float:
    """alpha_t (ratio_t - ratio_s): what epsilon is multiplied with in an Euler step, in units of x at t."""
    return t.alpha * (t.ratio - s.ratio)


def churn(b: PlanBuilder, s: Point, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> Point:
    """Raise the noise level at s: x and the point it is at afterwards (2206.00364, Alg. 2, lines 4 to 6).

    The noise ratio grows by gamma = min(s_churn / n, sqrt(2) - 1), at most to the schedule's noisiest level.
    """
    gamma = min(s_churn / b.steps, math.sqrt(2.0) - 1.0) if s_tmin <= s.ratio <= s_tmax else 0.0
    limit = b.point(b.schedule.t_max).ratio if math.isfinite(b.schedule.t_max) else math.inf
    raised = min(s.ratio * (1.0 + gamma), limit)
    if gamma == 0.0 or raised <= s.ratio:
        return s
    hat = b.point_at(-math.log(raised))
    b.renoise(hat.alpha / s.alpha, s_noise * hat.alpha * math.sqrt(hat.ratio**2 - s.ratio**2))
    return hat


def check_churn(s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> None:
    """Raise ValueError for options of churn that are out of range."""
    if not (s_churn >= 0 and s_noise >= 0 and 0 <= s_tmin <= s_tmax):
        raise ValueError(
            "churn needs s_churn >= 0, s_noise >= 0 and 0 <= s_tmin <= s_tmax, got "
            f"s_churn={s_churn}, s_noise={s_noise}, s_tmin={s_tmin}, s_tmax={s_tmax}"
        )


@solver("euler", order=1, calls="1", paper="Elucidating the Design Space of Diffusion Models, 2206.00364, Alg. 2")
def euler(
    b: PlanBuilder, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> None:
    """Euler's method in the noise ratio sigma / alpha. Without churn it takes DDIM's steps.

    s_churn: how much noise is added before the steps, over all of them; 0 is none, and deterministic.
    s_tmin, s_tmax: noise is added where the noise ratio is between s_tmin and s_tmax.
    s_noise: factor on the added noise.
    """
    check_churn(s_churn, s_tmin, s_tmax, s_noise)
    for s, t in zip(b.points, b.points[1:]):
        hat = churn(b, s, s_churn, s_tmin, s_tmax, s_noise) if s_churn else s
        d = b.call(hat)
        b.write(x=euler_step(b, hat, t, d))


@solver(
    "heun",
    order=2,
    calls="2, 1 in a step from alpha = 0 or to sigma = 0",
    paper="Elucidating the Design Space of Diffusion Models, 2206.00364, Alg. 1 and 2",
)
def heun(
    b: PlanBuilder, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> None:
    """Heun's method (trapezoid) in the noise ratio. A step that ends at sigma = 0 is Euler's.

    s_churn: how much noise is added before the steps, over all of them; 0 is none, and deterministic.
    s_tmin, s_tmax: noise is added where the noise ratio is between s_tmin and s_tmax.
    s_noise: factor on the added noise.
    """
    check_churn(s_churn, s_tmin, s_tmax, s_noise)
    for s, t in zip(b.points, b.points[1:]):
        hat = churn(b, s, s_churn, s_tmin, s_tmax, s_noise) if s_churn else s
        d = b.call(hat)
        predicted = euler_step(b, hat, t, d)
        if t.sigma == 0 or hat.alpha == 0:
            b.write(x=predicted)
            continue
        # x_t = (alpha_t / alpha_s) x_s + w (epsilon_s + epsilon_t) / 2; the part known now waits in the base
        weight = 0.5 * slope_weight(hat, t)
        b.write(x=predicted, base=(t.alpha / hat.alpha) * b.x + weight * (b.x - hat.alpha * d) / hat.sigma)
        d = b.call(t)
        b.write(x=b.base + weight * (b.x - t.alpha * d) / t.sigma)
