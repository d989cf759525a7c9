"""Bias, gate, residual and output scale around a layer: ``(residual + gate * (x + bias)) * scale`` in one pass.

From naive to this: (1) a kernel each for the convolution's bias, the gate, the sum and the division by the output
scale: 9 passes over the tensor with all four; (2) this: 3 passes, one rounding. The tensor is a matrix that is
contiguous along its columns, which are channels (tokens, channels_last) or pixels (contiguous images), so that a block
of it needs few biases and no division per element.

Bytes: elements * itemsize * 3 (2 without a residual). FLOPs: at most 4 per element.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from pydiff.kernels.case import Case


class MatrixBlock(NamedTuple):
    """What a program takes of the matrix."""

    rows: int
    cols: int
    num_warps: int


def select(rows: int, cols: int, multiprocessors: int) -> MatrixBlock:
    """Shape of a block: its columns divide `cols` where a power of two of at least 32 does, so that no lane idles."""
    width = min(cols & -cols, 1024)
    if width < 32:
        width = min(triton.next_power_of_2(cols), 1024)
    # 16 elements a thread, or 8 where that would leave fewer than 4 programs for each multiprocessor.
    elements = 2048 if rows * cols >= 2048 * 4 * multiprocessors else 1024
    height = min(max(elements // width, 1), triton.next_power_of_2(rows))
    return MatrixBlock(height, width, 4)


@triton.jit(do_not_specialize=["rows", "period"])
def residual_add_kernel(
    x, residual, bias, gate, y, rows, cols, period, gate_batch, scale,
    CHANNEL_ROWS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One block of the matrix [rows, cols].

    Its rows are the `period` channels of each batch element in turn (CHANNEL_ROWS), or the `period` tokens of each, and
    its columns then the channels.
    """
    blocks = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)[None, :]
    mask = (row < rows) & (col < cols)
    offsets = row.to(tl.int64) * cols + col
    value = tl.load(x + offsets, mask, other=0.0).to(tl.float32)
    if residual is not None:
        other = tl.load(residual + offsets, mask, other=0.0).to(tl.float32)

    if CHANNEL_ROWS:
        channel = row % period
        live = row < rows
    else:
        # A pointer for every element: the loads hit L1, and vectors of the block's own layout need no shared memory.
        channel = col + tl.zeros([ROWS, COLS], tl.int32)
        live = mask
    if bias is not None:
        value += tl.load(bias + channel, live, other=0.0).to(tl.float32)
    if gate is not None:
        at = (row // period).to(tl.int64) * gate_batch + channel
        value *= tl.load(gate + at, live, other=0.0).to(tl.float32)
    if residual is not None:
        value += other
    tl.store(y + offsets, (value * scale).to(y.dtype.element_ty), mask)


def _case(rows: int, cols: int, dtype: str, given: tuple[str, ...], channel_rows: bool = False) -> Case:
    config = select(rows, cols, 132)
    pointers = ["x", "residual", "bias", "gate", "y"]
    present = ["x", "y", *given]
    signature = {name: f"*{dtype}" for name in pointers if name in present}
    signature |= dict.fromkeys(["rows", "cols", "period", "gate_batch"], "i32") | {"scale": "fp32"}
    constants = dict.fromkeys(name for name in pointers if name not in present)
    constants |= {"CHANNEL_ROWS": channel_rows, "ROWS": config.rows, "COLS": config.cols}
    layout = "nchw" if channel_rows else "nhwc"
    label = f"residual_add {rows}x{cols} {layout} {dtype} {'+'.join(given)}"
    aligned = ("cols", "gate_batch") if cols % 16 == 0 else ()
    return Case(residual_add_kernel, label, signature, constants, config.num_warps, 1, aligned)


def compile_cases() -> list[Case]:
    """The residual additions of SD 1.5, SDXL and the 1024 pixel decoder; the gated ones of DiT-XL, SD3 and Flux."""
    both = ("residual", "bias")
    images = [(8192, 320), (2048, 640), (512, 1280), (128, 1280), (32768, 320), (8192, 640), (2048, 1280)]
    images += [(16384, 512), (65536, 512), (262144, 512), (262144, 256), (1048576, 128)]
    cases = [_case(*shape, "bf16", given) for shape in images for given in (both, ("residual",))]
    cases += [_case(2 * 320, 4096, "bf16", both, True), _case(2 * 1280, 64, "bf16", both, True)]
    cases += [_case(512, 65536, "fp32", both, True), _case(2 * 320, 4096, "bf16", (*both, "gate"), True)]
    tokens = [(512, 1152), (8192, 1536), (8192, 2432), (4608, 3072)]
    cases += [_case(*shape, "bf16", ("residual", "gate")) for shape in tokens]
    cases += [_case(2048, 1280, dtype, (*both, "gate")) for dtype in ("bf16", "fp16", "fp32")]
    return [*cases, _case(2048, 1280, "bf16", ("bias",)), _case(2 * 77, 35, "bf16", both)]
