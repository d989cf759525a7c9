"""Singlestep DPM-Solver and DPM-Solver++: up to three calls inside a step, nothing kept from the step before."""

from __future__ import annotations

import math
from itertools import accumulate

from pydiff.plans.builder import PlanBuilder, Point
from pydiff.plans.combination import Combination
from pydiff.solvers.exponential import Transfer, step_size
from pydiff.solvers.multistep import leave_pure_noise

NODES = ("log_snr", "grid")


def blocks(b: PlanBuilder, order: int, nodes: str) -> list[list[Point]]:
    """The points that each step visits: its start, its inner nodes, and its end.

    nodes "log_snr": a step is one interval of the grid with inner nodes at equal distances in log-SNR (2206.00927,
    Alg. 1 and 2: r = 1/2; 1/3 and 2/3). "grid": a step spans `order` intervals and its inner nodes are the grid's
    own, so that n intervals cost n calls; the remainder of n by order is taken with lower orders (as diffusers does).
    A step to sigma = 0 is of first order and spans one interval, and so is one from pure noise.
    """
    if nodes not in NODES:
        raise ValueError(f"nodes must be one of {', '.join(NODES)}, got {nodes!r}")
    if nodes == "grid":
        orders = _grid_orders(b.steps, order, b.points[0].alpha == 0, b.points[-1].sigma == 0)
        starts = accumulate(orders, initial=0)
        return [b.points[i : i + k + 1] for i, k in zip(starts, orders)]
    result = []
    for s, t in zip(b.points, b.points[1:]):
        h = step_size(s, t)
        inner = [] if math.isinf(h) else [b.point_at(s.log_snr + h * k / order) for k in range(1, order)]
        result.append([s, *inner, t])
    return result


def _grid_orders(steps: int, order: int, noisy_start: bool, clean_end: bool) -> list[int]:
    full, rest = divmod(steps - noisy_start, order)
    orders = [1] * noisy_start + [order] * full + ([rest] if rest else [])
    if clean_end and orders[-1] > 1:
        orders[-1:] = [orders[-1] - 1, 1]
    return orders


def singlestep_block(b: PlanBuilder, block: list[Point], target: str, inner_type: str, final_type: str) -> None:
    """One step through `block` (2206.00927, Alg. 1 and 2; 2211.01095, Alg. 1). Types: "midpoint" or "heun".

    Sums that later calls need wait in the base (the part of the result known so far) and in the history (the part of
    the second inner value), so x and the first d need not be kept themselves.
    """
    s, t = block[0], block[-1]
    if target == "epsilon" and s.alpha == 0:
        return leave_pure_noise(b, s, t)
    h = step_size(s, t)
    fraction = [step_size(s, p) / h for p in block[1:-1]]
    final = Transfer(s, t, target)
    d = b.call(s, target)
    result = final.carry * b.x + final.phi(0) * d
    if not fraction:
        b.write(x=result)
        return

    def inner(k: int) -> Combination:
        step = Transfer(s, block[k], target)
        return step.carry * b.x + step.phi(0) * d

    def slope(step: Transfer, kind: str) -> float:
        return 0.5 * step.phi(0) if kind == "midpoint" else step.phi(1)

    if len(fraction) == 1:
        weight = slope(final, final_type) / fraction[0]  # of d(u) - d(s)
        b.write(x=inner(1), base=result - weight * d)
        b.write(x=b.base + weight * b.call(block[1], target))
        return
    # two inner nodes: d(u1) serves the second inner value only, d(u2) the result
    weight1 = slope(Transfer(s, block[2], target), inner_type) * fraction[1] / fraction[0]
    weight2 = final.phi(1) / fraction[1]
    b.write(x=inner(1), base=result - weight2 * d, push=inner(2) - weight1 * d)
    b.write(x=b.history(1) + weight1 * b.call(block[1], target))
    b.write(x=b.base + weight2 * b.call(block[2], target))
