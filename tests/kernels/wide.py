"""A kernel whose tile needs more registers than it is allowed: what `pydiff.kernels.resources` has to notice."""

from __future__ import annotations

import triton
import triton.language as tl
from pydiff.kernels.case import Case


@triton.jit
def scan_twice(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    row = tl.load(x + i)
    total = tl.sum(row)
    tl.store(y + i, (row - total) * tl.sum(row * row))


def case() -> Case:
    return Case(scan_twice, "wide", {"x": "*fp32", "y": "*fp32"}, {"SIZE": 4096}, num_warps=1)
