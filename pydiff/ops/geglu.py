"""GEGLU: a value times the exact GELU of its gate, alone and in the epilogue of the linear layer that makes both.

Contract: *close*. Products and sums in float32, one rounding to the input's dtype where PyTorch's chain makes two
(pointwise) or three (with the linear layer); the error stays under twice that of the chain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from pydiff.ops import triton_ops
from pydiff.ops.measured import Measured

if TYPE_CHECKING:
    from pydiff.kernels.geglu import Tile

# What is fastest for each shape on each device: the fused kernel, by its tile, or the linear layer and then `geglu`.
measured = Measured()
SEPARATE = "linear, then geglu"


def geglu_launches() -> int:
    """Kernels that one `geglu` launches."""
    return 1


def linear_geglu_launches() -> int:
    """Kernels that one `linear_geglu` launches, where its own is chosen."""
    return 1


def geglu_reference(x: torch.Tensor) -> torch.Tensor:
    """`geglu` as PyTorch's own chain; differentiable, any floating dtype."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def linear_geglu_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear_geglu` as PyTorch's own chain; differentiable, any floating dtype."""
    return geglu_reference(F.linear(x, weight, bias))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as a matrix of its last dimension's rows, each dense; a copy only where its strides allow no such view."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


def geglu_kernel(x: torch.Tensor) -> torch.Tensor:
    """`geglu` by the Triton kernel, in one launch."""
    from pydiff.kernels import geglu as kernels

    matrix, n = _rows(x), x.shape[-1] // 2
    rows = matrix.shape[0]
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    block = kernels.select_pointwise(n)
    grid = (-(-rows // block.block_r), -(-n // block.block_n))
    triton_ops.launch(
        kernels.geglu, grid, matrix, out, rows, n, matrix.stride(0),
        BLOCK_R=block.block_r, BLOCK_N=block.block_n, num_warps=block.num_warps,
    )  # fmt: skip
    return out


@functools.cache
def _shared_memory(index: int) -> int:
    # Older releases of torch do not tell: what every device since sm_80 has.
    return getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", 101376)


def _ranked(m: int, n: int, itemsize: int, aligned: bool, device: torch.device) -> list[Tile]:
    from pydiff.kernels import geglu as kernels

    real = device.type == "cuda" and torch.cuda.is_available()
    shared = _shared_memory(device.index or 0) if real else kernels.HOPPER_SHARED
    return kernels.ranked(m, n, itemsize, aligned, triton_ops.multiprocessors(device), shared)


_remembered = functools.lru_cache(maxsize=256)(_ranked)


def _tiles(x: torch.Tensor, weight: torch.Tensor) -> list[Tile]:
    aligned = all(number % 16 == 0 for number in (x.stride(0), weight.stride(0), x.shape[1]))
    ranked = _ranked if triton_ops.traced(x) else _remembered  # sizes being traced cannot be looked up
    return ranked(x.shape[0], weight.shape[0] // 2, x.element_size(), aligned, x.device)


def _linear_geglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: Tile) -> torch.Tensor:
    from pydiff.kernels import geglu as kernels

    (m, k), n = x.shape, weight.shape[0] // 2
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    grid = (-(-m // tile.block_m) * -(-n // tile.block_n),)
    triton_ops.launch(
        kernels.linear_geglu, grid, x, weight, bias, out, m, n, k, x.stride(0), weight.stride(0),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=kernels.GROUP_M,
        EVEN_K=k % tile.block_k == 0, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def linear_geglu_kernel(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, tile: Tile | None = None
) -> torch.Tensor:
    """`linear_geglu` by its own kernel, in this tile or the most promising one."""
    matrix = _rows(x)
    out = _linear_geglu(matrix, weight, bias, tile or _tiles(matrix, weight)[0])
    return out.view(*x.shape[:-1], weight.shape[0] // 2)


def _fastest(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear_geglu` of a matrix by the fastest of two tiles and the separate kernels, measured once for each shape."""

    def fused(tile: Tile) -> Callable[[], torch.Tensor]:
        return lambda: _linear_geglu(x, weight, bias, tile)

    candidates = {f"{tile.block_m}x{tile.block_n}": fused(tile) for tile in _tiles(x, weight)[:2]}
    candidates[SEPARATE] = lambda: geglu_kernel(F.linear(x, weight, bias))
    return candidates[measured.choose(_key(x, weight, bias), candidates, x.device)]()


def _key(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, ...]:
    return x.device.index, x.dtype, *x.shape, weight.shape[0], x.stride(0), bias is not None


def _traced(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What a compiler sees: the separate kernels where they were measured to be faster, else the best tile."""
    if measured.known(_key(_rows(x), weight, bias)) == SEPARATE:
        return geglu_kernel(F.linear(x, weight, bias))
    return linear_geglu_kernel(x, weight, bias)


def can_use_geglu(x: torch.Tensor) -> triton_ops.Usable:
    """Whether `geglu_kernel` runs here, and if not, why."""
    return triton_ops.can_use("geglu", x)


def can_use_linear_geglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> triton_ops.Usable:
    """Whether `linear_geglu_kernel` runs here, and if not, why."""
    usable = triton_ops.can_use("linear_geglu", x, weight, bias)
    if not usable[0]:
        return usable
    if weight.stride(1) != 1 or (bias is not None and bias.stride(0) != 1):
        return False, "the rows of weight, or bias, are not dense (call .contiguous())"
    if torch.is_autocast_enabled(x.device.type):
        return False, "autocast chooses the dtype"
    return True, ""


def _check_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[0] % 2 or x.dim() < 1 or weight.shape[1] != x.shape[-1]:
        k = x.shape[-1] if x.dim() else "K"
        raise ValueError(f"weight has shape {tuple(weight.shape)}: give [2N, {k}] for x of shape {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: give [{weight.shape[0]}], one for each row of weight")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name} is {tensor.dtype}: convert it to x's {x.dtype}")


def geglu(x: torch.Tensor) -> torch.Tensor:
    """x[..., :N] * gelu(x[..., N:]) of x [..., 2N]: exact (erf) GELU, the gate in the second half, as diffusers has it.

    Close: float32 arithmetic, rounded once. Any strides; the result is contiguous. Falls back to PyTorch's chunk, gelu
    and product.
    """
    if x.dim() < 1 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"x has shape {tuple(x.shape)}, {x.dtype}: give floats [..., 2N]")
    fast, reason = can_use_geglu(x)
    if not fast:
        triton_ops.refused("geglu", x, reason)
        return geglu_reference(x)
    return _geglu_op(x) if triton_ops.traced(x) else geglu_kernel(x)


def linear_geglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`geglu(F.linear(x, weight, bias))`: x [..., K], weight [2N, K] as nn.Linear holds it, bias [2N]; [..., N].

    Close: accumulated in float32 (full float32 products for float32 inputs), bias, GELU and product in float32, rounded
    once. On CUDA the first call with a new shape measures the kernel against F.linear with `geglu` after it and keeps
    the faster (`measured.choices()`); no copy of the weight is made. Falls back to F.linear and `geglu`.
    """
    _check_linear(x, weight, bias)
    fast, reason = can_use_linear_geglu(x, weight, bias)
    if not fast:
        triton_ops.refused("linear_geglu", x, reason)
        return geglu(F.linear(x, weight, bias))
    if triton_ops.traced(x):
        return _linear_geglu_op(x, weight, bias)
    return _fastest(_rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0] // 2)


_geglu_op = triton_ops.define("geglu(Tensor x) -> Tensor", geglu_kernel, geglu_reference)
_linear_geglu_op = triton_ops.define(
    "linear_geglu(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _traced, linear_geglu_reference
)
