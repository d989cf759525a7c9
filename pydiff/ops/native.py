"""The compiled module `pydiff._C`: whether it is there, why not, and what every call into it needs.

Importing this never fails. Environment: ``PYDIFF_NATIVE=0`` leaves the compiled module alone, ``PYDIFF_DISABLE=a,b``
turns single operations off, ``PYDIFF_CPU_ISA=baseline|avx2|avx512`` picks the CPU loops (the best by default).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_TREE = Path(__file__).resolve().parents[2]
_IN_TREE = (_TREE / "setup.py").is_file()
REMEDY = f"this is pydiff's source tree: run `pip install -e .` in {_TREE}" if _IN_TREE else "install pydiff again"

module: Any = None  # `pydiff._C`, or None, and
missing = ""  # then why there is none
disabled = frozenset(name.strip() for name in os.environ.get("PYDIFF_DISABLE", "").split(",") if name.strip())
warned: set[tuple[str, str]] = set()  # operations and kinds of device of which `warn_once` has spoken

if os.environ.get("PYDIFF_NATIVE", "1") == "0":
    missing = "PYDIFF_NATIVE=0 turns compiled code off"
else:
    try:
        import pydiff._C as module  # type: ignore[no-redef,import-not-found]
    except ImportError as error:
        missing = f"pydiff._C cannot be imported ({error}); {REMEDY}, with a C++ compiler at hand, to build it"

_HAS_CUDA = module is not None and module.build_info()["cuda"]
OLDEST_CUDA = (8, 0)  # compute capability that the kernels need, the Triton ones too


class Unsupported(Exception):
    """The compiled code cannot work on these tensors; the message says why."""


def available(op: str, device: torch.device) -> tuple[bool, str]:
    """Whether compiled code runs `op` on `device`, and if not, why."""
    if op in disabled:
        return False, f"PYDIFF_DISABLE names {op}"
    if module is None:
        return False, missing
    if device.type == "cpu":
        return True, ""
    if device.type != "cuda":
        return False, f"there is no compiled code for {device.type} devices"
    if not _HAS_CUDA:
        return False, "pydiff was built without CUDA: install it where nvcc is, with PYDIFF_CUDA=1 to see why it fails"
    if torch.version.hip:
        return False, "the compiled kernels are for CUDA, and this torch is built for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CUDA:
        return False, f"the kernels need compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    return True, ""


def warn_once(op: str, device: torch.device, reason: str) -> None:
    """Say, once for each operation and kind of device, that the PyTorch reference runs instead, and why."""
    key = (op, device.type)
    if device.type == "meta" or key in warned:
        return
    warned.add(key)
    warnings.warn(f"pydiff.{op} runs in plain PyTorch on {device.type}, slower than it could: {reason}", stacklevel=4)


def build_info() -> dict[str, Any]:
    """Compiler, CUDA architectures, instruction set and threads of the compiled module, or why there is none."""
    return {"missing": missing} if module is None else dict(module.build_info())


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory that a pointer may name: no fake or meta tensor, no wrapper."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"


# What torch's own compiled code asks: no Stream object is made.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(device_index: int) -> int:
    """Handle of the stream that torch launches on."""
    return _raw_stream(device_index) if _raw_stream else torch.cuda.current_stream(device_index).cuda_stream
