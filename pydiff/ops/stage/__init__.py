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

from typing import Any

import torch

from pydiff.ops import library, native
from pydiff.ops.stage import compiled
from pydiff.ops.stage.reference import stage_reference as stage_reference
from pydiff.ops.stage.reference import write_first_model_input as write_first_model_input
from pydiff.ops.stage.reference import write_model_input_reference as write_model_input_reference
from pydiff.ops.stage.tensors import FIELDS as FIELDS
from pydiff.ops.stage.tensors import MODEL_DTYPES as MODEL_DTYPES
from pydiff.ops.stage.tensors import StageTensors, check_model_output, check_tensors


def can_use_native(device: torch.device) -> tuple[bool, str]:
    """Whether compiled code runs the stage operation on `device`, and if not, why."""
    return native.available("stage", device)


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
    bound = t.bound
    if bound is None or not bound.step(m):
        _stage_unbound(t, m)


def _stage_unbound(t: StageTensors, m: torch.Tensor) -> None:
    check_model_output(t, m)
    if native.is_plain(t.registers) and native.is_plain(m):
        _stage(t, m)
    else:
        _through_operator(t, m)


def _stage(t: StageTensors, m: torch.Tensor) -> None:
    if not t.checked:
        check_tensors(t)
        t.checked = True
    fast, reason = can_use_native(t.registers.device)
    if fast:
        try:
            return compiled.run(t, m)
        except native.Unsupported as error:
            reason = str(error)
    native.warn_once("stage", t.registers.device, reason)
    stage_reference(t, m)


def _through_operator(t: StageTensors, m: torch.Tensor) -> None:
    _stage_op(m, *(getattr(t, name) for name in FIELDS))


def _stage_flat(m: torch.Tensor, *fields: Any) -> None:
    _stage(StageTensors(*fields), m if native.is_plain(m) else m.as_subclass(torch.Tensor))


def _stage_fake(m: torch.Tensor, *fields: Any) -> None:
    check_model_output(StageTensors(*fields), m)


_stage_op = library.define(
    "stage(Tensor m, Tensor(a!) registers, Tensor(b!) cursor, Tensor stop, Tensor seeds, Tensor coefficients, "
    "Tensor indices, int copies, Tensor(c!)? model_input, Tensor(d!)? model_time, Tensor? mask, Tensor? known, "
    "Tensor? constant, Tensor? extra, Tensor? noise, Tensor(e!)? nonfinite) -> ()",
    _stage_flat,
    _stage_fake,
)
