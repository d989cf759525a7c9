"""DPM-Solver (2206.00927): exponential integrators for epsilon, singlestep and multistep."""

from __future__ import annotations

from pydiff.plans.builder import PlanBuilder
from pydiff.solvers.multistep import check_order_options, multistep
from pydiff.solvers.registry import solver
from pydiff.solvers.singlestep import blocks, singlestep_block

_PAPER = "DPM-Solver, 2206.00927"


def _dpm_solver(
    b: PlanBuilder, order: int, method: str, solver_type: str, nodes: str, lower_order_final: bool | str, compat: bool
) -> None:
    if method == "multistep":
        return multistep(b, "epsilon", order, solver_type, lower_order_final, compat)
    if method != "singlestep":
        raise ValueError(f"method must be 'singlestep' or 'multistep', got {method!r}")
    check_order_options(solver_type, lower_order_final)
    if order == 3 and solver_type == "heun":
        raise ValueError(
            "solver_type 'heun' is defined for order 2 and for multistep; "
            "leave it at 'midpoint', or give method='multistep'"
        )
    # The inner value of order 3 has phi_2 in the paper (Alg. 2); diffusers takes solver_type there too.
    inner_type = solver_type if nodes == "grid" else "heun"
    for block in blocks(b, order, nodes):
        singlestep_block(b, block, "epsilon", inner_type, solver_type)


@solver("dpm_solver_1", order=1, calls="1", paper=f"{_PAPER}, eq. 3.7; equal to DDIM")
def dpm_solver_1(b: PlanBuilder) -> None:
    """DPM-Solver-1: DDIM, written for epsilon."""
    multistep(b, "epsilon", 1, "midpoint", False)


@solver(
    "dpm_solver_2",
    order=2,
    calls="2, 1 in a step from alpha = 0 or to sigma = 0; multistep: 1",
    paper=f"{_PAPER}, Alg. 1; multistep: 2211.01095, App. B",
)
def dpm_solver_2(
    b: PlanBuilder,
    method: str = "singlestep",
    solver_type: str = "midpoint",
    nodes: str = "log_snr",
    lower_order_final: bool | str = "auto",
) -> None:
    """DPM-Solver-2, singlestep or multistep.

    method: "singlestep" or "multistep".
    solver_type: "midpoint" or "heun", the form of the second-order term.
    nodes: of singlestep: "log_snr" puts the inner calls of a step at equal distances in log-SNR; with "grid" a step
    spans as many intervals as it has calls and makes them at the grid's own times, as diffusers does.
    lower_order_final: of multistep: whether the last steps are of lower order; "auto": in runs of fewer than 15 steps.
    """
    _dpm_solver(b, 2, method, solver_type, nodes, lower_order_final, False)


@solver(
    "dpm_solver_3",
    order=3,
    calls="3, 1 in a step from alpha = 0 or to sigma = 0; multistep: 1",
    paper=f"{_PAPER}, Alg. 2; multistep: 2211.01095, App. B",
    order_rule=lambda method, **_: 3 if method == "singlestep" else 2,
)
def dpm_solver_3(
    b: PlanBuilder,
    method: str = "singlestep",
    solver_type: str = "midpoint",
    nodes: str = "log_snr",
    lower_order_final: bool | str = "auto",
    compat: bool = False,
) -> None:
    """DPM-Solver-3, singlestep, or multistep started by one step each of order 1 and 2 (so of order 2 as a whole).

    method: "singlestep" or "multistep".
    solver_type: "midpoint" or "heun", the form of the second-order term; "heun" is for multistep.
    nodes: of singlestep: "log_snr" puts the inner calls of a step at equal distances in log-SNR; with "grid" a step
    spans as many intervals as it has calls and makes them at the grid's own times, as diffusers does.
    lower_order_final: of multistep: whether the last steps are of lower order; "auto": in runs of fewer than 15 steps.
    compat: multistep with diffusers' half second derivative (see `multistep.derivatives`).
    """
    _dpm_solver(b, 3, method, solver_type, nodes, lower_order_final, compat)
