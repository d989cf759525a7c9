"""Kernels beside their references: on a CUDA device where there is one, else under Triton's interpreter on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, mean: float = 0.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale + mean).to(DEVICE, dtype)


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_close(got: torch.Tensor, exact: torch.Tensor, chain: torch.Tensor, ulps: int = 1) -> None:
    """The kernel's error is at most twice that of the chain of PyTorch operations, and one ulp of the largest value."""
    assert got.dtype == chain.dtype and got.shape == chain.shape
    largest = exact.abs().max().item()
    ulp = torch.finfo(got.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
    error, allowed = ((t.double() - exact).abs().max().item() for t in (got, chain))
    assert error <= 2 * allowed + ulps * ulp, f"error {error:.3g}; the chain's is {allowed:.3g}, and an ulp {ulp:.3g}"


def compare(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    *args: Any,
    broken: dict[str, Any] | None = None,
    ulps: int = 1,
    **options: Any,
) -> None:
    """Hold the kernel's results to `assert_close`; `broken` replaces options for the kernel alone."""
    got = kernel(*args, **{**options, **(broken or {})})
    exact = reference(*map(wide, args), **{name: wide(value) for name, value in options.items()})
    chain = reference(*args, **options)
    for results in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, exact, chain)), strict=True):
        assert_close(*results, ulps)


class Operators(TorchDispatchMode):
    """The pydiff operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pydiff":
            self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))
