"""What it takes to compile a kernel ahead of time: one case for each configuration that a launch would select."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A kernel specialised for one shape class.

    `signature` gives every run-time argument's type in Triton's spelling ("*bf16", "*fp32", "i32", "i64", "fp32"), in
    the order of the kernel's parameters; `constants` the values of its `tl.constexpr` parameters (and of pointers that
    are None). Pointers, and integers named in `aligned`, are taken as divisible by 16.
    """

    kernel: Any
    label: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    aligned: tuple[str, ...] = ()
