"""What every operation with a Triton kernel shares: when the kernel may run, its launch, its operator.

An operation in a module of `pydiff.ops` is four functions: ``<op>_reference`` (plain torch, the specification),
``<op>_kernel`` (allocates outputs and launches the Triton kernel), ``can_use_<op>`` (whether it may, and if not why),
and ``<op>`` itself, which chooses. Eager code launches directly; while a compiler traces, or on fake tensors, the call
goes through a `torch.library.triton_op`, so that `torch.compile` sees the kernel. There is no backward: a call that
needs gradients takes the reference.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
from collections.abc import Callable
from typing import Any, Optional

import torch

from pydiff.ops import native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Usable = tuple[bool, str]


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_kernels() -> bool:
    """An installation puts the folder `kernels/` under this name; a source tree that is not installed lacks it."""
    return importlib.util.find_spec("pydiff.kernels") is not None


@torch.compiler.assume_constant_result
def available(op: str, device: torch.device) -> Usable:
    """Whether Triton kernels run on `device`, and if not, why."""
    if device.type != "cuda":
        return False, f"Triton kernels run on CUDA devices, not on {device.type}"
    if op in native.disabled:
        return False, f"PYDIFF_DISABLE names {op}"
    if not has_triton():
        return False, "triton is not installed (pip install triton)"
    if not has_kernels():
        return False, f"pydiff.kernels is not installed; {native.REMEDY}"
    if capability(device) < native.OLDEST_CUDA:
        return False, f"sm_{''.join(map(str, capability(device)))} is older than sm_80"
    return True, ""


def can_use(op: str, x: torch.Tensor, *others: torch.Tensor | None) -> Usable:
    """`available`, and tensors that suit: floats of the same device that need no gradient here."""
    fast, reason = available(op, x.device)
    if not fast:
        return fast, reason
    if x.dtype not in FLOATS:
        return False, f"{x.dtype} is none of float32, bfloat16, float16"
    tensors = [x, *(t for t in others if t is not None)]
    if any(t.device != x.device for t in tensors):
        return False, f"tensors on several devices: {sorted({str(t.device) for t in tensors})}"
    if not torch.compiler.is_compiling() and native.is_plain(x) and not all(map(native.is_plain, tensors)):
        return False, "one of the tensors is of a subclass, whose memory the kernel could not read"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False, "gradients are required (call under torch.no_grad())"
    if x.numel() == 0:
        return False, "the input is empty"
    return True, ""


def refused(op: str, x: torch.Tensor, reason: str) -> None:
    """Warn, once for each operation, that the reference runs on a device where the kernel could."""
    if x.device.type == "cuda" and x.numel() and not torch.compiler.is_compiling():
        native.warn_once(op, x.device, reason)


@functools.cache
def _properties(index: int) -> tuple[tuple[int, int], int]:
    found = torch.cuda.get_device_properties(index)
    return (found.major, found.minor), found.multi_processor_count


def _asked(device: torch.device) -> tuple[tuple[int, int], int]:
    """What a CUDA device is; Hopper where there is none to ask: fake tensors, the interpreter."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return _properties(device.index or 0) if there else ((9, 0), 132)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability (major, minor) of a CUDA device; (9, 0) where there is none to ask."""
    return _asked(device)[0]


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 132 where there is none to ask."""
    return _asked(device)[1]


def traced(x: torch.Tensor) -> bool:
    """Whether a call on `x` must go through an operator: a compiler is looking, or `x` has no memory of its own."""
    return torch.compiler.is_compiling() or not native.is_plain(x)


def launch(kernel: Any, grid: tuple[int, ...], x: torch.Tensor, *args: Any, **meta: Any) -> None:
    """``kernel[grid](x, *args, **meta)`` on the device of x; where x is being traced, so that the tracer sees it."""
    if not native.is_plain(x):
        if os.environ.get("TRITON_INTERPRET") != "1":  # an interpreted kernel is no kernel that could be traced
            torch.library.wrap_triton(kernel)[grid](x, *args, **meta)
    elif x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](x, *args, **meta)
    else:
        kernel[grid](x, *args, **meta)


def define(schema: str, kernel: Callable[..., Any], reference: Callable[..., Any]) -> Any:
    """Register the operator ``pydiff::<schema>`` and return it.

    Args:
        schema: ``name(Tensor x, Tensor? weight, int groups) -> Tensor``, in torch's notation.
        kernel: the function that launches; traceable, its outputs made by `torch.empty`.
        reference: what runs on CPU tensors.
    """
    name = schema.partition("(")[0]
    if not has_triton():
        return None  # nothing on this machine can take the way through the operator, and torch would warn of each

    def traceable(*args: Any, **kwargs: Any) -> Any:
        return kernel(*args, **kwargs)

    traceable.__signature__ = _signature(schema)  # type: ignore[attr-defined]  # triton_op reads it, and no schema
    op: Any = torch.library.triton_op(f"pydiff::{name}", traceable, mutates_args=())
    op.register_kernel("cpu")(reference)
    return getattr(torch.ops.pydiff, name).default


_TYPES: dict[str, Any] = {"Tensor": torch.Tensor, "int": int, "float": float, "bool": bool, "str": str}


def _type(text: str) -> Any:
    inner = re.fullmatch(r"Optional\[(.*)\]", text)
    return Optional[_TYPES[inner[1]]] if inner else _TYPES[text]  # noqa: UP045  # what infer_schema looks up


def _signature(schema: str) -> inspect.Signature:
    """What `torch.library.infer_schema` turns into the same schema."""
    parsed = torch._C.parse_schema(schema)
    parameters = []
    for argument in parsed.arguments:
        kind = inspect.Parameter.KEYWORD_ONLY if argument.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        parameters.append(
            inspect.Parameter(argument.name, kind, default=default, annotation=_type(argument.type.annotation_str))
        )
    returned = tuple(_type(value.type.annotation_str) for value in parsed.returns)
    result = returned[0] if len(returned) == 1 else tuple[returned]  # type: ignore[valid-type]
    return inspect.Signature(parameters, return_annotation=result)
