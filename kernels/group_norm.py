"""GroupNorm with what surrounds it in a U-Net: bias before, scale and shift, SiLU, a residual, two inputs as one.

Ladder: cat, add, residual, norm, modulation and SiLU as separate kernels move each tensor up to a dozen times; a
program for each (sample, group) reads once, but fills 64 multiprocessors at batch 2 and reads 20-byte pieces of NHWC
rows; here

- **one kernel** where a group's slab fits the registers of a program: read once, written once;
- else **two kernels**. Statistics: tiles of COLS channels, a divisor of C rather than a power of two above it, sweep
  the positions in `chunks` interleaved shares; groups that straddle tiles leave one part in each. Application: every
  program merges the few parts of its own groups, its data already on the way, and walks memory backwards, so that what
  the first kernel read last can still be in the L2 cache.

Bytes for E elements of B bytes: 2 E B in one kernel, 3 E B in two (the second read from L2 where E B fits it), 5 E B
with a residual (4 in one kernel). FLOPs: about 4 an element for the statistics, 4 for the affine map, 6 for SiLU.

Statistics are float32 (count, mean, M2). A thread sums deviations d from the first value that it reads, and d^2. As
this shift is one of the values, M2 = sum d^2 - (sum d)^2 / n loses at most a factor n + 1, n the few hundred values of
a thread, and nothing to a large mean. All merging above that is of means and M2.

An addend that is constant over a channel moves the channel's mean and nothing else, so it costs nothing per element.

In the kernels n is a sample and c its channels, cpg of them in each group; NG is how many groups a tile may take part
in, VEC how many elements may be moved at once. `group_norm_tiling` chooses the constants.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from pydiff.kernels.case import Case, specialised
from pydiff.kernels.group_norm_calls import NormCall, calls
from pydiff.kernels.group_norm_tiling import select


@triton.jit
def _merge_lanes(count, total, mean, m2, EXACT: tl.constexpr):
    """Mean and M2 [COLS] of a tile of (count, mean, M2) [ROWS, COLS], all three zero in an empty place; counts sum to
    `total`. EXACT also takes the rounding of the first mean out again, which only float32 input can show."""
    middle = tl.sum(count * mean, 0) / total
    delta = mean - middle[None, :]
    m2 = tl.sum(m2 + count * delta * delta, 0)
    if EXACT:
        middle += tl.sum(count * delta, 0) / total
    return middle, m2


@triton.jit
def _merge_channels(count, width, mean, m2, member, EXACT: tl.constexpr):
    """Mean and M2 [NG] of groups of `width` [NG] channels [COLS] with `count` values each; member [NG, COLS]."""
    inverse = 1.0 / tl.maximum(width, 1).to(tl.float32)
    middle = tl.sum(tl.where(member, mean[None, :], 0.0), 1) * inverse
    delta = tl.where(member, mean[None, :] - middle[:, None], 0.0)
    m2 = tl.sum(tl.where(member, m2[None, :], 0.0) + count * delta * delta, 1)
    if EXACT:
        middle += tl.sum(delta, 1) * inverse
    return middle, m2


@triton.jit
def _of_groups(values, member):
    """Per channel, the value of its group: values [NG], member [NG, COLS]."""
    return tl.sum(tl.where(member, values[:, None], 0.0), 0)


@triton.jit
def _columns(x, n, c, channels, positions, NHWC: tl.constexpr, VEC: tl.constexpr):
    """Pointers to position 0 of the channels c of sample n, and how far apart positions lie."""
    if NHWC:
        step = channels // VEC * VEC  # tells the compiler that vectors are aligned
        ptr = x + n.to(tl.int64) * positions * step + c
    else:
        step = 1
        ptr = x + (n.to(tl.int64) * channels + c) * (positions // VEC * VEC)
    return ptr, step


@triton.jit
def _inputs(
    x, x2, n, c, c0, channels1, channels2, positions, INPUTS: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr
):
    """`_columns` of the input that holds each channel: of both where a tile lies across the border."""
    ptr, step = _columns(x, n, c, channels1, positions, NHWC, VEC)
    ptr2, step2 = ptr, step
    if INPUTS != 0:
        ptr2, step2 = _columns(x2, n, c - channels1, channels2, positions, NHWC, VEC)
        if INPUTS == 1:
            second = c0 >= channels1
            ptr = tl.where(second, ptr2, ptr)
            step = tl.where(second, step2, step)
    return ptr, step, ptr2, step2


@triton.jit
def _load(ptr, step, ptr2, step2, start, rows, first, mask, INPUTS: tl.constexpr):
    """The tile of positions start + rows (int64 + int32), [ROWS, COLS] in the input's dtype; 0 where masked."""
    at = (ptr + start * step)[None, :] + rows[:, None] * step
    if INPUTS == 2:
        at2 = (ptr2 + start * step2)[None, :] + rows[:, None] * step2
        one = tl.load(at, mask=mask & first[None, :], other=0.0)
        value = tl.where(first[None, :], one, tl.load(at2, mask=mask & (first == 0)[None, :], other=0.0))
    else:
        if mask is None:
            value = tl.load(at)
        else:
            value = tl.load(at, mask=mask, other=0.0)
    return value


@triton.jit
def _channel(ptr, row, stride, c, live, other):
    """Channel values of a row in float32; `other` where there is no tensor."""
    if ptr is None:
        values = tl.zeros_like(c).to(tl.float32) + other
    else:
        values = tl.load(ptr + row.to(tl.int64) * stride + c, mask=live, other=0.0).to(tl.float32)
    return values


@triton.jit
def _affine(weight, bias, scale, shift, n, scale_stride, shift_stride, c, live, rstd):
    """Per channel a and b of y = (x - mean) * a + b."""
    modulation = 1.0 + _channel(scale, n, scale_stride, c, live, 0.0)
    a = rstd * _channel(weight, n, 0, c, live, 1.0) * modulation
    return a, _channel(bias, n, 0, c, live, 0.0) * modulation + _channel(shift, n, shift_stride, c, live, 0.0)


@triton.jit
def _activate(y, SILU: tl.constexpr):
    if SILU:
        y = y / (1.0 + tl.exp2(y * -1.4426950408889634))
    return y


@triton.jit
def _sum_with_residual(
    v, addend, residual, summed, n, c, channels, positions, start, rows, mask, NHWC: tl.constexpr, VEC: tl.constexpr
):
    """v + addend + residual, rounded to its dtype; written to `summed` unless that is None."""
    ptr, step = _columns(residual, n, c, channels, positions, NHWC, VEC)
    offset = start * step + rows[:, None] * step
    if mask is None:
        r = tl.load(ptr[None, :] + offset)
    else:
        r = tl.load(ptr[None, :] + offset, mask=mask, other=0.0)
    v = (v.to(tl.float32) + addend[None, :] + r.to(tl.float32)).to(residual.dtype.element_ty)
    if summed is not None:
        ptr, step = _columns(summed, n, c, channels, positions, NHWC, VEC)  # from `summed` alone: torch.compile takes
        tl.store(ptr[None, :] + (start * step + rows[:, None] * step), v, mask=mask)  # the rest for written to as well
    return v


@triton.jit
def group_norm_fused_kernel(
    x, x2, add, residual, summed, y, weight, bias, scale, shift,
    positions, channels1, channels2, add_stride, scale_stride, shift_stride, eps,
    GROUPS: tl.constexpr, CPG: tl.constexpr, INPUTS: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, NG: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program: all positions of NG groups of a sample, NG * CPG <= COLS channels, held in registers."""
    channels = channels1 + channels2
    pid = tl.program_id(0)
    n = pid // (GROUPS // NG)
    c0 = pid % (GROUPS // NG) * (NG * CPG)
    local = tl.arange(0, COLS)
    c, live = c0 + local, local < NG * CPG
    rows = tl.arange(0, ROWS)
    valid = (rows < positions)[:, None] & live[None, :]
    ptr, step, ptr2, step2 = _inputs(x, x2, n, c, c0, channels1, channels2, positions, INPUTS, NHWC, VEC)
    v = _load(ptr, step, ptr2, step2, 0, rows, c < channels1, valid, INPUTS)
    addend = _channel(add, n, add_stride, c, live, 0.0)
    if residual is not None:
        v = _sum_with_residual(v, addend, residual, summed, n, c, channels, positions, 0, rows, valid, NHWC, VEC)
        addend = tl.zeros_like(addend)
    v = v.to(tl.float32)
    exact: tl.constexpr = x.dtype.element_ty == tl.float32
    count = (rows < positions)[:, None].to(tl.float32)
    member = (local // CPG)[None, :] == tl.arange(0, NG)[:, None]
    mean, m2 = _merge_lanes(count, positions, v, 0.0, exact)  # every value is a lane of its own
    mean, m2 = _merge_channels(positions, CPG, mean + addend, m2, member, exact)
    rstd = _of_groups(1.0 / tl.sqrt(m2 / (positions * CPG) + eps), member)
    middle = _of_groups(mean, member) - addend
    a, b = _affine(weight, bias, scale, shift, n, scale_stride, shift_stride, c, live, rstd)
    out = _activate((v - middle[None, :]) * a[None, :] + b[None, :], SILU)
    to_y, step = _columns(y, n, c, channels, positions, NHWC, VEC)
    tl.store(to_y[None, :] + rows[:, None] * step, out.to(y.dtype.element_ty), mask=valid)


SHARES = ["cpg", "chunks"]  # no address is a multiple of these, so it is of no use to know whether they are of 16


@triton.jit(do_not_specialize_on_alignment=SHARES)
def group_norm_statistics_kernel(
    x, x2, add, residual, summed, parts,
    positions, channels1, channels2, groups, cpg, chunks, add_stride,
    INPUTS: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, UNROLL: tl.constexpr, COLS: tl.constexpr, NG: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program: mean and M2 of COLS channels, by group, over the positions of every chunks-th block.

    parts: [N, chunks, PARTS, 2, groups] float32; the part of a group is the number of the tile, its first tile being 0.
    """
    channels = channels1 + channels2
    tiles = tl.cdiv(channels, COLS)
    pid = tl.program_id(0)
    tile, chunk, n = pid % tiles, pid // tiles % chunks, pid // tiles // chunks
    c0 = tile * COLS
    c = c0 + tl.arange(0, COLS)
    live, first = c < channels, c < channels1
    rows = tl.arange(0, ROWS)
    ptr, step, ptr2, step2 = _inputs(x, x2, n, c, c0, channels1, channels2, positions, INPUTS, NHWC, VEC)
    addend = _channel(add, n, add_stride, c, live, 0.0)

    start = chunk.to(tl.int64) * (UNROLL * ROWS)
    inside = (start + rows < positions)[:, None] & live[None, :]
    value = _load(ptr, step, ptr2, step2, start, rows, first, inside, INPUTS)
    if residual is not None:
        value = _sum_with_residual(
            value, addend, residual, None, n, c, channels, positions, start, rows, inside, NHWC, VEC
        )
    zero = value.to(tl.float32)  # deviations are from here
    total = tl.zeros([ROWS, COLS], tl.float32)
    square = tl.zeros([ROWS, COLS], tl.float32)
    blocks = positions // (UNROLL * ROWS)
    for _ in range(chunk, blocks, chunks):
        for u in tl.static_range(UNROLL):
            everything = None
            if MASKED or INPUTS == 2:
                everything = (rows >= 0)[:, None] & live[None, :]
            value = _load(ptr, step, ptr2, step2, start + u * ROWS, rows, first, everything, INPUTS)
            if residual is not None:
                value = _sum_with_residual(
                    value, addend, residual, summed, n, c, channels, positions, start + u * ROWS, rows, everything,
                    NHWC, VEC,
                )  # fmt: skip
            delta = value.to(tl.float32) - zero
            total += delta
            square += delta * delta
        start += chunks * (UNROLL * ROWS)
    left = tl.where(chunk == blocks % chunks, positions % (UNROLL * ROWS), 0)  # these begin at start
    if left > 0:
        for u in tl.static_range(UNROLL):
            inside = (u * ROWS + rows < left)[:, None] & live[None, :]
            value = _load(ptr, step, ptr2, step2, start + u * ROWS, rows, first, inside, INPUTS)
            if residual is not None:
                value = _sum_with_residual(
                    value, addend, residual, summed, n, c, channels, positions, start + u * ROWS, rows, inside,
                    NHWC, VEC,
                )  # fmt: skip
            delta = tl.where(inside, value.to(tl.float32) - zero, 0.0)
            total += delta
            square += delta * delta

    mine = tl.maximum(tl.cdiv(blocks - chunk, chunks), 0) * UNROLL  # rows of each lane, but for what is left
    count = (mine + tl.maximum(left - rows + ROWS - 1, 0) // ROWS).to(tl.float32)[:, None]
    covered = (mine * ROWS + left).to(tl.float32)
    total /= tl.maximum(count, 1.0)
    exact: tl.constexpr = x.dtype.element_ty == tl.float32
    mean, m2 = _merge_lanes(count, covered, zero + total, square - total * total * count, exact)
    if residual is None:
        mean += addend
    group = c0 // cpg + tl.arange(0, NG)
    width = tl.minimum(c0 + COLS, group * cpg + cpg) - tl.maximum(c0, group * cpg)
    mean, m2 = _merge_channels(covered, width, mean, m2, (c // cpg)[None, :] == group[:, None], exact)
    part = tile - group * cpg // COLS
    at = parts + ((n.to(tl.int64) * chunks + chunk) * PARTS + part) * 2 * groups + group
    held = (group < groups) & (width > 0)
    tl.store(at, mean, mask=held)
    tl.store(at + groups, m2, mask=held)


@triton.jit
def _merge_parts(
    parts, n, group, positions, groups, cpg, chunks,
    COLS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, NG: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Mean and variance [NG] of the groups, from what `group_norm_statistics_kernel` left."""
    here = parts + n.to(tl.int64) * chunks * PARTS * 2 * groups + group
    zero = tl.load(here, mask=group < groups, other=0.0)  # deviations are from the first part's mean
    total = tl.zeros([MERGE, NG], tl.float32)
    square = tl.zeros([MERGE, NG], tl.float32)
    blocks = positions // BLOCK
    rounds, last = blocks // chunks, blocks % chunks
    low, tile0 = group * cpg, group * cpg // COLS * COLS
    for start in range(0, chunks * PARTS, MERGE):
        i = start + tl.arange(0, MERGE)
        chunk, c0 = i // PARTS, tile0[None, :] + (i % PARTS * COLS)[:, None]
        width = tl.minimum(c0 + COLS, (low + cpg)[None, :]) - tl.maximum(c0, low[None, :])
        held = (chunk < chunks)[:, None] & (group < groups)[None, :] & (width > 0)
        rows = rounds * BLOCK + tl.where(chunk < last, BLOCK, 0) + tl.where(chunk == last, positions % BLOCK, 0)
        count = rows.to(tl.float32)[:, None] * width.to(tl.float32)
        at = here[None, :] + (i * 2 * groups)[:, None]
        delta = tl.load(at, mask=held, other=0.0) - zero[None, :]
        m2 = tl.load(at + groups, mask=held, other=0.0)
        total += tl.where(held, count * delta, 0.0)
        square += tl.where(held, m2 + count * delta * delta, 0.0)
    count = (tl.zeros([1], tl.float32) + positions) * cpg
    shift = tl.sum(total, 0) / count
    return zero + shift, tl.sum(square, 0) / count - shift * shift


@triton.jit(do_not_specialize_on_alignment=SHARES)
def group_norm_apply_kernel(
    x, x2, add, parts, y, weight, bias, scale, shift,
    positions, channels1, channels2, groups, cpg, chunks, add_stride, scale_stride, shift_stride, eps,
    INPUTS: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, REPEAT: tl.constexpr,
    COLS: tl.constexpr, NG: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, MERGE: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """One program: REPEAT tiles of ROWS positions and COLS channels, the next one loaded while one is computed."""
    channels = channels1 + channels2
    tiles, steps = tl.cdiv(channels, COLS), tl.cdiv(positions, ROWS * REPEAT)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: see the header
    tile, n = pid % tiles, pid // tiles // steps
    c0 = tile * COLS
    c = c0 + tl.arange(0, COLS)
    live, first = c < channels, c < channels1
    rows = tl.arange(0, ROWS)
    start = (pid // tiles % steps).to(tl.int64) * (ROWS * REPEAT)
    ptr, step, ptr2, step2 = _inputs(x, x2, n, c, c0, channels1, channels2, positions, INPUTS, NHWC, VEC)
    valid = (start + rows < positions)[:, None] & live[None, :]
    v = _load(ptr, step, ptr2, step2, start, rows, first, valid, INPUTS)

    group = c0 // cpg + tl.arange(0, NG)
    mean, variance = _merge_parts(parts, n, group, positions, groups, cpg, chunks, COLS, PARTS, BLOCK, NG, MERGE)
    member = (c // cpg)[None, :] == group[:, None]
    middle = _of_groups(mean, member) - _channel(add, n, add_stride, c, live, 0.0)
    variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    rstd = _of_groups(1.0 / tl.sqrt(variance + eps), member)
    a, b = _affine(weight, bias, scale, shift, n, scale_stride, shift_stride, c, live, rstd)
    to_y, y_step = _columns(y, n, c, channels, positions, NHWC, VEC)
    for r in range(REPEAT):
        after = (start + ROWS + rows < positions)[:, None] & live[None, :] & (r + 1 < REPEAT)
        v2 = _load(ptr, step, ptr2, step2, start + ROWS, rows, first, after, INPUTS)
        out = _activate((v.to(tl.float32) - middle[None, :]) * a[None, :] + b[None, :], SILU)
        tl.store((to_y + start * y_step)[None, :] + rows[:, None] * y_step, out.to(y.dtype.element_ty), mask=valid)
        v, valid, start = v2, after, start + ROWS


def _cases(call: NormCall) -> list[Case]:
    """The kernels that a call launches on 132 multiprocessors."""
    sizes, tiling = call.sizes, select(call.sizes, 132)
    arguments: dict[str, str | int] = dict.fromkeys(call.tensors, f"*{call.dtype}") | {"parts": "*fp32", "eps": "fp32"}
    arguments |= {
        "positions": sizes.positions,
        "channels1": sizes.channels1,
        "channels2": sizes.channels2,
        "groups": sizes.groups,
        "cpg": sizes.cpg,
        "chunks": tiling.chunks,
        "add_stride": sizes.channels if "add" in call.tensors else 0,
        "scale_stride": 2 * sizes.channels,  # scale and shift are the halves of a projection
        "shift_stride": 2 * sizes.channels,
    }
    launched = [(group_norm_fused_kernel, tiling.statistics)]
    if tiling.chunks:
        launched = [(group_norm_statistics_kernel, tiling.statistics), (group_norm_apply_kernel, tiling.apply)]
    cases = []
    for kernel, constants in launched:
        label = f"{kernel.__name__.removeprefix('group_norm_').removesuffix('_kernel')} {call}"
        cases.append(specialised(kernel, label, arguments, constants | {"SILU": call.silu}, SHARES))
    return cases


def compile_cases() -> list[Case]:
    """The kernels of `calls`, each specialisation once."""
    cases: dict[Any, Case] = {}
    for case in (case for call in calls() for case in _cases(call)):
        cases.setdefault((case.kernel.__name__, case.aligned, str(case.signature), str(case.constants)), case)
    return list(cases.values())
