"""Basis probing: the complete linear map of a sampler, a peer's or a plan's, read off from unit vectors.

Without clipping, all that a sampler computes is linear in x_T, in the model's outputs and in its noise. So let the
batch be a basis: x_T is e_0, the model's output at call i is e_{i+1}, whatever it is given, and draw k is
e_{calls+1+k}. Then the batch after a call *is* its row of weights, and the rows of all calls, [calls, 1 + calls +
draws], are all there is to know of the sampler. (The last row alone would not do: a step to sigma = 0 forgets
everything but the last x0.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import pydiff
from pydiff.plans import table

Model = Callable[..., torch.Tensor]


class Basis:
    """Unit vectors [size, 1, 1, 1] along the batch: the start, one for each model call, one for each draw."""

    def __init__(self, calls: int, draws: int):
        self.size, self.calls, self.called = 1 + calls + draws, calls, 0
        self.start = self._unit(0)
        self.noise = torch.stack([self._unit(1 + calls + k) for k in range(draws)]) if draws else None

    def _unit(self, k: int) -> torch.Tensor:
        unit = torch.zeros(self.size, 1, 1, 1, dtype=torch.float64)
        unit[k] = 1.0
        return unit

    def model(self, *_: Any) -> torch.Tensor:
        """A model that ignores its input and answers with the next unit vector."""
        self.called += 1
        return self._unit(self.called)


def probe_diffusers(scheduler: Any, steps: int, calls: int) -> np.ndarray:
    """The map of a deterministic scheduler, in the scaling that it holds its sample in."""
    basis = Basis(calls, 0)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x, rows = basis.start, []
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        x = scheduler.step(basis.model(), t, x, return_dict=False)[0]
        rows.append(x.flatten().double().numpy())
    assert basis.called == calls
    return np.stack(rows)


def probe_plan(plan: pydiff.Plan) -> np.ndarray:
    """The map of a plan, by running it."""
    basis = Basis(len(plan), plan.num_draws)
    _, trajectory = pydiff.run_plan(
        plan, basis.model, basis.start, noise=basis.noise, dtype=torch.float64, return_trajectory=True
    )
    return trajectory[1:].flatten(1).numpy()


def compose_plan(plan: pydiff.Plan) -> np.ndarray:
    """The same from the table alone, by multiplying its rows together: no tensor operation takes part."""
    calls, size = len(plan), 1 + len(plan) + plan.num_draws
    unit = np.eye(size)
    registers = np.zeros((table.NUM_OPERANDS, size))
    registers[table.X] = plan.start_scale * unit[0]
    if plan.start_noise:
        registers[table.X] += plan.start_noise * unit[1 + calls]
    result = []
    for i in range(calls):
        row, index = plan.coefficients[i], plan.indices[i]
        registers[table.M] = unit[1 + i]
        registers[table.D] = row[table.OUTPUT] * registers[table.X] + row[table.OUTPUT + 1] * registers[table.M]
        for k, operand in enumerate((table.Z0, table.Z1)):
            draw = index[table.DRAW0 + k]
            registers[operand] = unit[1 + calls + draw] if draw >= 0 else 0.0
        new = plan.weights[i] @ registers
        registers[table.X] = new[0]
        result.append(new[0])
        for slot, value in zip(index[: table.DRAW0], new[1:]):
            if slot >= 0:
                registers[table.SLOT + slot] = value
    return np.stack(result)
