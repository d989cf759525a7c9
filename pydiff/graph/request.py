"""One call of a sampler with everything decided: what the captured loop is asked to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from pydiff.plans.plan import Plan
from pydiff.run.beginning import check_dtypes, check_operands, check_x, distinct_plans, seed_values
from pydiff.run.loop import callback_stops, model_arguments
from pydiff.run.model import Model
from pydiff.run.noise_source import NoiseSource, check_only_one, from_generator, source_of
from pydiff.run.options import RunOptions


class Layout(NamedTuple):
    """What decides the shapes of a captured loop's buffers, beside the number of stages."""

    device: torch.device
    """With its number, where it has one."""
    shape: tuple[int, ...]
    """Of the samples, [B, *sample]."""
    dtype: torch.dtype
    """Of the state."""
    model_dtype: torch.dtype
    """Of the model's input."""
    copies: int
    """Rows of the model's input for each row of the batch: 2 for [unconditional; conditional], or 1."""
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
    """A call of a sampler.

    Attributes:
        layout: what its buffers look like.
        model, arguments: what is called, and with which keywords for the whole run.
        plans, row_plan: the distinct plans, and which of them each row follows.
        indices: of each plan, its draws numbered as the noise's buffer has them.
        x: x_T, or None where it is drawn from the seeds.
        seeds, source: one seed a row; the caller's noise in their place, or None.
        operands: mask, known, constant and extra, those that are given.
        stops: the stages after which the callback is called.
        options: what the caller said besides.
    """

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
    stops: frozenset[int]
    options: RunOptions

    @property
    def rows_of_tables(self) -> int:
        """Stages of all plans together."""
        return sum(map(len, self.plans))

    def spans(self) -> list[int]:
        """The run cut into numbers of stages between which the host has something to do."""
        each = self.options.return_trajectory or (self.source is not None and self.source.is_function)
        if not each and not self.stops:
            return [self.total]
        ends = range(1, self.total + 1) if each else sorted({*(k + 1 for k in self.stops), self.total})
        return [end - start for start, end in zip([0, *ends], ends)]


def make_request(
    plan: Plan | Sequence[Plan],
    model: Model,
    x: torch.Tensor | None,
    options: RunOptions,
    *,
    shape: tuple[int, ...],
    device: torch.device,
) -> Request:
    """A request out of what `run_plan` takes; x may be None, to be drawn in `shape` [B, *sample] on `device`."""
    check_only_one(options.seed, options.noise, options.generator)
    dtype = options.dtype or torch.float32
    model_dtype = options.model_dtype or dtype
    check_dtypes(dtype, model_dtype)
    device = _indexed(device)
    if x is not None:
        check_x(x)
    plans, row_plan = distinct_plans(plan, shape[0])
    operands = options.operands()
    check_operands(plans, **operands)
    source = None
    if options.generator is not None or options.noise is not None:
        like = torch.empty((), dtype=dtype, device=device).expand(shape)
        noise = options.noise if options.generator is None else from_generator(options.generator, like)
        source = source_of(noise, plans, like)
    kept = 0 if source is None or not plans[0].num_draws else len(source.buffer)
    guided = any(p.guided for p in plans)
    present = {name: value for name, value in operands.items() if value is not None}
    layout = Layout(
        device,
        shape,
        dtype,
        model_dtype,
        copies=2 if guided else 1,
        operands=tuple(present),
        draws=round_up(kept),
        fresh=x is None,
        starts=any(p.start_scale != 1 or p.start_noise != 0 for p in plans),
    )
    total = max((len(plans[k]) for k in set(row_plan)), default=0)
    return Request(
        layout,
        model,
        plans,
        row_plan,
        indices=[p.indices for p in plans] if source is None else [source.indices],
        x=x,
        seeds=seed_values(options.seed, shape[0]),
        source=source,
        total=total,
        arguments=model_arguments(options, guided, shape[0], device, model_dtype),
        operands=present,
        stops=callback_stops(options.callback, options.callback_stages, total),
        options=options,
    )


def round_up(number: int) -> int:
    """To a power of two: what is somewhat larger next time then fits the same buffers."""
    return 1 << (number - 1).bit_length() if number > 0 else 0


def _indexed(device: torch.device) -> torch.device:
    """The device with its number: "cuda" alone means whichever is current, which may change."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())
