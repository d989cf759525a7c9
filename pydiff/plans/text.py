"""How a plan prints: one line a stage, with the combinations written out."""

from __future__ import annotations

import math

import numpy as np

from pydiff.plans import table
from pydiff.plans.base import PlanTable


def operand_names(plan: PlanTable, stage: int) -> list[str]:
    """Names of the operands as stage `stage` sees them: slots by what they hold, draws by their number."""
    slots = [f"{name}{k}" if name == "h" else name for k, name in enumerate(plan.slot_names)]
    slots += [f"s{k}" for k in range(len(slots), table.NUM_SLOTS)]
    draws = [f"z{int(n)}" for n in plan.indices[stage, table.DRAW0 :]]
    return ["x", *slots, "d", "m", "constant", "extra", *draws]


def format_combination(weights: np.ndarray, names: list[str]) -> str:
    """ "0.5 x - 2 d"."""
    text = ""
    for weight, name in zip(weights, names):
        if weight == 0:
            continue
        sign = " - " if weight < 0 else " + "
        factor = "" if abs(weight) == 1 else f"{abs(weight):.6g} "
        text += (sign if text else sign.strip(" +")) + factor + name
    return text or "0"


def format_stage(plan: PlanTable, i: int) -> list[str]:
    """The cells of one line: stage, model time, alpha, sigma, d, and every write."""
    row, names = plan.coefficients[i], operand_names(plan, i)
    d = format_combination(row[table.OUTPUT : table.OUTPUT + 2], ["x", "m"])
    low, high = row[table.CLIP : table.CLIP + 2]
    if math.isfinite(low) or math.isfinite(high):
        d = f"clip({d}, {low:g}, {high:g})"
    writes = ["x <- " + format_combination(plan.weights[i, 0], names)]
    for k, slot in enumerate(plan.indices[i, : table.DRAW0], start=1):
        if slot >= 0:
            writes.append(f"{names[table.SLOT + slot]} <- " + format_combination(plan.weights[i, k], names))
    scale = row[table.INPUT_SCALE]
    inputs = f"{row[table.TIME]:.6g}" + (f", {scale:.6g} x" if scale != 1 else "")
    return [str(i), inputs, f"{plan.alpha[i]:.5g}", f"{plan.sigma[i]:.5g}", d, ";  ".join(writes)]


def format_plan(plan: PlanTable) -> str:
    """A table with a heading, as text."""
    header = ["stage", "model time", "alpha", "sigma", "d", "writes"]
    rows = [header, *(format_stage(plan, i) for i in range(len(plan)))]
    widths = [max(len(row[k]) for row in rows) for k in range(len(header) - 1)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1]]).rstrip() for row in rows]
    target = " and ".join(sorted(set(plan.targets)))
    title = (
        f"{plan.solver}: {len(plan)} model calls, {len(plan.times) - 1} steps, keeps {plan.num_slots} tensors "
        f"beside x, {plan.num_draws} noise draws; d is the estimated {target}"
    )
    start = []
    if plan.start_scale != 1 or plan.start_noise != 0:
        start = [f"start: x <- {plan.start_scale:.6g} x + {plan.start_noise:.6g} z0"]
    end = f"end: alpha {plan.alpha[-1]:.5g}, sigma {plan.sigma[-1]:.5g} at time {plan.times[-1]:.6g}"
    return "\n".join([title, *start, *lines, end])
