"""Nearest-neighbour upsampling by 2 folded into the 3x3 convolution after it.

x [N, C, H, W], weight [O, C, 3, 3] -> [N, O, 2H, 2W]:

1. Upsample, then convolve: the upsampled tensor is written and read (8 NCHW elements moved beside x), and of each 3x3
   window at most 2x2 pixels differ. 72 NOCHW FLOPs.
2. Convolve the small image: an output at row 2i + a sees rows i + a - 1 and i + a alone, and the taps that fall on one
   row add up: (w0, w1 + w2) for a = 0, (w0 + w1, w2) for a = 1; likewise for columns. Four 2x2 kernels, one for each
   phase (a, b), as one convolution with padding 1: 32 NOC (H + 1)(W + 1) FLOPs, 4/9 of the above but for the border,
   and no upsampled tensor. `fold` makes the kernels (25 OC elements moved), a library convolves, and `interleave` puts
   phase (a, b) of pixel (i + a, j + b) where it belongs and adds the bias (8 NOHW moved; adding the bias alone, as
   libraries do after a convolution, is as much).

Folded kernels are made anew in every call: weights may change in place, and 25 OC elements are little beside the image.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from pydiff.kernels.case import Case

FLOPS = 790e12  # a second: what a large bf16 product reaches on an H200
BANDWIDTH = 4.3e12  # bytes a second, likewise


@triton.jit
def _columns(even, odd, left, middle, right, c_in, inside):
    """Store row (left, middle, right) of a 3x3 kernel folded to two taps: at `even` for b = 0, at `odd` for b = 1."""
    dtype = even.dtype.element_ty
    tl.store(even, left.to(dtype), mask=inside)
    tl.store(even + c_in, (middle + right).to(dtype), mask=inside)
    tl.store(odd, (left + middle).to(dtype), mask=inside)
    tl.store(odd + c_in, right.to(dtype), mask=inside)


@triton.jit
def fold(weight, out, c_out, c_in, w_o, w_c, w_h, w_w, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr):
    """out[2a + b, o, i, j, c], the taps of phase (a, b), from weight [O, C, 3, 3]; sums in float32, rounded once."""
    o = (tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)[:, None]
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (o < c_out) & (c < c_in)
    at = weight + o * w_o + c * w_c
    t00 = tl.load(at, mask=inside).to(tl.float32)
    t01 = tl.load(at + w_w, mask=inside).to(tl.float32)
    t02 = tl.load(at + 2 * w_w, mask=inside).to(tl.float32)
    t10 = tl.load(at + w_h, mask=inside).to(tl.float32)
    t11 = tl.load(at + w_h + w_w, mask=inside).to(tl.float32)
    t12 = tl.load(at + w_h + 2 * w_w, mask=inside).to(tl.float32)
    t20 = tl.load(at + 2 * w_h, mask=inside).to(tl.float32)
    t21 = tl.load(at + 2 * w_h + w_w, mask=inside).to(tl.float32)
    t22 = tl.load(at + 2 * w_h + 2 * w_w, mask=inside).to(tl.float32)
    p00 = out + o * 4 * c_in + c
    p01 = out + (c_out + o) * 4 * c_in + c
    p10 = out + (2 * c_out + o) * 4 * c_in + c
    p11 = out + (3 * c_out + o) * 4 * c_in + c
    _columns(p00, p01, t00, t01, t02, c_in, inside)
    _columns(p00 + 2 * c_in, p01 + 2 * c_in, t10 + t20, t11 + t21, t12 + t22, c_in, inside)
    _columns(p10, p11, t00 + t10, t01 + t11, t02 + t12, c_in, inside)
    _columns(p10 + 2 * c_in, p11 + 2 * c_in, t20, t21, t22, c_in, inside)


@triton.jit
def interleave(y, bias, out, c_out, H, W, out_n, out_c, out_p, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """out[n, o, 2i + a, 2j + b] = y[n, i + a, j + b, 2a + b, o] + bias[o]; y dense, out's pixels `out_p` apart."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64)
    row, column = p // (2 * W), p % (2 * W)
    a, b = row % 2, column % 2
    pixel = (n * (H + 1) + row // 2 + a) * (W + 1) + column // 2 + b
    at = y + ((pixel * 4 + 2 * a + b) * c_out)[:, None] + o[None, :]
    inside = (p < 4 * H * W)[:, None] & (o < c_out)[None, :]
    value = tl.load(at, mask=inside).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + o, mask=o < c_out).to(tl.float32)[None, :]
    to = n * out_n + p.to(tl.int64)[:, None] * out_p + o.to(tl.int64)[None, :] * out_c
    tl.store(out + to, value.to(out.dtype.element_ty), mask=inside)


def pays(n: int, c: int, o: int, h: int, w: int, itemsize: int, bias: bool = True) -> bool:
    """Whether the folded way is the faster one by the ceilings of an H200 (bf16 products, memory).

    It saves products, the upsampled tensor (written; read, but for x) and the pass that adds the bias, and pays for
    folding, for longer weights in the convolution, and for the interleaving. Float32, whose products are slower, gains
    more than this.
    """
    flops = 2 * n * o * c * (36 * h * w - 16 * (h + 1) * (w + 1))
    spared = 8 * n * c * h * w + (8 * n * o * h * w if bias else 0)
    moved = (25 + 7) * o * c + 4 * n * o * ((h + 1) * (w + 1) + h * w)
    return flops / FLOPS + (spared - moved) * itemsize / BANDWIDTH > 0


class Fold(NamedTuple):
    """Output and input channels of a program of `fold`, and its warps."""

    block_o: int
    block_c: int
    num_warps: int


class Interleave(NamedTuple):
    """Pixels and channels of a program of `interleave`, and its warps."""

    block_p: int
    block_c: int
    num_warps: int


def select_fold(c: int) -> Fold:
    """The widest block of 32 to 256 input channels that leaves the fewest of them idle; 512 kernels in all."""
    width = min((256, 128, 64, 32), key=lambda size: triton.cdiv(c, size) * size)
    return Fold(512 // width, width, 4)


def select_interleave(o: int, channels_last: bool) -> Interleave:
    """Long runs of channels where out has them side by side; else a square, read along them, written along pixels."""
    if not channels_last:
        return Interleave(64, 64, 8)
    width = min((256, 128, 64), key=lambda size: triton.cdiv(o, size) * size)
    return Interleave(2048 // width, width, 4)


# (C, O) of the upsampling layers in the U-Nets of Stable Diffusion 1.5 and SDXL, and in their VAE's decoder.
SHAPES = ((1280, 1280), (640, 640), (512, 512), (256, 256))


def _fold_case(dtype: str, c: int, channels_last: bool) -> Case:
    config = select_fold(c)
    sizes = dict.fromkeys(("c_out", "c_in", "w_o", "w_c", "w_h", "w_w"), "i32")
    one = "w_c" if channels_last else "w_w"
    aligned = ("c_out", "c_in", "w_o", *(("w_h", "w_w") if channels_last else ()))
    label = f"fold {dtype} {config.block_o}x{config.block_c} {'nhwc' if channels_last else 'nchw'}"
    constants = {one: 1, "BLOCK_O": config.block_o, "BLOCK_C": config.block_c}
    signature = {"weight": f"*{dtype}", "out": f"*{dtype}"} | {k: v for k, v in sizes.items() if k != one}
    return Case(fold, label, signature, constants, config.num_warps, aligned=aligned)


def _interleave_case(dtype: str, o: int, channels_last: bool, bias: bool = True) -> Case:
    config = select_interleave(o, channels_last)
    sizes = ("c_out", "H", "W", "out_n", "out_p" if channels_last else "out_c")
    signature = {"y": f"*{dtype}", "out": f"*{dtype}"} | dict.fromkeys(sizes, "i32")
    one = "out_c" if channels_last else "out_p"
    constants = {one: 1, "BLOCK_P": config.block_p, "BLOCK_C": config.block_c}
    if bias:
        signature["bias"] = f"*{dtype}"
    else:
        constants["bias"] = None
    layout = "nhwc" if channels_last else "nchw"
    label = f"interleave {dtype} {config.block_p}x{config.block_c} {layout}{'' if bias else ' no bias'}"
    return Case(interleave, label, signature, constants, config.num_warps, aligned=sizes)


def compile_cases() -> list[Case]:
    """What `SHAPES` select, in both layouts; one without bias; float16 and float32."""
    both = (True, False)
    cases = [_fold_case("bf16", c, layout) for c, _ in SHAPES for layout in both]
    cases += [_interleave_case("bf16", o, layout) for _, o in SHAPES for layout in both]
    cases += [_interleave_case("bf16", 640, True, bias=False)]
    cases += [make(dtype, 640, True) for dtype in ("fp16", "fp32") for make in (_fold_case, _interleave_case)]
    return list({case.label: case for case in cases}.values())
