"""GEGLU, value * gelu(gate) with the exact (erf) GELU, alone and in the epilogue of the GEMM that makes both halves.

Pointwise, x [R, 2N] -> out [R, N]:

1. PyTorch's chain: gelu(gate) written out (2RN elements moved), then the product (3RN): 5RN, two kernels.
2. One kernel: 2RN read, RN written. 3RN elements, one rounding. `geglu`.

After its GEMM, x [M, K], weight [2N, K]: the GEMM writes 2MN, the chain above reads them.

3. GEMM, then 2: MK + 2NK + 2MN for the GEMM, 3MN after it.
4. The product in the GEMM's epilogue: MK + 2NK + MN, no intermediate, one rounding instead of three. A tile has to hold
   a value column n and its gate column n + N, which no order of a plain GEMM's tiles gives. `linear_geglu` reads the
   weight's rows interleaved (n, n + N, n + 1, n + 1 + N, ...): rows are whole cache lines, so their order is free, and
   one matrix instruction as wide as the tile serves both halves. A value and its gate then lie in neighbouring columns
   of the accumulator, which every tensor-core layout keeps in one thread: the split costs nothing.

4MNK FLOPs (two for each multiply-add, 2N columns), 4MNK / (2 (MK + 2NK + MN)) FLOPs a byte in 16 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from pydiff.kernels.case import Case

HOPPER_SHARED = 232448  # bytes of shared memory that one program may have on sm_90 and sm_100
GROUP_M = 8


@triton.jit
def _geglu(value, gate):
    return value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))


@triton.jit
def geglu(x, out, rows, N, x_row, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[r, n] = x[r, n] * gelu(x[r, n + N]); x [rows, 2N] with rows `x_row` apart, out [rows, N] contiguous."""
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (r < rows) & (n < N)
    at = x + r * x_row + n
    value = tl.load(at, mask=inside).to(tl.float32)
    gate = tl.load(at + N, mask=inside).to(tl.float32)
    tl.store(out + r * N + n, _geglu(value, gate).to(out.dtype.element_ty), mask=inside)


@triton.jit
def linear_geglu(
    x, weight, bias, out, M, N, K, x_row, weight_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """out = geglu(x @ weight.T + bias); x [M, K] with rows `x_row` apart, weight [2N, K] likewise, out [M, N] dense.

    A program makes BLOCK_M x BLOCK_N outputs from an accumulator of BLOCK_M x 2 BLOCK_N. Programs that run together
    cover GROUP rows of tiles, so that they share operands in L2.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    first_m = (group * GROUP + within % height) * BLOCK_M
    first_n = within // height * BLOCK_N

    # Rows past the end read row 0: what they make is not stored, and the loop needs no mask for them.
    m = first_m + tl.arange(0, BLOCK_M)
    column = tl.arange(0, 2 * BLOCK_N)
    n = first_n + column // 2
    row = tl.where(n < N, n, 0) + column % 2 * N
    k = tl.arange(0, BLOCK_K)
    x_at = x + tl.where(m < M, m, 0).to(tl.int64)[:, None] * x_row + k[None, :]
    weight_at = weight + row.to(tl.int64)[None, :] * weight_row + k[:, None]

    # The sum starts from the bias: added at the end it would take as many registers again.
    total = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    if bias is not None:
        total += tl.load(bias + row)[None, :].to(tl.float32)
    for first_k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_at)
            b = tl.load(weight_at)
        else:
            a = tl.load(x_at, mask=k[None, :] < K - first_k, other=0.0)
            b = tl.load(weight_at, mask=k[:, None] < K - first_k, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x_at += BLOCK_K
        weight_at += BLOCK_K

    value, gate = tl.split(tl.reshape(total, (BLOCK_M, BLOCK_N, 2)))
    n = first_n + tl.arange(0, BLOCK_N)
    at = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, _geglu(value, gate).to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


class Pointwise(NamedTuple):
    """Tile of `geglu` in outputs, and warps of a program."""

    block_r: int
    block_n: int
    num_warps: int


class Tile(NamedTuple):
    """Tile of `linear_geglu` (block_n in outputs: the accumulator is twice as wide), warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def select_pointwise(n: int) -> Pointwise:
    """The widest block of 128 to 1024 columns that leaves the fewest of them idle, and rows to make 2048 elements."""
    width = min((1024, 512, 256, 128), key=lambda block: triton.cdiv(n, block) * block)
    return Pointwise(2048 // width, width, 4)


# Outputs of a program, its warps, and how many share a multiprocessor: two hide the ends of each other's loops.
_TILES = ((128, 128, 8, 1), (128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 4, 2))
# For float32, whose products run on the ordinary arithmetic units, and for rows that no wide load can fetch: both live
# from registers.
_SMALL_TILE = (64, 32, 4, 2)


def ranked(
    m: int, n: int, itemsize: int, aligned: bool, multiprocessors: int, shared: int = HOPPER_SHARED
) -> list[Tile]:
    """Tiles that suit, the most promising first.

    A multiprocessor works through a whole number of tiles, and each is charged its area (products) and 24 times its
    half circumference (operands moved, the ends of the pipeline). Stages fill what shared memory there is.

    Args:
        aligned: whether rows of x and of weight start at multiples of 16 elements.
        shared: bytes of shared memory that a program may have.
    """

    def work(tile: tuple[int, int, int, int]) -> int:
        block_m, block_n = tile[:2]
        rounds = triton.cdiv(triton.cdiv(m, block_m) * triton.cdiv(n, block_n), multiprocessors)
        return rounds * (block_m * 2 * block_n + 24 * (block_m + 2 * block_n))

    def staged(block_m: int, block_n: int, warps: int, together: int) -> Tile:
        stage = (block_m + 2 * block_n) * block_k * itemsize
        return Tile(block_m, block_n, block_k, warps, max(2, min(4, (shared // together - 1024) // stage)))

    fast = itemsize == 2 and aligned
    block_k = 64 if fast else 32
    return [staged(*tile) for tile in (sorted(_TILES, key=work) if fast else [_SMALL_TILE])]


def select(m: int, n: int, itemsize: int, aligned: bool, multiprocessors: int, shared: int = HOPPER_SHARED) -> Tile:
    """The first of `ranked`."""
    return ranked(m, n, itemsize, aligned, multiprocessors, shared)[0]


# (M, K, N) of the feed-forward networks in the U-Nets of Stable Diffusion 1.5 (512^2) and SDXL (1024^2), batch 2.
SHAPES = (
    (8192, 320, 1280),
    (2048, 640, 2560),
    (512, 1280, 5120),
    (128, 1280, 5120),
    (8192, 640, 2560),
    (2048, 1280, 5120),
)
A100_SHARED = 166912


def _gemm_case(dtype: str, k: int, tile: Tile, bias: bool = True) -> Case:
    even, aligned = k % tile.block_k == 0, k % 16 == 0
    pointers = dict.fromkeys(("x", "weight", "bias", "out") if bias else ("x", "weight", "out"), f"*{dtype}")
    sizes = dict.fromkeys(("M", "N", "K", "x_row", "weight_row"), "i32")
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    notes = [f"stages {tile.num_stages}", "" if even else f"K {k}", "" if bias else "no bias"]
    return Case(
        linear_geglu,
        " ".join(["linear_geglu", dtype, "x".join(map(str, blocks.values())), *filter(None, notes)]),
        pointers | sizes,
        blocks | {"GROUP": GROUP_M, "EVEN_K": even} | ({} if bias else {"bias": None}),
        tile.num_warps,
        tile.num_stages,
        tuple(sizes) if aligned else (),
    )


def _pointwise_case(dtype: str, n: int) -> Case:
    block = select_pointwise(n)
    return Case(
        geglu,
        f"geglu {dtype} {block.block_r}x{block.block_n}",
        {"x": f"*{dtype}", "out": f"*{dtype}", "rows": "i32", "N": "i32", "x_row": "i32"},
        {"BLOCK_R": block.block_r, "BLOCK_N": block.block_n},
        block.num_warps,
        aligned=("rows", "N", "x_row"),
    )


def compile_cases() -> list[Case]:
    """The two best tiles for each of `SHAPES` on 132 multiprocessors with Hopper's shared memory and the best with that
    of an A100; rows that end within a tile, rows that are not aligned, no bias, float16 and float32."""
    hopper = [(k, tile) for m, k, n in SHAPES for tile in ranked(m, n, 2, True, 132)[:2]]
    ampere = [(k, select(m, n, 2, True, 132, A100_SHARED)) for m, k, n in SHAPES]
    m, k, n = SHAPES[-1]
    best, small = select(m, n, 2, True, 132), select(m, n, 4, True, 132)
    cases = [_gemm_case("bf16", k, tile) for k, tile in hopper + ampere]
    cases += [_gemm_case("bf16", k - 16, tile) for _, tile in hopper]
    cases += [_gemm_case("bf16", k, best, bias=False), _gemm_case("bf16", 333, select(m, n, 2, False, 132))]
    cases += [_gemm_case("fp16", k, best), _gemm_case("fp32", k, small), _gemm_case("fp32", 333, small)]
    cases += [_pointwise_case("bf16", n) for _, _, n in SHAPES]
    cases += [_pointwise_case(dtype, n) for dtype in ("fp16", "fp32")]
    return list({case.label: case for case in cases}.values())
