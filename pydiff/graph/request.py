"""One call of a sampler with everything decided: what the captured loop is asked to run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from pydiff.plans.plan import Plan
from pydiff.run.loop import Callback, Model, callback_stages, model_arguments
from pydiff.run.noise_source import Noise, NoiseSource, check_only_one, from_generator, source_of
from pydiff.run.state import Seed, check_dtypes, check_operands, check_x, distinct_plans, seed_values


class Layout(NamedTuple):
    """What decides the shapes of a captured loop's buffers, beside the number of stages."""

    device: torch.device
    shape: tuple[int, ...]
    dtype: torch.dtype
    model_dtype: torch.dtype
    copies: int
    operands: tuple[str, ...]
    """Which of mask, known, constant and extra are given."""
    draws: int
    """How many draws of the caller's noise are kept at once; 0 where noise comes from the seeds."""
    fresh: bool
    """Whether x_T is drawn from the seeds, rather than given."""
    starts: bool
    """Whether a plan adds noise to x_T, or scales it, before the first call of the model."""


@dataclass
class Request:
    """A call of a sampler. `plans` are the distinct ones, `row_plan` says which of them each row follows."""

    layout: Layout
    model: Model
    plans: Sequence[Plan]
    row_plan: Sequence[int]
    indices: Sequence[np.ndarray]
    x: torch.Tensor | None
    seeds: list[int]
    source: NoiseSource | None
    total: int
    """Stages until the last row has finished."""
    arguments: dict[str, Any]
    operands: dict[str, torch.Tensor]
    callback: Callback | None
    stops: frozenset[int]
    progress: bool
    return_trajectory: bool
    check_finite: bool
    hoist: bool

    @property
    def rows_of_tables(self) -> int:
        return sum(map(len, self.plans))

    def spans(self) -> list[int]:
        """The run cut into numbers of stages between which the host has something to do."""
        if not self.stops and not self.return_trajectory and self.source is None:
            return [self.total]
        each = self.return_trajectory or (self.source is not None and self.source.is_function)
        ends = range(1, self.total + 1) if each else sorted({*(k + 1 for k in self.stops), self.total})
        return [end - start for start, end in zip([0, *ends], ends)]


def make_request(
    plan: Plan | Sequence[Plan],
    model: Model,
    x: torch.Tensor | None,
    *,
    shape: tuple[int, ...],
    device: torch.device,
    seed: Seed | None = None,
    seeds: list[int] | None = None,
    noise: Noise | None = None,
    generator: Any = None,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    dtype: torch.dtype,
    model_dtype: torch.dtype,
    callback: Callback | None = None,
    callback_steps: int | Collection[int] = 1,
    progress: bool = False,
    return_trajectory: bool = False,
    check_finite: bool = True,
    hoist: bool = True,
    mask: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    constant: torch.Tensor | None = None,
    extra: torch.Tensor | None = None,
) -> Request:
    """A request out of the arguments of `run_plan`; x may be None, to be drawn in `shape` [B, *sample] on `device`.

    seeds: in place of seed, what `seed_values` made of it.
    """
    check_only_one(seed=seed, noise=noise, generator=generator)
    check_dtypes(dtype, model_dtype)
    device = _indexed(device)
    if x is not None:
        check_x(x)
    plans, row_plan = distinct_plans(plan, shape[0])
    operands = {"mask": mask, "known": known, "constant": constant, "extra": extra}
    check_operands(plans, **operands)
    source = None
    if generator is not None or noise is not None:
        like = torch.empty((), dtype=dtype, device=device).expand(shape)
        source = source_of(noise if generator is None else from_generator(generator, like), plans, like)
    kept = 0 if source is None or not plans[0].num_draws else len(source.buffer)
    guided = any(p.guided for p in plans)
    present = {name: value for name, value in operands.items() if value is not None}
    starts = any(p.start_scale != 1 or p.start_noise != 0 for p in plans)
    layout = Layout(
        device, shape, dtype, model_dtype, 2 if guided else 1, tuple(present), round_up(kept), x is None, starts
    )
    total = max((len(plans[k]) for k in set(row_plan)), default=0)
    return Request(
        layout,
        model,
        plans,
        row_plan,
        [p.indices for p in plans] if source is None else [source.indices],
        x,
        seeds or seed_values(seed, shape[0]),
        source,
        total,
        model_arguments(cond, uncond, guided, shape[0]),
        present,
        callback,
        callback_stages(callback, callback_steps, total),
        progress,
        return_trajectory,
        check_finite,
        hoist,
    )


def round_up(number: int) -> int:
    """To a power of two: what is somewhat larger next time then fits the same buffers."""
    return 1 << (number - 1).bit_length() if number > 0 else 0


def _indexed(device: torch.device) -> torch.device:
    """The device with its number: "cuda" alone means whichever is current, which may change."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())
