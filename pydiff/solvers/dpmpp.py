"""DPM-Solver++ (2211.01095): exponential integrators for x0, and the SDE variant."""

from __future__ import annotations

import math

from pydiff.plans.builder import PlanBuilder, Point
from pydiff.solvers.exponential import phi, step_size
from pydiff.solvers.multistep import check_order_options, derivatives, multistep, order_at
from pydiff.solvers.registry import solver
from pydiff.solvers.singlestep import blocks, singlestep_block

_PAPER = "DPM-Solver++, 2211.01095"


@solver("dpmpp_2s", order=2, calls="2, 1 in a step from alpha = 0 or to sigma = 0", paper=f"{_PAPER}, Alg. 1")
def dpmpp_2s(b: PlanBuilder, solver_type: str = "midpoint", nodes: str = "log_snr") -> None:
    """DPM-Solver++(2S): singlestep of order 2.

    solver_type: "midpoint" or "heun", the form of the second-order term.
    nodes: "log_snr" puts the inner calls of a step at equal distances in log-SNR; with "grid" a step spans as many
    intervals as it has calls and makes them at the grid's own times, as diffusers does.
    """
    check_order_options(solver_type, False)
    for block in blocks(b, 2, nodes):
        singlestep_block(b, block, "sample", solver_type, solver_type)


@solver("dpmpp_2m", order=2, calls="1", paper=f"{_PAPER}, Alg. 2")
def dpmpp_2m(b: PlanBuilder, solver_type: str = "midpoint", lower_order_final: bool | str = "auto") -> None:
    """DPM-Solver++(2M): multistep of order 2.

    solver_type: "midpoint" or "heun", the form of the second-order term.
    lower_order_final: whether the last steps are of lower order; "auto": in runs of fewer than 15 steps.
    """
    multistep(b, "sample", 2, solver_type, lower_order_final)


@solver("dpmpp_3m", order=2, calls="1", paper=f"{_PAPER}, App. B")
def dpmpp_3m(
    b: PlanBuilder, solver_type: str = "midpoint", lower_order_final: bool | str = "auto", compat: bool = False
) -> None:
    """DPM-Solver++(3M): multistep of order 3, started by one step each of order 1 and 2 (so of order 2 as a whole).

    solver_type: "midpoint" or "heun", the form of the second-order term.
    lower_order_final: whether the last steps are of lower order; "auto": in runs of fewer than 15 steps.
    compat: with diffusers' half second derivative (see `multistep.derivatives`).
    """
    multistep(b, "sample", 3, solver_type, lower_order_final, compat)


class SdeTransfer:
    """One step of the SDE for x0 (2211.01095, eq. 14), noise scaled as k-diffusion's eta does: eta = tau^2.

    x_t = (sigma_t / sigma_s) e^{-eta h} x_s + alpha_t (1 - e^{-(1 + eta) h}) D_0 + ... + std z
    """

    def __init__(self, s: Point, t: Point, eta: float):
        h = step_size(s, t)
        damping = eta * h if eta else 0.0
        self.alpha, self.grown = t.alpha, h + damping
        self.carry = t.sigma / s.sigma * math.exp(-damping)
        self.std = t.sigma * math.sqrt(-math.expm1(-2.0 * damping))

    def phi(self, k: int) -> float:
        """Weight of the k-th derivative of x0, in units of the log-SNR stretched by 1 + eta."""
        if k == 0:
            return -self.alpha * math.expm1(-self.grown)
        return self.alpha * self.grown * phi(k + 1, -self.grown)


@solver("dpmpp_2m_sde", order=1, calls="1", stochastic=True, paper=f"{_PAPER}, App. B.5: SDE-DPM-Solver++(2M)")
def dpmpp_2m_sde(
    b: PlanBuilder,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    lower_order_final: bool | str = "auto",
) -> None:
    """SDE-DPM-Solver++(2M): multistep on the SDE. The order is the weak one, at eta = 1.

    eta: 0 is DPM-Solver++(2M), 1 is the diffusion SDE itself.
    s_noise: factor on the noise.
    solver_type: "midpoint" or "heun", the form of the second-order term.
    lower_order_final: whether the last steps are of lower order; "auto": in runs of fewer than 15 steps.
    """
    check_order_options(solver_type, lower_order_final)
    if eta < 0 or s_noise < 0:
        raise ValueError(f"eta and s_noise must be at least 0, got eta={eta}, s_noise={s_noise}")
    for i, (s, t) in enumerate(zip(b.points, b.points[1:])):
        d = b.call(s)
        terms = derivatives(b, b.points, i, d, order_at(b.points, i, 2, lower_order_final))
        step = SdeTransfer(s, t, eta)
        x = step.carry * b.x + step.phi(0) * d
        if terms:
            x = x + (0.5 * step.phi(0) if solver_type == "midpoint" else step.phi(1)) * terms[0]
        std = step.std * s_noise
        b.write(x=x + std * b.noise() if std else x, push=d)
