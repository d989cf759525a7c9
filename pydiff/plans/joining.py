"""One plan after another: the fields of the plan that runs both."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydiff.plans import table
from pydiff.plans.base import PlanError, PlanTable


def joined(first: PlanTable, second: PlanTable) -> dict[str, Any]:
    """The fields of a plan that runs `second` from where `first` ends; `PlanError` where they do not meet."""
    _check_ends_meet(first, second)
    last, last_index = _last_stage(first, second)
    later = second.indices.copy()
    later[:, table.DRAW0 :] += np.where(later[:, table.DRAW0 :] >= 0, first.num_draws, 0)
    same_time = second.times[0] == first.times[-1]
    return {
        "solver": first.solver if first.solver == second.solver else f"{first.solver}+{second.solver}",
        "coefficients": np.concatenate([first.coefficients[:-1], [last], second.coefficients]),
        "indices": np.concatenate([first.indices[:-1], [last_index], later]),
        "times": np.concatenate([first.times, second.times[1:] if same_time else second.times]),
        "alpha": np.concatenate([first.alpha[:-1], second.alpha]),
        "sigma": np.concatenate([first.sigma[:-1], second.sigma]),
        "targets": first.targets + second.targets,
        "start_scale": first.start_scale,
        "start_noise": first.start_noise,
        "init_std": first.init_std,
        "slot_names": max(first.slot_names, second.slot_names, key=len),
        "config": {"concatenated": [first.config, second.config]},
    }


def _check_ends_meet(first: PlanTable, second: PlanTable) -> None:
    begin = np.array([second.alpha[0], second.sigma[0]])
    reached = np.array([first.alpha[-1], first.sigma[-1]]) * second.start_scale
    reached[1] = np.hypot(reached[1], second.start_noise)
    if not np.allclose(begin, reached, rtol=1e-6, atol=1e-9):
        raise PlanError(
            f"the first plan ends at (alpha, sigma) = {tuple(reached)}, the second begins at {tuple(begin)}; "
            "compile the second with t_start where the first ends"
        )
    if ("known" in first.operands) != ("known" in second.operands):
        raise PlanError("one plan is compiled with known=True and the other is not: a mask would serve one only")


def _last_stage(first: PlanTable, second: PlanTable) -> tuple[np.ndarray, np.ndarray]:
    """The last row of `first`, which also does what `second` does to x before its first call."""
    row, index = first.coefficients[-1].copy(), first.indices[-1].copy()
    row[: table.NUM_OPERANDS] *= second.start_scale
    known = row[table.KNOWN : table.KNOWN + 3]  # weights of the known tensor, z0 and z1
    free: int | None = None
    if second.start_noise:
        free = next((k for k in range(2) if index[table.DRAW0 + k] < 0), None)
        if free is None:
            raise PlanError("the last stage of the first plan already uses two draws; no room for the renoising one")
        row[table.Z0 + free] = second.start_noise
        index[table.DRAW0 + free] = first.num_draws
    if known[0] != 0 and (second.start_noise or second.start_scale != 1):
        # The known region goes to the level that `second` begins at, with the noise it has, or else the fresh draw.
        draw = next((k for k in range(2) if known[1 + k] != 0), None)
        draw = free if draw is None else draw
        known[0] = second.alpha[0]
        if draw is not None and second.sigma[0] != 0:
            known[1 + draw] = second.sigma[0]
    return row, index
