"""LayerNorm over the last dimension, with the residual addition before it and the adaptive modulation after it.

From naive to this: (1) separate gate, add, norm, scale and shift kernels: up to 11 passes over the tokens; (2) one
kernel that reads the row again for each statistic; (3) this: the row stays in registers, the mean is known before the
variance is summed, and every tensor crosses memory once. Several short rows share a program, so that each thread has
enough loads of 16 bytes on the way.

Bytes: rows * C * itemsize * (2, or 4 with a residual). FLOPs: about 8 * rows * C.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from pydiff.kernels.case import Case

MAX_CHANNELS = 16384  # 512 threads hold a padded row, 32 elements each


class RowBlock(NamedTuple):
    """Rows of a program, each padded to `block` elements."""

    rows: int
    block: int
    num_warps: int


def select(rows: int, channels: int, multiprocessors: int) -> RowBlock:
    """Rows of `channels` elements to give to one program, and how many warps work on them."""
    block = triton.next_power_of_2(channels)
    group = max(1, (1024 if block <= 512 else 2048) // block)  # rows: short ones together make so many elements
    while group > 1 and triton.cdiv(rows, group) < 8 * multiprocessors:  # but many programs come first
        group //= 2
    if block <= 512:  # a warp sums its rows without the others
        return RowBlock(group, block, 1)
    per_thread = 16 if triton.cdiv(rows, group) >= 4 * multiprocessors else 8  # elements: few programs get more warps
    return RowBlock(group, block, min(max(group * block // (32 * per_thread), 1), 16))


@triton.jit
def _load(pointer, batch, token, batch_stride, token_stride, col, mask):
    return tl.load(pointer + (batch * batch_stride + token * token_stride)[:, None] + col, mask, other=0.0)


@triton.jit(do_not_specialize=["rows", "tokens"])
def layer_norm_kernel(
    x, residual, gate, weight, bias, scale, shift, total_bias, y, total, rows, tokens,
    x_batch, x_token, residual_batch, residual_token, gate_batch, gate_token,
    scale_batch, scale_token, shift_batch, shift_token, eps,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Normalise ROWS rows: row r is token r % tokens of batch element r // tokens; y and total are contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    live = col < CHANNELS
    mask = (row < rows)[:, None] & live
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    out = row.to(tl.int64)[:, None] * CHANNELS + col

    # What comes after the statistics is on its way during them, unless a row is so long that registers are short.
    early: tl.constexpr = BLOCK <= 4096
    value = _load(x, batch, token, x_batch, x_token, col, mask).to(tl.float32)
    if early:
        if weight is not None:
            w = tl.load(weight + col, live, other=0.0)
        if bias is not None:
            b = tl.load(bias + col, live, other=0.0)
        if scale is not None:
            factor = _load(scale, batch, token, scale_batch, scale_token, col, mask)
        if shift is not None:
            offset = _load(shift, batch, token, shift_batch, shift_token, col, mask)

    if residual is not None:
        if gate is not None:
            value *= _load(gate, batch, token, gate_batch, gate_token, col, mask).to(tl.float32)
        value += _load(residual, batch, token, residual_batch, residual_token, col, mask).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        carried = value
        if total_bias is not None:
            carried += tl.load(total_bias + col, live, other=0.0).to(tl.float32)
        tl.store(total + out, carried.to(total.dtype.element_ty), mask)
        value = rounded.to(tl.float32)  # the statistics are those of what the next layer reads

    # div_rn: the sum of equal 16-bit values is exact, and so must their mean be.
    mean = tl.div_rn(tl.sum(value, 1), CHANNELS + 0.0)
    centred = tl.where(live, value - mean[:, None], 0.0)
    if x.dtype.element_ty == tl.float32:  # the sum rounded: what the mean lacks shows in rows that are nearly constant
        centred = tl.where(live, centred - tl.div_rn(tl.sum(centred, 1), CHANNELS + 0.0)[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / CHANNELS
    result = centred * tl.rsqrt(variance + eps)[:, None]

    if weight is not None:
        if not early:
            w = tl.load(weight + col, live, other=0.0)
        result *= w.to(tl.float32)
    if bias is not None:
        if not early:
            b = tl.load(bias + col, live, other=0.0)
        result += b.to(tl.float32)
    if scale is not None:
        if not early:
            factor = _load(scale, batch, token, scale_batch, scale_token, col, mask)
        result *= 1.0 + factor.to(tl.float32)
    if shift is not None:
        if not early:
            offset = _load(shift, batch, token, shift_batch, shift_token, col, mask)
        result += offset.to(tl.float32)
    tl.store(y + out, result.to(y.dtype.element_ty), mask)


_STRIDES = [f"{name}_{dim}" for name in ("x", "residual", "gate", "scale", "shift") for dim in ("batch", "token")]


def _case(rows: int, channels: int, dtype: str, given: tuple[str, ...], multiprocessors: int = 132) -> Case:
    config = select(rows, channels, multiprocessors)
    present = ["x", "y", *given, *(["total"] if "residual" in given else [])]
    pointers = ["x", "residual", "gate", "weight", "bias", "scale", "shift", "total_bias", "y", "total"]
    signature = {name: f"*{dtype}" for name in pointers if name in present}
    signature |= dict.fromkeys(["rows", "tokens", *_STRIDES], "i32") | {"eps": "fp32"}
    constants = dict.fromkeys(name for name in pointers if name not in present)
    constants |= {"CHANNELS": channels, "BLOCK": config.block, "ROWS": config.rows}
    label = f"layer_norm {rows}x{channels} {dtype} {'+'.join(given)}"
    return Case(layer_norm_kernel, label, signature, constants, config.num_warps, 1, tuple(_STRIDES))


def compile_cases() -> list[Case]:
    """SD 1.5 and SDXL at batch 2, plain and after a residual; DiT-XL, SD3 and Flux with adaptive modulation."""
    affine, adaptive = ("weight", "bias"), ("scale", "shift")
    unet = [(8192, 320), (2048, 640), (512, 1280), (128, 1280), (8192, 640), (2048, 1280)]
    sums = [("residual", *affine), ("residual", *affine, "total_bias")]
    cases = [_case(*shape, "bf16", given) for shape in unet for given in (affine, *sums)]
    transformer = [(512, 1152), (2048, 1152), (8192, 1536), (8192, 2432), (4608, 3072)]
    cases += [
        _case(*shape, "bf16", given)
        for shape in transformer
        for given in (adaptive, ("residual", "gate", *adaptive))
    ]  # fmt: skip
    cases += [_case(2048, 1280, dtype, ("residual", *affine)) for dtype in ("fp16", "fp32")]
    cases += [_case(4608, 12288, dtype, ("residual", "gate", *affine, *adaptive)) for dtype in ("bf16", "fp32")]
    return [*cases, _case(64, 32, "bf16", affine)]
