"""What the multistep solvers share: which order a step takes, and the derivatives of d from its history."""

from __future__ import annotations

import math

from pydiff.plans.builder import PlanBuilder, Point
from pydiff.plans.combination import Combination
from pydiff.solvers.exponential import Transfer, step_size

FEW_STEPS = 15
"""`lower_order_final="auto"` lowers the order of the last steps of runs shorter than this, as diffusers does."""


def check_order_options(solver_type: str, lower_order_final: bool | str) -> None:
    """Raise ValueError for options that a solver of exponential integrators does not know."""
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"solver_type must be 'midpoint' or 'heun', got {solver_type!r}")
    if lower_order_final not in (True, False, "auto"):
        raise ValueError(f"lower_order_final must be True, False or 'auto', got {lower_order_final!r}")


def order_at(points: list[Point], i: int, order: int, lower_order_final: bool | str) -> int:
    """Order of step i (0-based) of a multistep solver: limited by the history there is and by the end of the run.

    History from a point of pure noise (log-SNR of -inf) cannot be interpolated and does not count. A step to
    sigma = 0 has infinite h and is of first order.
    """
    steps = len(points) - 1
    if points[i + 1].sigma == 0:
        return 1
    usable = sum(math.isfinite(p.log_snr) for p in points[max(i + 1 - order, 0) : i + 1])
    order = min(order, max(usable, 1))
    lower = steps < FEW_STEPS if lower_order_final == "auto" else lower_order_final
    return min(order, steps - i) if lower else order


def derivatives(
    b: PlanBuilder, points: list[Point], i: int, d: Combination, order: int, *, halve_second: bool = False
) -> list[Combination]:
    """h^k D_k for k = 1 .. order - 1 at point i: the derivatives in log-SNR of the polynomial through the history.

    h is the step from point i to i + 1; the history holds d at points i - 1, i - 2. halve_second reproduces a factor
    1/2 that diffusers' third-order multistep code has at D_2 (it takes the divided difference for the derivative).
    """
    h = step_size(points[i], points[i + 1])
    if order == 1:
        return []
    r0 = step_size(points[i - 1], points[i]) / h
    first = (d - b.history(1)) / r0
    if order == 2:
        return [first]
    r1 = step_size(points[i - 2], points[i - 1]) / h
    second = (first - (b.history(1) - b.history(2)) / r1) / (r0 + r1)  # h^2 times the second divided difference
    return [first + r0 * second, second if halve_second else 2.0 * second]


def extrapolate(
    b: PlanBuilder, step: Transfer, d: Combination, terms: list[Combination], solver_type: str
) -> Combination:
    """x after the step. "midpoint" takes phi_1 / 2 in place of phi_2 where the order is two (2211.01095, eq. 12)."""
    x = step.carry * b.x + step.phi(0) * d
    if len(terms) == 1 and solver_type == "midpoint":
        return x + (0.5 * step.phi(0)) * terms[0]
    for k, term in enumerate(terms, start=1):
        x = x + step.phi(k) * term
    return x


def leave_pure_noise(b: PlanBuilder, s: Point, t: Point) -> None:
    """The step from alpha = 0 for a solver of epsilon, which tells nothing of x0 there: of first order, in x0."""
    d = b.call(s, "sample")
    step = Transfer(s, t, "sample")
    b.write(x=step.carry * b.x + step.phi(0) * d)


def multistep(
    b: PlanBuilder, target: str, order: int, solver_type: str, lower_order_final: bool | str, compat: bool = False
) -> None:
    """DPM-Solver (target "epsilon") and DPM-Solver++ (target "sample"), multistep, of order 1 to 3."""
    check_order_options(solver_type, lower_order_final)
    for i, (s, t) in enumerate(zip(b.points, b.points[1:])):
        if target == "epsilon" and s.alpha == 0:
            leave_pure_noise(b, s, t)
            continue
        d = b.call(s, target)
        this_order = order_at(b.points, i, order, lower_order_final)
        terms = derivatives(b, b.points, i, d, this_order, halve_second=compat)
        b.write(x=extrapolate(b, Transfer(s, t, target), d, terms, solver_type), push=d)
