"""The compiled module `pydiff._C`: whether it is there, why not, and the calls into it.

Importing this never fails. Environment: ``PYDIFF_NATIVE=0`` leaves the compiled module alone, ``PYDIFF_DISABLE=a,b``
turns single operations off, ``PYDIFF_CPU_ISA=baseline|avx2|avx512`` picks the CPU loops (the best by default).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pydiff.ops.stage import StageTensors

_C: Any = None
_missing = ""
_disabled = frozenset(name.strip() for name in os.environ.get("PYDIFF_DISABLE", "").split(",") if name.strip())
_warned: set[tuple[str, str]] = set()

if os.environ.get("PYDIFF_NATIVE", "1") == "0":
    _missing = "PYDIFF_NATIVE=0 turns compiled code off"
else:
    try:
        from pydiff import _C  # type: ignore[attr-defined,no-redef]
    except ImportError as error:
        _missing = f"pydiff._C cannot be imported ({error}); install pydiff where a C++ compiler is, to build it"

_HAS_CUDA = _C is not None and _C.build_info()["cuda"]
_OLDEST_CUDA = (8, 0)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # csrc/stage.h, enum Dtype
_VIEWS = ("model_input", "mask", "known", "constant", "extra", "noise")
_POINTERS = ("registers", "cursor", "stop", "seeds", "coefficients", "indices", "model_time", "nonfinite")


class Unsupported(Exception):
    """The compiled code cannot work on these tensors; the message says why."""


def available(op: str, device: torch.device) -> tuple[bool, str]:
    """Whether compiled code runs `op` on `device`, and if not, why."""
    if op in _disabled:
        return False, f"PYDIFF_DISABLE names {op}"
    if _C is None:
        return False, _missing
    if device.type == "cpu":
        return True, ""
    if device.type != "cuda":
        return False, f"there is no compiled code for {device.type} devices"
    if not _HAS_CUDA:
        return False, "pydiff was built without CUDA: install it where nvcc is, with PYDIFF_CUDA=1 to see why it fails"
    if torch.version.hip:
        return False, "the compiled kernels are for CUDA, and this torch is built for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CUDA:
        return False, f"the kernels need compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    return True, ""


def warn_once(op: str, device: torch.device, reason: str) -> None:
    """Say, once for each operation and kind of device, that the PyTorch reference runs instead, and why."""
    key = (op, device.type)
    if device.type == "meta" or key in _warned:
        return
    _warned.add(key)
    warnings.warn(f"pydiff.{op} runs in plain PyTorch on {device.type}, slower than it could: {reason}", stacklevel=4)


def build_info() -> dict[str, Any]:
    """Compiler, CUDA architectures, instruction set and threads of the compiled module, or why there is none."""
    return {"missing": _missing} if _C is None else dict(_C.build_info())


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory that a pointer may name: no fake or meta tensor, no wrapper."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"


# What torch's own compiled code asks: no Stream object is made.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(device_index: int) -> int:
    """Handle of the stream that torch launches on."""
    return _raw_stream(device_index) if _raw_stream else torch.cuda.current_stream(device_index).cuda_stream


def normal(out: torch.Tensor, seeds: torch.Tensor, draw: int) -> None:
    """Fill `out` [B, *sample], float32 and contiguous, with draw `draw` of each row's seed."""
    rows, device = out.shape[0], out.device
    elements = out.numel() // rows if rows else 0
    index = stream = -1
    if device.type == "cuda":
        index, stream = device.index, current_stream(device.index)
    threads = torch.get_num_threads()
    _C.normal(out.data_ptr(), seeds.data_ptr(), draw, rows, elements, threads, index, max(stream, 0))


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
        return _C.BoundStage(sizes, pointers, views, m, watched, torch.get_num_threads, current_stream)
    except ValueError as error:
        raise Unsupported(str(error)) from None


def stage(t: StageTensors, m: torch.Tensor) -> None:
    """Bind the stage operation to `t` and `m` as they now lie in memory, and run it."""
    m = m.detach().resolve_neg()
    bound = bind(t, m)
    if not bound.step(m):
        # m shares memory with what the stage writes: work on a copy of it.
        m = m.clone(memory_format=torch.contiguous_format)
        bound = bind(t, m)
        if not bound.step(m):
            raise RuntimeError("the tensors of the stage changed while it was being bound")
    t._bound = bound
