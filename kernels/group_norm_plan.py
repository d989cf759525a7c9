"""Which kernels of `group_norm` run for a shape, and how: pure arithmetic on sizes, without triton."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

ONE, WHOLE, SPLIT = 0, 1, 2  # inputs: one; two, with every tile inside one of them; two, with tiles across the border


class Plan(NamedTuple):
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


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _inputs_of(channels1: int, channels2: int, width: int) -> int:
    return ONE if channels2 == 0 else WHOLE if channels1 % width == 0 else SPLIT


@functools.cache
def select(
    samples: int,
    channels1: int,
    channels2: int,
    positions: int,
    groups: int,
    itemsize: int,
    nhwc: bool,
    multiprocessors: int,
) -> Plan:
    """The kernels for x [samples, channels1, positions], with channels2 more in a second input, and their shapes."""
    channels = channels1 + channels2
    cpg, vec = channels // groups, math.gcd(8, channels1, channels2) if nhwc else math.gcd(8, positions)
    together = 1  # groups of one program in the single kernel; at least 16 bytes of each row of NHWC
    while nhwc and together * cpg * itemsize < 16 and groups % (2 * together) == 0:
        together *= 2
    rows, cols = _power(positions), _power(together * cpg)
    access = itemsize * (math.gcd(vec, together * cpg) if nhwc else vec)
    limit = 16384 if access >= 4 else 8192  # elements; at 64 a thread twice as many spill registers
    programs = samples * groups // together
    if rows * cols <= (limit if programs >= 16 else limit // 4):
        constants = {
            "GROUPS": groups,
            "CPG": cpg,
            "INPUTS": _inputs_of(channels1, channels2, together * cpg),
            "NHWC": nhwc,
            "VEC": vec,
            "ROWS": rows,
            "COLS": cols,
            "NG": together,
            "num_warps": min(max(rows * cols // 1024, 1), 8),
        }
        return Plan(constants, programs, {}, 0, 0, 0)
    return _select_two(samples, channels1, channels2, positions, groups, itemsize, nhwc, vec, multiprocessors)


def _select_two(
    samples: int,
    channels1: int,
    channels2: int,
    positions: int,
    groups: int,
    itemsize: int,
    nhwc: bool,
    vec: int,
    multiprocessors: int,
) -> Plan:
    channels = channels1 + channels2
    cpg, divisor = channels // groups, math.gcd(channels1, channels2)
    large = samples * channels * positions * itemsize >= 32 << 20
    warps = 16 if large else 4
    if nhwc:  # 64 channels of 2 bytes are a cache line
        cols = min(64, divisor & -divisor if divisor % 32 == 0 else _power(channels))
    else:
        run = max(min(_power(positions), 256), min(_power(positions) // 4, 256 * warps))
        cols = min(_power(channels), 256 * warps // run)
    rows = 256 * warps // cols  # 8 elements a thread
    tiles = -(-channels // cols)
    unroll = 8
    while unroll > 1 and (
        rows * unroll > positions or tiles * samples * -(-positions // (rows * unroll)) < 2 * multiprocessors
    ):
        unroll //= 2
    blocks = -(-positions // (rows * unroll))
    chunks = min(blocks, max(1, (1 if large else 4) * multiprocessors // (tiles * samples)))
    chunks = -(-blocks // -(-blocks // chunks))  # as many blocks for each program
    windows = [(t * cols, min(t * cols + cols, channels) - 1) for t in range(tiles)]
    together = max(last // cpg - first // cpg for first, last in windows) + 1
    parts = max((g * cpg + cpg - 1) // cols - g * cpg // cols for g in range(groups)) + 1
    common = {
        "INPUTS": _inputs_of(channels1, channels2, cols),
        "NHWC": nhwc,
        "VEC": vec,
        "COLS": cols,
        "NG": max(_power(together), 4 if nhwc else 1),
        "PARTS": parts,
    }
    statistics = common | {"MASKED": channels % cols != 0, "ROWS": rows, "UNROLL": unroll, "num_warps": warps}

    apply_warps, repeat = (8, 8) if large else (4, 1)
    apply_rows = min((1024 if large else 2048) * apply_warps // cols, _power(positions))  # 32 or 64 elements a thread
    while apply_rows * cols > 512 * apply_warps and (
        tiles * samples * -(-positions // apply_rows) < 2 * multiprocessors
    ):
        apply_rows //= 2
    apply = common | {
        "ROWS": apply_rows,
        "REPEAT": repeat,
        "BLOCK": rows * unroll,
        "MERGE": 32,
        "num_warps": apply_warps,
    }
    steps = -(-positions // (apply_rows * repeat))
    return Plan(statistics, samples * tiles * chunks, apply, samples * tiles * steps, chunks, parts)
