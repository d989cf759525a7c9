"""How a run begins: the state before the first model call, and what has to be true of its arguments."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pydiff.ops.native import is_plain
from pydiff.ops.noise import INITIAL_DRAW, normal
from pydiff.ops.stage import MODEL_DTYPES, StageTensors, write_first_model_input
from pydiff.plans import table
from pydiff.plans.plan import Plan
from pydiff.run.noise_source import Noise, NoiseSource, source_of
from pydiff.run.options import InitOptions, Seed, StateOptions, takes
from pydiff.run.state import State, first_stages


class Seeds(list[int]):
    """One seed for each row, as `seed_values` has checked them."""


def seed_values(seed: Seed | None, rows: int) -> Seeds:
    """One seed a row: the given ones; from one number s the seeds s, s + 1, ...; from None random ones.

    Raises: TypeError for what are no integers; ValueError for another number of them, or beyond 64 bits.
    """
    if isinstance(seed, Seeds) and len(seed) == rows:
        return seed
    if seed is None:
        seed = int(torch.randint(0, 2**62, ()))
    if isinstance(seed, (bool, float)):
        raise TypeError(f"seed must be an integer or one for each row, got {seed!r}")
    if isinstance(seed, (int, np.integer)):
        values = list(range(int(seed), int(seed) + rows))
    else:
        try:
            values = [operator.index(s) for s in seed]
        except TypeError as error:
            raise TypeError(f"seed must be an integer or one for each row, got {seed!r:.80}") from error
    if len(values) != rows:
        raise ValueError(f"seed must be one integer or one for each of the {rows} rows, got {len(values)} seeds")
    if values and not -(2**63) <= min(values) <= max(values) < 2**63:
        outside = next(s for s in values if not -(2**63) <= s < 2**63)
        raise ValueError(f"seed must fit 64 bits, got {outside}")
    return Seeds(values)


def row_seeds(seed: Seed | None, rows: int, device: torch.device) -> torch.Tensor:
    """int64 [rows] on `device`: see `seed_values`."""
    return _on_device(seed_values(seed, rows), torch.int64, device)


def _on_device(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of the host in a tensor of their own; to a GPU without waiting for what it is doing."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and is_plain(tensor):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def initial_noise(shape: Sequence[int], seeds: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The noise that a `Sampler` starts from: standard normals, a function of each row's seed alone.

    Args:
        shape: [B, *sample].
        seeds: int64 [B], one for each row, on the device where the noise is wanted.
        dtype: float32, or float64 holding the same values.

    Returns: [B, *sample] in `dtype` on the device of seeds. x_T is ``plan.init_std`` times it.

    Raises: ValueError for seeds that are no int64 tensor [B], and for another dtype.

    Example:
        z = pydiff.initial_noise((2, 3, 8, 8), torch.tensor([5, 6]))
        assert torch.equal(z[1:], pydiff.initial_noise((1, 3, 8, 8), torch.tensor([6])))  # whatever the batch
    """
    return normal(seeds, INITIAL_DRAW, shape[1:], dtype=dtype)


@takes(InitOptions)
def init(plan: Plan | Sequence[Plan], x: torch.Tensor, options: InitOptions) -> State:
    """The state before the first model call.

    Args (`pydiff.run.options.InitOptions` says them in full):
        plan: one plan for all rows, or one for each.
        x: x_T [B, *sample] at the plan's first noise level (plan.init_std * noise); it is copied, not changed.
        seed: of the noise that a stochastic plan adds: s (row k takes s + k), one for each row, or None: random.
        noise: that noise itself, [plan.num_draws, *x.shape], or a function of the draw number.
        dtype: of the state, float32 (the default) or float64.
        model_dtype: of the model's input: float32, bfloat16, float16 or float64; `dtype` by default.
        mask, known: where mask is 1 stands known, a clean image (inpainting); both broadcast to x.
        constant, extra: the tensors that a plan's operands of that name stand for; they broadcast to x.
        copies: how many rows of the model's input each row of the batch has: 1, or 2 for [unconditional; conditional]
            rows. By default 2 where a plan is guided; with 1 its guidance scale has no effect.

    Returns: the state, on the device of x.

    Raises: TypeError for an x that is no floating-point batch, for seeds that are no integers and for noise that is
        neither tensor nor function; ValueError for plans, seeds or noise that do not fit the rows, dtypes that there
        are not, another `copies`, operands that do not broadcast to x, a mask without known (or a plan that was not
        compiled with ``known=True``), and operands that the plan needs and did not get.

    Example:
        model = pydiff.load_model("mnist")
        plan = pydiff.make_plan("ddim", pydiff.VPCosine(), steps=4, prediction="v_prediction", guidance_scale=2.0)
        state = pydiff.init(plan, pydiff.initial_noise((1, 1, 28, 28), torch.tensor([0])))
        labels = torch.tensor([model.null_label, 3])  # of the rows [unconditional; conditional]
        while not state.finished:
            state = pydiff.step(state, model(state.model_input, state.model_time, labels))
    """
    return begin(plan, x, options, options.noise, options.copies)


@torch.no_grad()
def begin(
    plan: Plan | Sequence[Plan], x: torch.Tensor, options: StateOptions, noise: Noise | None, copies: int | None
) -> State:
    """`init` with its arguments in one object, but for noise and copies, which a run decides.

    Raises what `init` does.
    """
    check_x(x)
    plans, row_plan = distinct_plans(plan, x.shape[0])
    operands = options.operands()
    check_operands(plans, **operands)
    if copies is None:
        copies = 2 if any(p.guided for p in plans) else 1
    if copies not in (1, 2):
        raise ValueError(f"copies must be 1 or 2, got {copies}")
    dtype = options.dtype or torch.float32
    model_dtype = options.model_dtype or dtype
    check_dtypes(dtype, model_dtype)
    device, rows = x.device, x.shape[0]
    seeds = row_seeds(options.seed, rows, device)
    slots = max((p.num_slots for p in plans), default=0)
    registers = torch.empty((1 + slots, *x.shape), dtype=dtype, device=device)
    registers[0].copy_(x)
    registers[1:].zero_()
    source = source_of(noise, plans, registers[0])
    indices = [p.indices for p in plans] if source is None else [source.indices]
    starts = first_stages(plans, row_plan)
    cursor = _on_device(starts, torch.int32, device)
    stop = _on_device([start + len(plans[k]) for start, k in zip(starts, row_plan)], torch.int32, device)
    fitted = {
        name: None if value is None else expand_operand(name, value, x.shape, device=device, dtype=dtype)
        for name, value in operands.items()
    }
    tensors = StageTensors(
        registers,
        cursor,
        stop,
        seeds,
        _on_device(np.concatenate([p.coefficients for p in plans]), dtype, device),
        _on_device(np.concatenate(indices), torch.int32, device),
        copies,
        model_input=_model_input(plans, registers[0], copies, model_dtype),
        model_time=torch.empty(copies * rows, dtype=dtype, device=device),
        **fitted,
        noise=source.buffer if source is not None and plans[0].num_draws else None,
        nonfinite=torch.full((rows,), -1, dtype=torch.int32, device=device),
    )
    tensors.checked = True  # made to fit, just now
    _start(plans, row_plan, registers[0], seeds, source)
    write_first_model_input(tensors)
    return State(tensors, plans, row_plan, source)


def check_dtypes(dtype: torch.dtype, model_dtype: torch.dtype) -> None:
    """Raise unless a state may have the one and a model's input the other."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if model_dtype not in MODEL_DTYPES:
        raise ValueError(f"model_dtype must be one of {', '.join(map(str, MODEL_DTYPES))}, got {model_dtype}")


def check_shape(name: str, shape: Any) -> tuple[int, ...]:
    """The shape of a batch of samples as a tuple. Raises ValueError for what is none."""
    given = list(shape) if isinstance(shape, (Sequence, np.ndarray)) and not isinstance(shape, str) else []
    if not given or not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 0 for n in given):
        raise ValueError(f"{name} must be [batch, *sample], integers of at least 0, got {shape!r:.80}")
    return tuple(map(int, given))


def expand_operand(name: str, value: torch.Tensor, shape: Sequence[int], **to: Any) -> torch.Tensor:
    """mask, known, constant or extra in the shape of x, and on its device (device=) in its dtype (dtype=).

    Raises: ValueError for what does not broadcast to it.
    """
    try:
        return value.to(**to).expand(shape) if to else value.expand(shape)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be a tensor that broadcasts to the shape of x, {list(shape)}, "
            f"got {list(getattr(value, 'shape', ())) or type(value).__name__}"
        ) from error


def check_x(x: Any) -> None:
    """Raise unless x is a batch of samples."""
    if not isinstance(x, torch.Tensor) or x.ndim < 1 or not x.dtype.is_floating_point:
        raise TypeError(f"x must be a floating-point tensor [batch, *sample], got {x!r:.80}")


def distinct_plans(plan: Plan | Sequence[Plan], rows: int) -> tuple[list[Plan], list[int]]:
    """The plans of a batch without repetition, and which of them each of its rows follows.

    Raises: ValueError for what is neither a plan nor one for each row.
    """
    if isinstance(plan, Plan):
        return [plan], [0] * rows
    given = list(plan) if isinstance(plan, Sequence) else []
    if not given or len(given) != rows or not all(isinstance(p, Plan) for p in given):
        raise ValueError(
            f"plan must be a Plan from pydiff.make_plan, or one for each of the {rows} rows of x, got {plan!r:.80}"
        )
    distinct = list(dict.fromkeys(given))
    return distinct, [distinct.index(p) for p in given]


def check_operands(plans: list[Plan], mask: Any, known: Any, constant: Any, extra: Any) -> None:
    """Raise ValueError unless the caller's tensors (`Plan.operands`) are those that the plans need."""
    if (mask is None) != (known is None):
        raise ValueError("mask and known must be given together: where the mask is 1, known stands")
    if mask is not None and not all("known" in p.operands for p in plans):
        raise ValueError(
            "a mask was given, but the plan holds no weights for the known region; "
            "compile it with make_plan(..., known=True)"
        )
    for name, value in (("constant", constant), ("extra", extra)):
        if value is None and any(name in p.operands for p in plans):
            raise ValueError(f"the plan uses the operand {name!r}: give {name}=")


def _model_input(plans: list[Plan], x: torch.Tensor, copies: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A buffer for the model's input, or None where x itself serves: same dtype, no scaling, no guidance."""
    plain = all((p.coefficients[:, table.INPUT_SCALE] == 1).all() for p in plans)
    if plain and copies == 1 and dtype == x.dtype and not torch.is_inference_mode_enabled():
        return None
    return torch.empty((copies * x.shape[0], *x.shape[1:]), dtype=dtype, device=x.device)


def _start(
    plans: list[Plan], row_plan: list[int], x: torch.Tensor, seeds: torch.Tensor, source: NoiseSource | None
) -> None:
    """What a plan does before its first call: x <- start_scale * x + start_noise * z, z being draw 0."""
    if all(p.start_scale == 1 and p.start_noise == 0 for p in plans):
        return
    z = normal(seeds, 0, x.shape[1:], dtype=x.dtype) if source is None else source.draw()
    shape = (-1, *([1] * (x.ndim - 1)))
    scale = _on_device([plans[k].start_scale for k in row_plan], x.dtype, x.device).reshape(shape)
    weight = _on_device([plans[k].start_noise for k in row_plan], x.dtype, x.device).reshape(shape)
    start(x, scale, weight, z)


def start(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, z: torch.Tensor) -> None:
    """x <- scale * x + weight * z in place; a weight of zero reads no z."""
    x.copy_(scale * x + torch.where(weight == 0, 0.0, weight * z))
