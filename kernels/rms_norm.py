"""RMSNorm over the last dimension; RMSNorm and rotary embedding of queries and keys in one launch.

From naive to this, for queries and keys: (1) diffusers: a float32 square, a mean, two products, then a stack, two
products and a sum for the rotation, over Q and again over K; (2) a fused norm and a fused rotation; (3) this: a program
normalises and rotates all heads of a token, of Q or of K, in registers, and reads them where the fused projection left
them. Cosines and sines are read once for all heads.

Bytes: 2 * (elements of Q and K) * itemsize + 4 * 2 * tokens * D * 2. FLOPs: about 7 per element.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from pydiff.kernels.case import Case
from pydiff.kernels.layer_norm import MAX_CHANNELS, select

MAX_HEAD_DIM = 1024
__all__ = ["MAX_CHANNELS", "MAX_HEAD_DIM", "select"]


class HeadBlock(NamedTuple):
    """Heads of a program, each in two halves padded to `half` elements."""

    heads: int
    half: int
    num_warps: int


def select_heads(heads: int, head_dim: int) -> HeadBlock:
    """How many heads of one token a program takes, and how many warps work on them."""
    half = triton.next_power_of_2(triton.cdiv(head_dim, 2))
    group = min(triton.next_power_of_2(heads), max(4096 // (2 * half), 1))  # 4096 elements at most, 16 a thread
    return HeadBlock(group, half, min(max(group * 2 * half // 512, 1), 8))


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(x, weight, y, rows, x_row, eps, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    live = col < CHANNELS
    mask = (row < rows) & live
    value = tl.load(x + row * x_row + col, mask, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 1) / CHANNELS + eps)[:, None]
    if weight is not None:
        value *= tl.load(weight + col, live, other=0.0).to(tl.float32)
    tl.store(y + row * CHANNELS + col, value.to(y.dtype.element_ty), mask)


@triton.jit
def _load_pairs(pointer, rows, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and second members, float32, of the pairs in vectors of HEAD_DIM elements.

    `pointer` [N, 1] points to the vectors, those not in the mask `rows` [N, 1] count as 0.
    """
    if INTERLEAVED:
        col = tl.arange(0, 2 * HALF)[None, :]
        both = tl.load(pointer + col, rows & (col < HEAD_DIM), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [both.shape[0], HALF, 2]))
    else:
        col = tl.arange(0, HALF)[None, :]
        mask = rows & (col < HEAD_DIM // 2)
        first = tl.load(pointer + col, mask, other=0.0).to(tl.float32)
        second = tl.load(pointer + HEAD_DIM // 2 + col, mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _norm_rotary(
    x, weight, cos, sin, y, heads, x_offset, x_head, cos_offset, y_offset, eps,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Heads [HEADS * program_id(1), ...) of one token, whose first element is x[x_offset] and goes to y[y_offset]."""
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    rows = head < heads
    one = tl.full([1, 1], 1, tl.int1)
    here = x + x_offset + head.to(tl.int64) * x_head
    first, second = _load_pairs(here, rows, HEAD_DIM, HALF, INTERLEAVED)
    if weight is not None:
        squares = tl.sum(first * first + second * second, 1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        w0, w1 = _load_pairs(weight + tl.zeros([1, 1], tl.int32), one, HEAD_DIM, HALF, INTERLEAVED)
        first, second = first * scale * w0, second * scale * w1
    if cos is not None:
        at = cos_offset + tl.zeros([1, 1], tl.int64)
        c0, c1 = _load_pairs(cos + at, one, HEAD_DIM, HALF, INTERLEAVED)
        s0, s1 = _load_pairs(sin + at, one, HEAD_DIM, HALF, INTERLEAVED)
        first, second = first * c0 - second * s0, second * c1 + first * s1
    there = y + y_offset + head * HEAD_DIM
    if INTERLEAVED:
        col = tl.arange(0, 2 * HALF)[None, :]
        both = tl.reshape(tl.join(first, second), [HEADS, 2 * HALF])
        tl.store(there + col, both.to(y.dtype.element_ty), rows & (col < HEAD_DIM))
    else:
        col = tl.arange(0, HALF)[None, :]
        mask = rows & (col < HEAD_DIM // 2)
        tl.store(there + col, first.to(y.dtype.element_ty), mask)
        tl.store(there + HEAD_DIM // 2 + col, second.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["tokens"])
def qk_norm_rotary_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, tokens, q_heads, k_heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head, cos_batch, cos_token, eps,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Program (batch * tokens + token, block of heads, Q or K)."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    at = batch * cos_batch + token * cos_token
    if tl.program_id(2) == 0:
        _norm_rotary(
            q, q_weight, cos, sin, q_out, q_heads, batch * q_batch + token * q_token, q_head, at,
            row * q_heads * HEAD_DIM, eps, HEAD_DIM, HEADS, HALF, INTERLEAVED,
        )  # fmt: skip
    else:
        _norm_rotary(
            k, k_weight, cos, sin, k_out, k_heads, batch * k_batch + token * k_token, k_head, at,
            row * k_heads * HEAD_DIM, eps, HEAD_DIM, HEADS, HALF, INTERLEAVED,
        )  # fmt: skip


_STRIDES = ("q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head", "cos_batch", "cos_token")


def _rms_case(rows: int, channels: int, dtype: str) -> Case:
    config = select(rows, channels, 132)
    signature = dict.fromkeys(["x", "weight", "y"], f"*{dtype}") | {"rows": "i32", "x_row": "i32", "eps": "fp32"}
    constants = {"CHANNELS": channels, "BLOCK": config.block, "ROWS": config.rows}
    label = f"rms_norm {rows}x{channels} {dtype}"
    return Case(rms_norm_kernel, label, signature, constants, config.num_warps, 1, ("x_row",))


def _case(heads: int, head_dim: int, dtype: str, norm: bool, rotary: bool, interleaved: bool = True) -> Case:
    config = select_heads(heads, head_dim)
    missing = [*([] if norm else ["q_weight", "k_weight"]), *([] if rotary else ["cos", "sin"])]
    signature = {name: f"*{dtype}" for name in ("q", "k", "q_weight", "k_weight", "q_out", "k_out")}
    signature |= {"cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
    signature |= dict.fromkeys(["tokens", "q_heads", "k_heads", *_STRIDES], "i32")
    signature = {name: kind for name, kind in signature.items() if name not in missing}
    constants = dict.fromkeys(missing) | {"HEAD_DIM": head_dim, "HEADS": config.heads, "HALF": config.half}
    constants |= {"INTERLEAVED": interleaved}
    parts = "+".join([*(["norm"] if norm else []), *(["rotary"] if rotary else [])])
    label = f"qk_norm_rotary {heads}x{head_dim} {dtype} {parts} {'pairs' if interleaved else 'halves'}"
    return Case(qk_norm_rotary_kernel, label, signature, constants, config.num_warps, 1, _STRIDES)


def compile_cases() -> list[Case]:
    """Queries and keys of SD3 (24 heads of 64, normalised only) and Flux (24 of 128, rotated too), and rows of both."""
    variants = [(False, True), (True, True), (True, False)]
    cases = [_case(24, dim, "bf16", True, rotary, pairs) for dim in (64, 128) for rotary, pairs in variants]
    cases += [_case(24, 128, "bf16", False, True), _case(16, 72, "bf16", True, True)]
    cases += [_case(38, 64, "bf16", True, False)]
    cases += [_case(24, 128, dtype, True, True) for dtype in ("fp16", "fp32")]
    shapes = [(8192, 1536), (4608, 3072), (110592, 128), (196608, 64)]
    cases += [_rms_case(*shape, "bf16") for shape in shapes]
    return cases + [_rms_case(4608, 3072, dtype) for dtype in ("fp16", "fp32")]
