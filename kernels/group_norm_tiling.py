"""Which kernels of `group_norm` run for a call, and how they cut it up: pure arithmetic on sizes, without triton.

A program works on tiles of ROWS positions and COLS channels. What is weighed: what a thread can hold in its registers,
how long the runs of memory are that a tile reads, and whether there are programs for all multiprocessors.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

ONE, WHOLE, SPLIT = 0, 1, 2  # inputs: one; two, with every tile inside one of them; two, with tiles across the border

WARP = 32  # threads
VECTOR = 8  # elements that one load of a thread brings at most: 16 bytes of a 16-bit type

# The single kernel: a program holds all positions of its groups, a slab, in registers.
ROW_BYTES = 16  # that a program reads at least of every row of an NHWC image, taking several groups if need be
SLAB = 16384  # elements at most: 64 a thread in 8 warps; twice as many spill registers
NARROW_SLAB = SLAB // 2  # where a load brings less than the 4 bytes of a register
FEW_PROGRAMS = 16  # fewer than this leave most multiprocessors idle, and two kernels are better
FEW_PROGRAMS_SHARE = 4  # unless the slabs are so many times smaller than the largest
WARP_ELEMENTS, MOST_WARPS = 1024, 8  # of a slab: 32 elements a thread as long as there are warps for that

# The two kernels.
L2_BYTES = 32 << 20  # of input: what an A100 (40 MB of L2 cache) and an H100 (50 MB) keep for the second kernel
PROGRAMS_WANTED = 2  # for each multiprocessor: one loads while the other computes
LOADED = 8  # elements that each thread of the first kernel loads of a tile
MOST_UNROLLED = 8  # tiles whose loads are on their way together
CACHE_LINE = 64  # channels of an NHWC tile at most: 128 bytes in 16-bit types
LEAST_DIVISOR = 32  # channels of an NHWC tile that is to divide the width; a narrower one is padded instead
RUN = 256  # positions of a channel that an NCHW tile reads at least, where there are so many
BLOCKS_OF_A_CHANNEL = 4  # to share out at least, where NCHW tiles are longer than that
LEAST_APPLIED = 16  # elements a thread of the second kernel: no smaller tiles only to have more programs
MERGED = 32  # parts of a group that the second kernel merges at a time
NHWC_GROUPS = 4  # that it merges together at least: [MERGED, 4] is an element for each thread of 4 warps


class Sizes(NamedTuple):
    """x [samples, channels1, positions], with channels2 more in a second input or 0; `itemsize` bytes an element."""

    samples: int
    channels1: int
    channels2: int
    positions: int
    groups: int
    itemsize: int
    nhwc: bool

    @property
    def channels(self) -> int:
        return self.channels1 + self.channels2

    @property
    def cpg(self) -> int:
        """Channels per group."""
        return self.channels // self.groups

    @property
    def vector(self) -> int:
        """Elements side by side in memory that may be moved at once: rows, and the border of the inputs, allow it."""
        return math.gcd(VECTOR, self.channels1, self.channels2) if self.nhwc else math.gcd(VECTOR, self.positions)

    def inputs(self, width: int) -> int:
        """How tiles of `width` channels lie in the inputs."""
        return ONE if self.channels2 == 0 else WHOLE if self.channels1 % width == 0 else SPLIT


class Tiling(NamedTuple):
    """How a call runs: compile-time constants of the kernels and the sizes of their grids.

    One kernel where `chunks` is 0: `programs` of them, `statistics` holds its constants. Otherwise two kernels of
    `programs` and `apply_programs`, with parts [N, chunks, parts, 2, groups] between them.
    """

    statistics: dict[str, Any]
    programs: int
    apply: dict[str, Any]
    apply_programs: int
    chunks: int
    parts: int

    @property
    def launches(self) -> int:
        return 2 if self.chunks else 1


class Pace(NamedTuple):
    """What the two kernels do otherwise for inputs that the L2 cache keeps than for larger ones.

    Larger ones cost what memory takes: few programs, each long at work with its next loads on the way. The others cost
    about as much as it takes to give every multiprocessor work: many short programs.
    """

    warps: int  # of a program of the first kernel, and
    resident: int  # such programs on a multiprocessor: 16 warps together
    apply_warps: int  # of a program of the second kernel,
    apply_elements: int  # of a tile that each of its threads holds at most, and
    repeat: int  # tiles that it works on in turn


CACHED = Pace(warps=4, resident=4, apply_warps=4, apply_elements=64, repeat=1)
STREAMED = Pace(warps=16, resident=1, apply_warps=8, apply_elements=32, repeat=8)


@functools.cache
def select(sizes: Sizes, multiprocessors: int) -> Tiling:
    """One kernel where its programs can hold their groups and are many enough, else two."""
    return one_kernel(sizes) or two_kernels(sizes, multiprocessors)


def one_kernel(sizes: Sizes) -> Tiling | None:
    """Programs that each hold whole groups of a sample in registers; None where they are too large for that."""
    cpg, together = sizes.cpg, 1  # groups of a program
    while sizes.nhwc and together * cpg * sizes.itemsize < ROW_BYTES and sizes.groups % (2 * together) == 0:
        together *= 2
    width = together * cpg
    rows, cols = _power(sizes.positions), _power(width)
    programs = sizes.samples * sizes.groups // together
    load = sizes.itemsize * (math.gcd(sizes.vector, width) if sizes.nhwc else sizes.vector)  # bytes
    most = SLAB if load >= 4 else NARROW_SLAB
    if rows * cols > (most if programs >= FEW_PROGRAMS else most // FEW_PROGRAMS_SHARE):
        return None
    constants = {
        "GROUPS": sizes.groups,
        "CPG": cpg,
        "INPUTS": sizes.inputs(width),
        "NHWC": sizes.nhwc,
        "VEC": sizes.vector,
        "ROWS": rows,
        "COLS": cols,
        "NG": together,
        "num_warps": min(max(rows * cols // WARP_ELEMENTS, 1), MOST_WARPS),
    }
    return Tiling(constants, programs, {}, 0, 0, 0)


def two_kernels(sizes: Sizes, multiprocessors: int) -> Tiling:
    """Statistics by one kernel, applied by another; a strip is a tile's channels in all positions of a sample."""
    input_bytes = sizes.samples * sizes.channels * sizes.positions * sizes.itemsize
    pace = STREAMED if input_bytes >= L2_BYTES else CACHED
    wanted = PROGRAMS_WANTED * multiprocessors
    elements = LOADED * WARP * pace.warps
    cols = _columns(sizes, elements)
    rows = elements // cols
    strips = sizes.samples * _cdiv(sizes.channels, cols)

    block = rows * _unroll(sizes.positions, rows, strips, wanted)
    blocks = _cdiv(sizes.positions, block)
    chunks = min(blocks, max(1, pace.resident * multiprocessors // strips))
    chunks = _cdiv(blocks, _cdiv(blocks, chunks))  # as many blocks for each program

    groups, parts = _overlaps(sizes, cols)
    common = {
        "INPUTS": sizes.inputs(cols),
        "NHWC": sizes.nhwc,
        "VEC": sizes.vector,
        "COLS": cols,
        "NG": max(_power(groups), NHWC_GROUPS if sizes.nhwc else 1),
        "PARTS": parts,
    }
    masked = sizes.channels % cols != 0
    first = common | {"MASKED": masked, "ROWS": rows, "UNROLL": block // rows, "num_warps": pace.warps}
    rows = _applied_rows(sizes.positions, cols, strips, wanted, pace)
    second = common | {"ROWS": rows, "REPEAT": pace.repeat, "BLOCK": block, "MERGE": MERGED}
    second["num_warps"] = pace.apply_warps
    steps = _cdiv(sizes.positions, rows * pace.repeat)
    return Tiling(first, strips * chunks, second, strips * steps, chunks, parts)


def _columns(sizes: Sizes, elements: int) -> int:
    """Channels of a tile of so many elements."""
    if sizes.nhwc:
        divisor = math.gcd(sizes.channels1, sizes.channels2)
        return min(CACHE_LINE, divisor & -divisor if divisor % LEAST_DIVISOR == 0 else _power(sizes.channels))
    positions = _power(sizes.positions)
    run = max(min(positions, RUN), min(positions // BLOCKS_OF_A_CHANNEL, elements))
    return min(_power(sizes.channels), elements // run)


def _unroll(positions: int, rows: int, strips: int, wanted: int) -> int:
    """Tiles of a block: as many as leave `wanted` blocks for the programs to share."""
    unroll = MOST_UNROLLED
    while unroll > 1 and (rows * unroll > positions or strips * _cdiv(positions, rows * unroll) < wanted):
        unroll //= 2
    return unroll


def _overlaps(sizes: Sizes, cols: int) -> tuple[int, int]:
    """The most groups that a tile has channels of, and the most tiles that a group has channels in."""
    cpg, channels = sizes.cpg, sizes.channels
    windows = [(start, min(start + cols, channels) - 1) for start in range(0, channels, cols)]
    in_a_tile = max(last // cpg - first // cpg for first, last in windows) + 1
    of_a_group = max((start + cpg - 1) // cols - start // cols for start in range(0, sizes.groups * cpg, cpg)) + 1
    return in_a_tile, of_a_group


def _applied_rows(positions: int, cols: int, strips: int, wanted: int, pace: Pace) -> int:
    """Positions of a tile of the second kernel: as many as its threads hold, if that leaves `wanted` tiles."""
    threads = WARP * pace.apply_warps
    rows = min(pace.apply_elements * threads // cols, _power(positions))
    while rows * cols > LEAST_APPLIED * threads and strips * _cdiv(positions, rows) < wanted:
        rows //= 2
    return rows


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _cdiv(n: int, size: int) -> int:
    return -(-n // size)
