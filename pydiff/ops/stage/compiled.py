"""The compiled stage operation: tensors bound to `pydiff._C` by address and layout."""

from __future__ import annotations

from typing import Any

import torch

from pydiff.ops import native
from pydiff.ops.stage.tensors import StageTensors

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # csrc/stage.h, enum Dtype
_VIEWS = ("model_input", "mask", "known", "constant", "extra", "noise")
_POINTERS = ("registers", "cursor", "stop", "seeds", "coefficients", "indices", "model_time", "nonfinite")


def _view(tensor: torch.Tensor, batch_dim: int = 0) -> tuple[int, int, int, tuple[int, ...]]:
    strides = tensor.stride()
    return tensor.data_ptr(), _DTYPES[tensor.dtype], strides[batch_dim], strides[batch_dim + 1 :]


def bind(t: StageTensors, m: torch.Tensor) -> Any:
    """A native stage operation that holds the addresses of `t` and the layout of `m`, and the tensors themselves.

    Raises `Unsupported` where a tensor's dimensions are too scattered for the compiled loops.
    """
    registers = t.registers
    device = registers.device
    sizes = {
        "rows": t.rows,
        "shape": list(t.sample_shape),
        "stages": t.coefficients.shape[0],
        "slots": registers.shape[0] - 1,
        "copies": t.copies,
        "scalar": _DTYPES[registers.dtype],
        "draws": 0 if t.noise is None else t.noise.shape[0],
        "draw_stride": 0 if t.noise is None else t.noise.stride(0),
        "device": device.index if device.type == "cuda" else -1,
    }
    named = {name: getattr(t, name) for name in (*_POINTERS, *_VIEWS)}
    watched = [tensor for tensor in named.values() if tensor is not None]
    pointers = {name: 0 if named[name] is None else named[name].data_ptr() for name in _POINTERS}
    pointers["arrived"] = 0
    if device.type == "cuda":
        arrived = torch.zeros(t.rows, dtype=torch.int32, device=device)
        watched.append(arrived)
        pointers["arrived"] = arrived.data_ptr()
    views = {name: _view(named[name], int(name == "noise")) for name in _VIEWS if named[name] is not None}
    views["m"] = _view(m)
    try:
        make = native.module.BoundStage
        return make(sizes, pointers, views, m, watched, torch.get_num_threads, native.current_stream)
    except ValueError as error:
        raise native.Unsupported(str(error)) from None


def run(t: StageTensors, m: torch.Tensor) -> None:
    """Bind the stage operation to `t` and `m` as they now lie in memory, and run it."""
    m = m.detach().resolve_neg()
    bound = bind(t, m)
    if not bound.step(m):
        # m shares memory with what the stage writes: work on a copy of it.
        m = m.clone(memory_format=torch.contiguous_format)
        bound = bind(t, m)
        if not bound.step(m):
            raise RuntimeError("the tensors of the stage changed while it was being bound")
    t.bound = bound
