"""UniPC (2302.04867): a predictor of any order, and a corrector that reuses the next call of the model."""

from __future__ import annotations

import math

import numpy as np

from pydiff.plans.builder import PlanBuilder, Point
from pydiff.plans.combination import Combination
from pydiff.solvers.exponential import Transfer, phi, step_size
from pydiff.solvers.multistep import leave_pure_noise, order_at
from pydiff.solvers.registry import solver


def unipc_weights(z: float, fractions: list[float], variant: str) -> list[float]:
    """The a_m of 2302.04867, eq. 3 and Theorem 3.1: solve R a = b for nodes at `fractions` of the step, times B(h) / z.

    z is h for epsilon and -h for x0; R[k, m] = fractions[m]^k; b[k] = (k + 1)! z phi_{k+2}(z) / B, with B = z (bh1) or
    e^z - 1 (bh2). With one node a = 1/2, which any B allows to first order (App. F).
    Returned are B * a: what multiplies (d_m - d_0) / fractions[m].
    """
    bound = z if variant == "bh1" else math.expm1(z)
    if len(fractions) == 1:
        return [0.5 * bound]
    matrix = np.vander(fractions, increasing=True).T
    right = [math.factorial(k + 1) * z * phi(k + 2, z) for k in range(len(fractions))]
    return [float(a) for a in np.linalg.solve(matrix, np.array(right))]


def unipc_step(
    step: Transfer, z_sign: float, x: Combination, d0: Combination, nodes: list[tuple[float, Combination]], variant: str
) -> Combination:
    """x at the end of a step from x and d0, with further values of d at fractions `nodes` of the step."""
    result = step.carry * x + step.phi(0) * d0
    if nodes:
        scale = step.scale * z_sign  # alpha_t phi terms in x0 carry the sign of z = -h
        weights = unipc_weights(step.z, [r for r, _ in nodes], variant)
        for weight, (fraction, d) in zip(weights, nodes):
            result = result + (scale * weight / fraction) * (d - d0)
    return result


@solver(
    "unipc",
    order=3,
    calls="1",
    paper="UniPC, 2302.04867, Alg. 1 to 4",
    order_rule=lambda order, corrector, **_: min(order, 2) + bool(corrector),
)
def unipc(
    b: PlanBuilder,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool = True,
    predict_x0: bool = True,
    lower_order_final: bool | str = "auto",
) -> None:
    """UniPC-p: order p predictor (UniP), raised by one by the corrector (UniC), at one call a step.

    order: of the predictor, 1 to 3. variant: "bh1" or "bh2", the function B(h). corrector: use UniC.
    predict_x0: integrate x0 (False: epsilon).
    lower_order_final: whether the last steps are of lower order; "auto": in runs of fewer than 15 steps.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant must be 'bh1' or 'bh2', got {variant!r}")
    target, sign = ("sample", -1.0) if predict_x0 else ("epsilon", 1.0)
    points, previous = b.points, 1
    for i, (s, t) in enumerate(zip(points, points[1:])):
        if not predict_x0 and s.alpha == 0:
            leave_pure_noise(b, s, t)
            continue
        d = b.call(s, target)
        x = b.x
        if corrector and i > 0 and _correctable(points[i - 1], s, variant, target):
            # x was predicted from the base, the corrected x of the point before; d is the new node at its end.
            nodes = _past_nodes(b, points, i - 1, previous, first=2) + [(1.0, d)]
            step = Transfer(points[i - 1], s, target)
            x = unipc_step(step, sign, b.base, b.history(1), nodes, variant)
        previous = order_at(points, i, order, lower_order_final)
        nodes = _past_nodes(b, points, i, previous, first=1)
        b.write(x=unipc_step(Transfer(s, t, target), sign, x, d, nodes, variant), base=x if corrector else None, push=d)


def _correctable(s: Point, t: Point, variant: str, target: str) -> bool:
    """Whether the step s to t has a corrector: B(h) must be finite, and epsilon says nothing where alpha is 0."""
    return math.isfinite(step_size(s, t)) or (variant == "bh2" and target == "sample")


def _past_nodes(b: PlanBuilder, points: list[Point], i: int, order: int, first: int) -> list[tuple[float, Combination]]:
    """The order - 1 values of d before point i, at (negative) fractions of the step i to i + 1."""
    h = step_size(points[i], points[i + 1])
    return [((points[i - k].log_snr - points[i].log_snr) / h, b.history(first + k - 1)) for k in range(1, order)]
