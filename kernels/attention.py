"""Softmax attention that pays for the head dimension it has: softmax(scale q k^T) v, one pass over the keys.

The ladder:
1. Three kernels (q k^T, softmax, times v): the scores [Lq, Lk] of every head go through memory four times.
2. One program per block of queries, keys in blocks, the softmax rescaled as its maximum grows ("online"): scores stay
   in registers. Traffic: q and the output once, k and v once for each block of queries, mostly from L2.
3. A head dimension that is no power of two is cut into two chunks that are (40 = 32 + 8, 80 = 64 + 16, 160 = 128 + 32),
   so the matrix units multiply 48, 80, 96 or 160 columns instead of 64, 128, 128 or 256; nothing is padded in memory.
4. Few keys (text: 77 = 64 + 13) are one tile, cut the same way: no rescaling, and a program keeps k and v for several
   blocks of queries.
5. A head of 512 (VAE): where one program per block of queries leaves multiprocessors idle or its accumulator fits no
   register file, `slices` programs share the columns of v, each repeating q k^T.

FLOPs: 4 B H Lq Lk D, times (slices + 1) / 2; exponentials: B H Lq Lk, times slices, which is the bound for small heads.
Statistics and accumulators are float32, the products of the input's dtype (float32: exact products, never TF32).
Strides come in units of 8 elements: 16-byte alignment is then visible to the compiler though a head of 40 is no
multiple of 16. Offsets of heads and of key blocks are 64-bit, those inside a tile 32-bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from pydiff.kernels.case import Case

SHORT_KEYS = 128  # that many keys at most make one tile
WGMMA = (9, 10, 11)  # major versions whose matrix units read shared memory, and that have 227 KB of it


class Config(NamedTuple):
    """How a call is cut into programs; `repeat` is the query blocks of a program (few keys), `slices` those of v."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    repeat: int = 0
    slices: int = 1


@triton.jit
def _tile(base, rows, left, stride, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, CUT: tl.constexpr):
    """Columns from START of a matrix with D, [rows, WIDTH]; zeros past column D and, where CUT, past row `left`."""
    columns = START + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * (stride * 8) + columns[None, :]
    if START + WIDTH > D:
        if CUT:
            tile = tl.load(pointers, mask=(rows < left)[:, None] & (columns < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    elif CUT:
        tile = tl.load(pointers, mask=(rows < left)[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _store(base, rows, left, stride, tile, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    columns = START + tl.arange(0, WIDTH)
    inside = (rows < left)[:, None] & (columns < D)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _scores(q1, q2, k1, k2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T in float32, from the chunks of their columns."""
    s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if D2 > 0:
        s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION)
    return s


@triton.jit
def _attend(q1, q2, acc1, acc2, top, total, k, v, mask, left, k_row, v_row, scale, D: tl.constexpr, D1: tl.constexpr,
            D2: tl.constexpr, V: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, BLOCK_N: tl.constexpr,
            CUT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Take one block of keys, `left` or more of which exist, into the accumulators [BLOCK_M, V1 | V2]."""
    n = tl.arange(0, BLOCK_N)
    k1 = _tile(k, n, left, k_row, 0, D1, D, CUT)
    k2 = k1
    if D2 > 0:
        k2 = _tile(k, n, left, k_row, D1, D2, D, CUT)
    s = _scores(q1, q2, k1, k2, D2, PRECISION)
    if MASKED:
        s = tl.where((tl.load(mask + n, mask=n < left, other=0) != 0)[None, :], s, float("-inf"))
    elif CUT:
        s = tl.where((n < left)[None, :], s, float("-inf"))
    highest = tl.maximum(top, tl.max(s, 1) * scale)
    # Where no key has been allowed so far, -inf - (-inf) would be NaN.
    shift = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
    p = tl.exp2(tl.fma(s, scale, -shift[:, None]))
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(p, 1)
    p = p.to(q1.dtype)
    acc1 = tl.dot(p, _tile(v, n, left, v_row, 0, V1, V, CUT), acc1 * decay[:, None], input_precision=PRECISION)
    if V2 > 0:
        acc2 = tl.dot(p, _tile(v, n, left, v_row, V1, V2, V, CUT), acc2 * decay[:, None], input_precision=PRECISION)
    return acc1, acc2, highest, total


INTEGERS = ("heads", "lq", "lk", "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head",
            "v_row", "mask_batch")  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def flash_kernel(q, k, v, mask, out, scale, heads, lq, lk, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch,
                 v_head, v_row, mask_batch, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V: tl.constexpr,
                 V1: tl.constexpr, V2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CUT: tl.constexpr,
                 PEEL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """BLOCK_M queries of one head against all keys, V of the D output columns; strides in units of 8 elements.

    Where BLOCK_N does not divide lk, every block of keys is bounded (CUT), or the last one, after the loop (PEEL).
    """
    SLICES: tl.constexpr = D // V
    pid = tl.program_id(0)
    part = pid % SLICES
    blocks = tl.cdiv(lq, BLOCK_M)
    first = (pid // SLICES) % blocks * BLOCK_M
    head = (pid // SLICES // blocks) % heads
    batch = (pid // SLICES // blocks // heads).to(tl.int64)
    q += (batch * q_batch + head.to(tl.int64) * q_head + first.to(tl.int64) * q_row) * 8
    k += (batch * k_batch + head.to(tl.int64) * k_head) * 8
    v += (batch * v_batch + head.to(tl.int64) * v_head) * 8 + part * V
    mask += batch * mask_batch

    m = tl.arange(0, BLOCK_M)
    q1 = _tile(q, m, lq - first, q_row, 0, D1, D, True)
    q2 = q1
    if D2 > 0:
        q2 = _tile(q, m, lq - first, q_row, D1, D2, D, True)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    acc2 = total
    if V2 > 0:
        acc2 = tl.zeros([BLOCK_M, V2], tl.float32)

    whole = lk // BLOCK_N * BLOCK_N if PEEL else lk
    k_step = tl.full([], 8, tl.int64) * k_row
    v_step = tl.full([], 8, tl.int64) * v_row
    for start in range(0, whole, BLOCK_N):
        acc1, acc2, top, total = _attend(
            q1, q2, acc1, acc2, top, total, k + start * k_step, v + start * v_step, mask + start, lk - start, k_row,
            v_row, scale, D, D1, D2, V, V1, V2, BLOCK_N, CUT, MASKED, PRECISION)  # fmt: skip
    if PEEL:
        acc1, acc2, top, total = _attend(
            q1, q2, acc1, acc2, top, total, k + whole * k_step, v + whole * v_step, mask + whole, lk - whole, k_row,
            v_row, scale, D, D1, D2, V, V1, V2, BLOCK_N, True, MASKED, PRECISION)  # fmt: skip

    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    out += ((batch * lq + first) * heads + head) * D + part * V
    _store(out, m, lq - first, heads * D, acc1 * norm[:, None], 0, V1, V)
    if V2 > 0:
        _store(out, m, lq - first, heads * D, acc2 * norm[:, None], V1, V2, V)


@triton.jit
def _keys(base, lk, row, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, START: tl.constexpr, N: tl.constexpr):
    """Rows START.. of k or v, in the two chunks of their columns (the second stands for nothing where D2 = 0)."""
    n = START + tl.arange(0, N)
    first = _tile(base, n, lk, row, 0, D1, D, True)
    second = first
    if D2 > 0:
        second = _tile(base, n, lk, row, D1, D2, D, True)
    return first, second


@triton.jit
def _forbid(s, mask, lk, START: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    n = START + tl.arange(0, N)
    allowed = n < lk
    if MASKED:
        allowed = tl.load(mask + n, mask=allowed, other=0) != 0
    return tl.where(allowed[None, :], s, float("-inf"))


@triton.jit
def _weigh(p1, p2, v1, v2, N2: tl.constexpr, PRECISION: tl.constexpr):
    acc = tl.dot(p1, v1, input_precision=PRECISION)
    if N2 > 0:
        acc = tl.dot(p2, v2, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=INTEGERS)
def short_kernel(q, k, v, mask, out, scale, heads, lq, lk, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch,
                 v_head, v_row, mask_batch, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, N1: tl.constexpr,
                 N2: tl.constexpr, BLOCK_M: tl.constexpr, REPEAT: tl.constexpr, MASKED: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """REPEAT blocks of BLOCK_M queries of one head against all keys: [N1 + N2, D], loaded once."""
    pid = tl.program_id(0)
    groups = tl.cdiv(lq, BLOCK_M * REPEAT)
    group = pid % groups
    head = (pid // groups) % heads
    batch = (pid // groups // heads).to(tl.int64)
    q += (batch * q_batch + head.to(tl.int64) * q_head) * 8
    k += (batch * k_batch + head.to(tl.int64) * k_head) * 8
    v += (batch * v_batch + head.to(tl.int64) * v_head) * 8
    mask += batch * mask_batch
    out += (batch * lq * heads + head) * D

    k11, k12 = _keys(k, lk, k_row, D, D1, D2, 0, N1)
    v11, v12 = _keys(v, lk, v_row, D, D1, D2, 0, N1)
    k21, k22, v21, v22 = k11, k12, v11, v12
    if N2 > 0:
        k21, k22 = _keys(k, lk, k_row, D, D1, D2, N1, N2)
        v21, v22 = _keys(v, lk, v_row, D, D1, D2, N1, N2)
    m = tl.arange(0, BLOCK_M)
    for block in range(REPEAT):
        first = (group * REPEAT + block) * BLOCK_M
        rows = q + first.to(tl.int64) * q_row * 8
        q1 = _tile(rows, m, lq - first, q_row, 0, D1, D, True)
        q2 = q1
        if D2 > 0:
            q2 = _tile(rows, m, lq - first, q_row, D1, D2, D, True)
        s1 = _forbid(_scores(q1, q2, k11, k12, D2, PRECISION), mask, lk, 0, N1, MASKED)
        s2 = s1
        if N2 > 0:
            s2 = _forbid(_scores(q1, q2, k21, k22, D2, PRECISION), mask, lk, N1, N2, MASKED)
        top = tl.maximum(tl.max(s1, 1), tl.max(s2, 1))
        shift = -scale * (tl.where(top == float("-inf"), 0.0, top) if MASKED else top)
        p1 = tl.exp2(tl.fma(s1, scale, shift[:, None]))
        total = tl.sum(p1, 1)
        p1 = p1.to(q1.dtype)
        p2 = p1
        if N2 > 0:
            p2 = tl.exp2(tl.fma(s2, scale, shift[:, None]))
            total += tl.sum(p2, 1)
            p2 = p2.to(q1.dtype)
        norm = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        target = out + first.to(tl.int64) * heads * D
        _store(target, m, lq - first, heads * D, _weigh(p1, p2, v11, v21, N2, PRECISION) * norm, 0, D1, D)
        if D2 > 0:
            _store(target, m, lq - first, heads * D, _weigh(p1, p2, v12, v22, N2, PRECISION) * norm, D1, D2, D)


def chunks(size: int) -> tuple[int, int]:
    """Powers of two, 16 at least, whose sum covers `size`; the second may be 0: 40 -> (32, 16), 64 -> (64, 0)."""
    whole = max(16, triton.next_power_of_2(size))
    first = whole // 2
    second = max(16, triton.next_power_of_2(size - first)) if size > first else 0
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)


def supports(d: int, itemsize: int) -> tuple[bool, str]:
    """Whether the kernels take heads of d elements of `itemsize` bytes, and if not, why."""
    if d <= 0 or d % 8:
        return False, f"the head dimension {d} is no multiple of 8"
    if itemsize == 4 and d > 160:
        return False, f"a float32 head of {d} elements does not fit the registers (160 at most)"
    if d > 256 and d != 512:
        return False, f"the head dimension {d} is neither 512 nor at most 256"
    return True, ""


def programs(config: Config, b: int, h: int, lq: int) -> int:
    """The size of the grid."""
    return b * h * config.slices * triton.cdiv(lq, config.block_m * max(config.repeat, 1))


def select(b: int, h: int, lq: int, lk: int, d: int, itemsize: int = 2, multiprocessors: int = 132,
           capability: tuple[int, int] = (9, 0)) -> Config:  # fmt: skip
    """The largest blocks that still occupy the device; queries [b, h, lq, d], keys [b, h, lk, d]."""
    if itemsize == 4:
        return Config(32, 32, 4, 1) if d <= 64 else Config(16, 16, 4, 1)
    if d == 512:
        return _select_512(b, h, lq, multiprocessors, capability)
    wgmma = capability[0] in WGMMA
    if lk <= SHORT_KEYS and d <= 160:
        return _select_short(b, h, lq, d, multiprocessors) if wgmma or d <= 80 else Config(16, 0, 4, 2, repeat=1)
    if d > (192 if wgmma else 160):  # without slices the accumulator spills
        return Config(64, 32, 4, 2, slices=2 if wgmma else 4)
    block_n = 64 if d <= (128 if wgmma else 80) else 32
    large = Config(128, block_n, 8, 3)
    # Two programs to a multiprocessor: the exponentials of one run beside the products of the other.
    return large if programs(large, b, h, lq) >= 1.5 * multiprocessors else Config(64, block_n, 4, 3)


def _select_512(b: int, h: int, lq: int, multiprocessors: int, capability: tuple[int, int]) -> Config:
    if capability[0] not in WGMMA:
        # 164 KB of shared memory on sm_80, 100 KB on the others.
        return Config(64, 32, 8, 2, slices=2) if capability == (8, 0) else Config(32, 32, 4, 1, slices=4)
    large = Config(128, 32, 8, 2, slices=2)
    return large if programs(large, b, h, lq) >= multiprocessors else Config(64, 32, 8, 2, slices=2)


def _select_short(b: int, h: int, lq: int, d: int, multiprocessors: int) -> Config:
    for repeat in (4, 2, 1) if d <= 80 else (1,):
        config = Config(128, 0, 8, 2, repeat=repeat)
        if programs(config, b, h, lq) >= 1.5 * multiprocessors:
            return config
    config = Config(64, 0, 4, 2, repeat=1)
    return config if programs(config, b, h, lq) >= 0.75 * multiprocessors else Config(16, 0, 4, 2, repeat=1)


def kernel_of(config: Config) -> Any:
    return short_kernel if config.repeat else flash_kernel


def constants(config: Config, d: int, lk: int, masked: bool, itemsize: int) -> dict[str, Any]:
    """The `tl.constexpr` arguments with which `kernel_of(config)` runs this configuration."""
    d1, d2 = chunks(d)
    precision = "ieee" if itemsize == 4 else "tf32"  # of no meaning for 16-bit products
    shared = {"D": d, "D1": d1, "D2": d2, "BLOCK_M": config.block_m, "MASKED": masked, "PRECISION": precision}
    if config.repeat:
        n1, n2 = chunks(lk)
        return {**shared, "N1": n1, "N2": n2, "REPEAT": config.repeat}
    v1, v2 = chunks(d // config.slices)
    ragged = lk % config.block_n != 0
    cut = ragged and (masked or itemsize == 4)  # float32 products take too many registers to stand there twice
    ends = {"BLOCK_N": config.block_n, "CUT": cut, "PEEL": ragged and not cut}
    return {**shared, "V": d // config.slices, "V1": v1, "V2": v2, **ends}


SHAPES = (  # (b, h, lq, lk, d) of Stable Diffusion 1.5, 2.1 and XL with guidance, and of their VAE decoder
    *((2, 8, n, k, d) for n, d in ((4096, 40), (1024, 80), (256, 160), (64, 160)) for k in (n, 77)),
    *((2, h, n, k, 64) for h, n in ((5, 9216), (10, 4096), (10, 2304), (20, 1024), (20, 576), (20, 144))
      for k in (n, 77)),
    (1, 1, 4096, 4096, 512), (1, 1, 16384, 16384, 512),
)  # fmt: skip
OTHERS = (
    ("bf16", True, (2, 8, 4096, 77, 40)), ("bf16", True, (2, 8, 1000, 1000, 80)),
    ("bf16", False, (2, 12, 1000, 1000, 96)), ("bf16", False, (2, 24, 4608, 4608, 128)),
    ("bf16", False, (1, 8, 999, 999, 256)), ("fp16", False, (2, 8, 4096, 4096, 40)),
    ("fp32", False, (2, 8, 4096, 4096, 40)), ("fp32", False, (2, 8, 256, 77, 160)),
)  # fmt: skip


def compile_cases(capability: tuple[int, int] = (9, 0)) -> list[Case]:
    """The specialisations of SHAPES (bf16), and some with masks, ragged lengths, other heads and dtypes."""
    cases: dict[Any, Case] = {}
    for dtype, masked, (b, h, lq, lk, d) in (*(("bf16", False, shape) for shape in SHAPES), *OTHERS):
        itemsize = 4 if dtype == "fp32" else 2
        config = select(b, h, lq, lk, d, itemsize, 132, capability)
        values = constants(config, d, lk, masked, itemsize)
        pointer = f"*{dtype}"
        signature = dict.fromkeys(("q", "k", "v"), pointer) | {"mask": "*u8" if masked else pointer, "out": pointer}
        signature |= {"scale": "fp32", **dict.fromkeys(INTEGERS, "i32")}
        kernel = kernel_of(config)
        label = f"{kernel.__name__} {dtype}{' masked' * masked} d={d} lk={lk} {'x'.join(map(str, config))}"
        case = Case(kernel, label, signature, values, config.num_warps, config.num_stages)
        cases.setdefault((kernel.__name__, dtype, config, *values.values()), case)
    return list(cases.values())
