"""Noise that the caller brings: a tensor, a function, or a `torch.Generator`, in place of the counter-based noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pydiff.plans import table
from pydiff.plans.plan import Plan

NoiseFunction = Callable[[int], torch.Tensor]
Noise = torch.Tensor | NoiseFunction


def window(indices: np.ndarray) -> int:
    """How many draws must be kept at once: from the oldest still to be used to the newest used so far."""
    used = indices[:, table.DRAW0 :]
    newest = np.maximum.accumulate(used.max(1))
    needed = np.where(used >= 0, used, np.iinfo(np.int32).max).min(1)
    oldest = np.minimum.accumulate(needed[::-1])[::-1]
    return int(np.maximum(newest - oldest + 1, 1).max())


class NoiseSource:
    """Feeds a caller's noise to the stage operation, draw by draw, in a buffer [window, *x.shape].

    Draw number k lies at k % window; `indices` are the plan's with draw numbers taken modulo that. A tensor
    [draws, *x.shape] is used as it is. Functions are called once a draw, in order, with the draw number.
    """

    def __init__(self, plan: Plan, noise: Noise, x: torch.Tensor):
        self.indices = plan.indices
        self._next = 0
        self._function: NoiseFunction | None = None
        if isinstance(noise, torch.Tensor):
            expected = (plan.num_draws, *x.shape)
            if noise.shape[1:] != x.shape or noise.shape[0] < plan.num_draws:
                raise ValueError(
                    f"noise must have shape {list(expected)} (draws, then the shape of x), got {list(noise.shape)}"
                )
            self.buffer = noise.to(dtype=x.dtype, device=x.device)
            return
        if not callable(noise):
            raise TypeError(f"noise must be a tensor or a function of the draw number, got {type(noise).__name__}")
        self._function = noise
        size = window(plan.indices)
        self.buffer = torch.empty((size, *x.shape), dtype=x.dtype, device=x.device)
        self.indices = plan.indices.copy()
        draws = self.indices[:, table.DRAW0 :]
        self._last = draws.max(1, initial=-1)
        draws[...] = np.where(draws >= 0, draws % size, -1)

    @property
    def is_function(self) -> bool:
        """Whether draws come from a function, which cannot be asked for the same draw twice, rather than a tensor."""
        return self._function is not None

    def draw(self) -> torch.Tensor:
        """The next draw: a tensor of the shape of x."""
        k, shape = self._next, self.buffer.shape[1:]
        self._next += 1
        if self._function is None:
            return self.buffer[k]
        value = self._function(k)
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            got = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"noise({k}) must return a tensor of shape {list(shape)}, got {got}")
        target = self.buffer[k % len(self.buffer)]
        return target.copy_(value)

    def prepare(self, stage: int) -> None:
        """Draw what stage `stage` needs and is not there yet."""
        if self._function is not None:
            while self._next <= self._last[stage]:
                self.draw()


def source_of(noise: Noise | None, plans: Sequence[Plan], x: torch.Tensor) -> NoiseSource | None:
    """The caller's noise for samples like x; raises where rows follow several plans, which would share its draws."""
    if noise is None:
        return None
    if len(plans) > 1:
        raise ValueError(f"noise= serves one plan, but the rows follow {len(plans)}; use seeds")
    return NoiseSource(plans[0], noise, x)


def check_only_one(seed: Any, noise: Any, generator: Any) -> None:
    """Raise if more than one of seed, noise and generator is given."""
    if (seed is not None) + (noise is not None) + (generator is not None) > 1:
        raise TypeError("give at most one of seed, noise and generator")


def from_generator(generator: torch.Generator | Sequence[torch.Generator], x: torch.Tensor) -> NoiseFunction:
    """Noise from torch's own generators: one for the batch, or one a row, drawn on each generator's device."""
    if isinstance(generator, torch.Generator):
        return lambda k: torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
    rows = list(generator) if isinstance(generator, Sequence) else [generator]
    if len(rows) != x.shape[0] or not all(isinstance(g, torch.Generator) for g in rows):
        raise ValueError(
            f"generator must be one torch.Generator or one for each of the {x.shape[0]} rows, got {generator!r:.80}"
        )
    return lambda k: torch.stack(
        [torch.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype).to(x.device) for g in rows]
    )
