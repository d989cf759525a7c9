"""The stage operation: everything a sampler does between two calls of the model, in one pass over memory.

For every batch row b that is not finished (``cursor[b] < stop[b]``), with the row ``i = cursor[b]`` of the tables:

    m        = m_uncond + guidance * (m_cond - m_uncond)      copies == 2: model output rows [uncond; cond]
    d        = clip(output_x * x + output_m * m, low, high)
    new      = each of three combinations of (x, s0..s4, d, m, constant, extra, z0, z1)
    x        = new[0], or mask * (known combination) + (1 - mask) * new[0] where a mask is given
    s[a]     = new[1],  s[b] = new[2]                         a, b: the row's write slots, -1 for none; b last
    cursor  += 1
    model_input = input_scale[i + 1] * x,  model_time = time[i + 1]      unless the row has now finished

All combinations read the old values. **A weight of exactly zero means that the operand is absent**: it is not read, so
what lies in it (an empty slot, a NaN) has no effect; likewise the unconditional output at guidance 1 and the
conditional one at guidance 0. Operands are summed in the order of `table.OPERANDS`, in the dtype of the registers;
a backend may contract multiply and add. Bounds of -inf and inf are no clip; NaN passes through a clip.
`mask` is 1 where the known tensor stands and 0 where the sample does; anything between blends.

Row independence: a row's result depends on that row's inputs alone, bit for bit, on one backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from pydiff import _native
from pydiff.ops import library, table
from pydiff.ops.noise import normal_reference

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(eq=False)
class StageTensors:
    """The tensors a stage operation works on, all on one device. B rows, S stages of all plans together.

    registers     [R, B, *sample] float32 or float64, contiguous: x, then R - 1 slots. Updated in place.
    cursor        [B] int32: the next row of the tables of each batch row. Updated in place.
    stop          [B] int32: where the row's plan ends (one past its last stage).
    seeds         [B] int64: key of the row's noise.
    coefficients  [S, 48] in the registers' dtype, contiguous: see `table`.
    indices       [S, 4] int32, contiguous.
    copies        1, or 2 when the model runs on [uncond; cond] rows.
    model_input   [copies * B, *sample], any strides, float32, bf16, fp16 or float64: written. None: not wanted.
    model_time    [copies * B] in the registers' dtype: written. None: not wanted.
    mask, known, constant, extra   [B, *sample] in the registers' dtype, any strides (expanded is fine), or None.
    noise         [draws, B, *sample] in the registers' dtype, any strides: used in place of the Philox noise.
    nonfinite     [B] int32: cursor of the first stage whose used model output was not finite; -1 before.
    """

    registers: torch.Tensor
    cursor: torch.Tensor
    stop: torch.Tensor
    seeds: torch.Tensor
    coefficients: torch.Tensor
    indices: torch.Tensor
    copies: int = 1
    model_input: torch.Tensor | None = None
    model_time: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    known: torch.Tensor | None = None
    constant: torch.Tensor | None = None
    extra: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    nonfinite: torch.Tensor | None = None
    _bound: Any = field(default=None, init=False, repr=False)  # the compiled operation, for as long as it fits
    _checked: bool = field(default=False, init=False, repr=False)  # that the tensors fit one another

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name not in ("_bound", "_checked"):
            object.__setattr__(self, "_bound", None)  # it holds the address of what was replaced
            object.__setattr__(self, "_checked", False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None}

    @property
    def rows(self) -> int:
        return self.registers.shape[1]

    @property
    def sample_shape(self) -> torch.Size:
        return self.registers.shape[2:]


def _per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] to [B, 1, ..., 1] so that it broadcasts over a batch of samples."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def _term(weight: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    return torch.where(weight == 0, 0.0, weight * operand)


def _draw(t: StageTensors, number: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Standard normals [B, *sample] of each row's own draw number (anything where the row does not use it)."""
    if number.device.type == "cpu" and not used.any():  # on a GPU asking would wait for it
        return torch.zeros((), dtype=t.registers.dtype).expand(t.registers.shape[1:])
    number = torch.where(used, number, 0).long()
    if t.noise is not None and len(t.noise):
        return t.noise[number, torch.arange(t.rows, device=number.device)]
    return normal_reference(t.seeds, number, t.sample_shape).to(t.registers.dtype)


def _uses_model_output(c: torch.Tensor, index: torch.Tensor, slots: int) -> torch.Tensor:
    """Rows where m has a weight in an output that goes somewhere, or in a d that has one. [B] bool."""
    weights = c[:, : 3 * table.NUM_OPERANDS].reshape(-1, 3, table.NUM_OPERANDS)
    slot = index[:, table.WRITE_A : table.WRITE_B + 1]
    written = torch.cat((torch.ones_like(slot[:, :1], dtype=torch.bool), (slot >= 0) & (slot < slots)), dim=1)
    written[:, 1] &= slot[:, 0] != slot[:, 1]
    direct = (written & (weights[:, :, table.M] != 0)).any(1)
    through_d = (written & (weights[:, :, table.D] != 0)).any(1) & (c[:, table.OUTPUT + 1] != 0)
    return direct | through_d


@torch.no_grad()
def stage_reference(t: StageTensors, m: torch.Tensor) -> None:
    """The specification of the stage operation, in plain torch: no host synchronisation, any device.

    Args:
        t: the tensors, see `StageTensors`; updated in place.
        m: model output [copies * B, *sample], any strides, in one of `MODEL_DTYPES`.
    """
    if t.rows == 0:
        return
    dtype, slots = t.registers.dtype, t.registers.shape[0] - 1
    active = t.cursor < t.stop
    row = torch.where(active, t.cursor, 0).long()
    c, index = t.coefficients[row], t.indices[row]
    x = t.registers[0]

    def column(k: int) -> torch.Tensor:
        return _per_row(c[:, k], x)

    m = m.to(dtype)
    if t.copies == 2:
        scale, (uncond, cond) = column(table.GUIDANCE), m.chunk(2)
        m = torch.where(scale == 1, cond, torch.where(scale == 0, uncond, uncond + scale * (cond - uncond)))
    d = _term(column(table.OUTPUT), x) + _term(column(table.OUTPUT + 1), m)
    d = torch.minimum(torch.maximum(d, column(table.CLIP)), column(table.CLIP + 1))

    known = c[:, table.KNOWN : table.KNOWN + 3]
    weights = c[:, : 3 * table.NUM_OPERANDS].reshape(-1, 3, table.NUM_OPERANDS)
    draws = []
    for k in range(2):
        used = (weights[:, :, table.Z0 + k] != 0).any(1)
        if t.mask is not None:
            used = used | (known[:, 1 + k] != 0)
        draws.append(_draw(t, index[:, table.DRAW0 + k], used))
    empty = [None] * (table.NUM_SLOTS - slots)
    operands = [x, *t.registers[1:], *empty, d, m, t.constant, t.extra, *draws]

    def combine(w: torch.Tensor, values: list) -> torch.Tensor:
        total = torch.zeros_like(x)
        for k, value in enumerate(values):
            if value is not None:
                total = total + _term(_per_row(w[:, k], x), value)
        return total

    new = [combine(weights[:, k], operands) for k in range(3)]
    if t.mask is not None:
        kept = combine(known, [t.known, *draws])
        new[0] = t.mask * kept + (1 - t.mask) * new[0]
    alive = _per_row(active, x)
    if t.nonfinite is not None:
        finite = torch.isfinite(m).reshape(t.rows, *t.sample_shape, 1).flatten(1).all(1)
        bad = active & _uses_model_output(c, index, slots) & (t.nonfinite < 0) & ~finite
        t.nonfinite.copy_(torch.where(bad, t.cursor, t.nonfinite))
    t.registers[0] = torch.where(alive, new[0], x)
    for slot in range(slots):
        for k in (1, 2):
            here = alive & _per_row(index[:, table.WRITE_A + k - 1] == slot, x)
            t.registers[1 + slot] = torch.where(here, new[k], t.registers[1 + slot])
    t.cursor.add_(active.to(t.cursor.dtype))
    write_model_input_reference(t)


def write_model_input_reference(t: StageTensors) -> None:
    """Write what the model is called with next, for the rows that are not finished."""
    active = t.cursor < t.stop
    c = t.coefficients[torch.where(active, t.cursor, 0).long()]
    x = t.registers[0]
    if t.model_input is not None:
        scaled = (_per_row(c[:, table.INPUT_SCALE], x) * x).to(t.model_input.dtype)
        for target in t.model_input.chunk(t.copies):
            target.copy_(torch.where(_per_row(active, x), scaled, target))
    if t.model_time is not None:
        for target in t.model_time.chunk(t.copies):
            target.copy_(torch.where(active, c[:, table.TIME], target))


def can_use_native(device: torch.device) -> tuple[bool, str]:
    """Whether compiled code runs the stage operation on `device`, and if not, why."""
    return _native.available("stage", device)


def check_model_output(t: StageTensors, m: torch.Tensor) -> None:
    """Raise unless `m` is a model output that fits `t`. Cheap enough for every stage."""
    expected = (t.copies * t.rows, *t.sample_shape)
    if not isinstance(m, torch.Tensor):
        raise TypeError(
            f"the model returned {type(m).__name__}, expected a tensor of shape {list(expected)}; "
            "wrap it so that it returns the tensor alone, e.g. lambda x, t: net(x, t).sample"
        )
    if m.shape != expected:
        raise ValueError(f"the model returned shape {list(m.shape)}, expected {list(expected)} like its input")
    if m.dtype not in MODEL_DTYPES:
        raise TypeError(f"the model returned {m.dtype}, expected one of {', '.join(map(str, MODEL_DTYPES))}")
    if m.device != t.registers.device:
        raise ValueError(f"the model returned a tensor on {m.device}, but the sample is on {t.registers.device}")


def check_tensors(t: StageTensors) -> None:
    """Raise unless the tensors of `t` fit one another as `StageTensors` says."""
    registers, rows, sample = t.registers, t.rows, tuple(t.sample_shape)
    if registers.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"registers must be float32 or float64, got {registers.dtype}")
    if not 1 <= registers.shape[0] <= 1 + table.NUM_SLOTS:
        raise ValueError(f"registers must hold x and up to {table.NUM_SLOTS} slots, got {registers.shape[0]} tensors")
    if t.copies not in (1, 2):
        raise ValueError(f"copies must be 1 or 2, got {t.copies}")
    stages, scalar, draws = t.coefficients.shape[0], registers.dtype, 0 if t.noise is None else t.noise.shape[0]
    expected = {
        "registers": (tuple(registers.shape), scalar),
        "cursor": ((rows,), torch.int32),
        "stop": ((rows,), torch.int32),
        "seeds": ((rows,), torch.int64),
        "nonfinite": ((rows,), torch.int32),
        "coefficients": ((stages, table.COEFFICIENT_COLUMNS), scalar),
        "indices": ((stages, table.INDEX_COLUMNS), torch.int32),
        "model_time": ((t.copies * rows,), scalar),
    }
    for name, (shape, dtype) in expected.items():
        _check_tensor(t, name, shape, (dtype,))
        if getattr(t, name) is not None and not getattr(t, name).is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {getattr(t, name).stride()}; use .contiguous()")
    for name in ("mask", "known", "constant", "extra"):
        _check_tensor(t, name, (rows, *sample), (scalar,))
    _check_tensor(t, "noise", (draws, rows, *sample), (scalar,))
    _check_tensor(t, "model_input", (t.copies * rows, *sample), MODEL_DTYPES)


def _check_tensor(t: StageTensors, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    tensor = getattr(t, name)
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != t.registers.device:
        raise ValueError(f"{name} is on {tensor.device}, but registers are on {t.registers.device}")


def stage(t: StageTensors, m: torch.Tensor) -> None:
    """Run one stage on `t` with the model output `m`: see the module's docstring for the contract.

    Registers, slots and model input change in place; nothing changes if this raises. No gradient flows through it.
    Backends agree with `stage_reference` within the rounding of their summation (see `tests/ops/test_stage.py` for
    the bound).
    """
    if torch.compiler.is_compiling():
        _through_operator(t, m)
        return
    # Between two stages nothing changes but what the tensors hold; the bound operation checks exactly that.
    bound = t._bound
    if bound is None or not bound.step(m):
        _stage_unbound(t, m)


def _stage_unbound(t: StageTensors, m: torch.Tensor) -> None:
    check_model_output(t, m)
    if _native.is_plain(t.registers) and _native.is_plain(m):
        _stage(t, m)
    else:
        _through_operator(t, m)


def _stage(t: StageTensors, m: torch.Tensor) -> None:
    if not t._checked:
        check_tensors(t)
        t._checked = True
    fast, reason = can_use_native(t.registers.device)
    if fast:
        try:
            return _native.stage(t, m)
        except _native.Unsupported as error:
            reason = str(error)
    _native.warn_once("stage", t.registers.device, reason)
    stage_reference(t, m)


def _through_operator(t: StageTensors, m: torch.Tensor) -> None:
    _stage_op(
        m,
        t.registers,
        t.cursor,
        t.stop,
        t.seeds,
        t.coefficients,
        t.indices,
        t.copies,
        t.model_input,
        t.model_time,
        t.mask,
        t.known,
        t.constant,
        t.extra,
        t.noise,
        t.nonfinite,
    )


def _stage_flat(m: torch.Tensor, *fields: Any) -> None:
    _stage(StageTensors(*fields), m if _native.is_plain(m) else m.as_subclass(torch.Tensor))


def _stage_fake(m: torch.Tensor, *fields: Any) -> None:
    check_model_output(StageTensors(*fields), m)


_stage_op = library.define(
    "stage(Tensor m, Tensor(a!) registers, Tensor(b!) cursor, Tensor stop, Tensor seeds, Tensor coefficients, "
    "Tensor indices, int copies, Tensor(c!)? model_input, Tensor(d!)? model_time, Tensor? mask, Tensor? known, "
    "Tensor? constant, Tensor? extra, Tensor? noise, Tensor(e!)? nonfinite) -> ()",
    _stage_flat,
    _stage_fake,
)
