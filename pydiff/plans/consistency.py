"""Whether a plan's coefficients agree with one another, whatever the solver: data at a single point is followed."""

from __future__ import annotations

import numpy as np

from pydiff.plans import table
from pydiff.plans.base import PlanError, PlanTable

MEAN_TOLERANCE = 1e-9


def mean_defect(plan: PlanTable, noise: bool = True) -> float:
    """How far the plan strays from alpha * c + sigma * e at any call or at the end, for data that is the one point c.

    The perfect model then answers x0 = c, and every register holds a multiple of c plus a multiple of the noise e it
    started with (and of fresh noise, whose mean is zero). Exponential integrators follow that line exactly, whatever
    their order, and so does any consistent set of weights; with fresh noise it is the mean, the multiple of c, that
    must. Relative to the largest multiple on the way. noise: False where the plan is to have another amount of noise
    than its levels say, so that the multiple of c alone counts.
    """
    state = np.zeros((table.NUM_OPERANDS, 2))  # multiples of c and of e
    state[table.X] = plan.alpha[0], plan.sigma[0]
    checked = 2 if noise and not plan.stochastic else 1
    levels = np.stack([plan.alpha, plan.sigma], axis=1)
    largest, defect = 1.0, 0.0
    for i, weights in enumerate(plan.weights):
        target = np.array([1.0, 0.0])
        if plan.targets[i] == "epsilon":
            target = (state[table.X] - plan.alpha[i] * target) / plan.sigma[i]
        w_x, w_m = plan.coefficients[i, table.OUTPUT : table.OUTPUT + 2]
        state[table.D] = target
        state[table.M] = (target - w_x * state[table.X]) / w_m
        new = weights @ state
        largest = max(largest, float(np.abs(new).max()))
        defect = max(defect, float(np.abs(new[0] - levels[i + 1])[:checked].max()))
        state[table.X] = new[0]
        for k, slot in enumerate(plan.indices[i, : table.DRAW0]):
            if slot >= 0:
                state[table.SLOT + slot] = new[k + 1]
    return defect / largest


def check_mean(plan: PlanTable, noise: bool = True) -> None:
    """Raise `PlanError` if the mean strays by more than rounding; a start at a small alpha divides that by it twice."""
    smallest = plan.alpha[plan.alpha > 0].min(initial=1.0)
    allowed = max(MEAN_TOLERANCE, 8.0 * np.finfo(np.float64).eps / smallest**2)
    defect = mean_defect(plan, noise)
    if not defect <= allowed:
        raise PlanError(
            f"{plan.solver}: the coefficients are inconsistent: data at a single point is missed by "
            f"{defect:.3g} (relative, {allowed:.1g} allowed)"
        )
