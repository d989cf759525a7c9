"""The tilings of well-known shapes on a GPU with 132 multiprocessors: what runs there changes only on purpose."""

from __future__ import annotations

import pytest
from pydiff.kernels.group_norm_tiling import ONE, SPLIT, WHOLE, Sizes, select

NHWC, NCHW = True, False

# samples, channels1, channels2, positions, layout: programs, ROWS, COLS, groups together, warps
IN_ONE = {
    (2, 1280, 0, 16**2, NHWC): (64, 256, 64, 1, 8),  # the middle of Stable Diffusion's U-Nets
    (2, 1280, 1280, 8**2, NHWC): (64, 64, 128, 1, 8),
    (2, 320, 0, 32**2, NHWC): (64, 1024, 16, 1, 8),
    (2, 320, 0, 8**2, NCHW): (64, 64, 16, 1, 1),
    (8, 64, 0, 16**2, NHWC): (64, 256, 8, 4, 2),  # groups of 2 channels: 4 of them to 16 bytes
}
# likewise: programs, ROWS, COLS, UNROLL, warps, chunks, parts; and of the second kernel programs, ROWS, REPEAT, warps
IN_TWO = {
    (2, 320, 0, 64**2, NHWC): ((320, 16, 64, 8, 4, 32, 2), (320, 128, 1, 4)),  # Stable Diffusion 1.5
    (2, 640, 320, 64**2, NHWC): ((480, 16, 64, 8, 4, 16, 2), (960, 128, 1, 4)),
    (2, 640, 0, 32**2, NHWC): ((320, 16, 64, 4, 4, 16, 2), (320, 64, 1, 4)),
    (2, 320, 0, 64**2, NCHW): ((640, 1024, 1, 4, 4, 1, 10), (640, 4096, 1, 4)),
    (2, 96, 0, 64**2, NHWC): ((384, 32, 32, 2, 4, 64, 2), (384, 64, 1, 4)),  # 32 divides 96
    (1, 1280, 0, 24**2, NCHW): ((320, 256, 4, 2, 4, 1, 10), (320, 1024, 1, 4)),  # runs of few positions
    (1, 2560, 0, 20**2, NCHW): ((640, 256, 4, 1, 4, 1, 20), (640, 512, 1, 4)),
    (16, 320, 0, 64**2, NHWC): ((80, 64, 64, 8, 16, 1, 2), (320, 128, 8, 8)),  # the first that the L2 cache loses
    (2, 320, 0, 128**2, NHWC): ((430, 16, 64, 8, 4, 43, 2), (1280, 128, 1, 4)),  # SDXL
    (2, 1280, 640, 32**2, NHWC): ((480, 16, 64, 8, 4, 8, 2), (480, 128, 1, 4)),
    (1, 512, 0, 128**2, NHWC): ((512, 16, 64, 8, 4, 64, 1), (1024, 128, 1, 4)),  # their VAE's decoder
    (1, 128, 0, 1024**2, NHWC): ((128, 64, 64, 8, 16, 64, 1), (2048, 128, 8, 8)),
    (1, 128, 0, 1024**2, NCHW): ((128, 4096, 1, 8, 16, 1, 4), (2048, 8192, 8, 8)),
}


def sizes_of(shape: tuple[int, int, int, int, bool]) -> Sizes:
    *sizes, nhwc = shape
    return Sizes(*sizes, groups=32, itemsize=2, nhwc=nhwc)


@pytest.mark.parametrize("shape", IN_ONE, ids=str)
def test_small_slabs_take_one_kernel(shape) -> None:
    tiling = select(sizes_of(shape), 132)
    assert tiling.launches == 1 and not tiling.apply
    found = [tiling.statistics[name] for name in ("ROWS", "COLS", "NG", "num_warps")]
    assert (tiling.programs, *found) == IN_ONE[shape]


@pytest.mark.parametrize("shape", IN_TWO, ids=str)
def test_large_ones_take_two(shape) -> None:
    tiling = select(sizes_of(shape), 132)
    assert tiling.launches == 2
    first = [tiling.statistics[name] for name in ("ROWS", "COLS", "UNROLL", "num_warps")]
    second = [tiling.apply[name] for name in ("ROWS", "REPEAT", "num_warps")]
    assert ((tiling.programs, *first, tiling.chunks, tiling.parts), (tiling.apply_programs, *second)) == IN_TWO[shape]


def test_what_a_program_holds_depends_on_its_loads_and_on_how_many_there_are() -> None:
    def launches(groups: int, positions: int, itemsize: int = 2) -> int:
        return select(Sizes(1, groups, 0, positions, groups, itemsize, NCHW), 132).launches

    assert [launches(16, 16384), launches(16, 16385)] == [1, 2]
    assert [launches(16, 16383), launches(16, 16383, 4), launches(16, 8191)] == [2, 1, 1]  # 2 bytes a load; 4; 2
    assert [launches(15, 4096), launches(15, 8192)] == [1, 2]  # too few programs for more


def test_inputs_and_multiprocessors() -> None:
    def inputs(channels1: int, channels2: int) -> int:
        return select(Sizes(2, channels1, channels2, 64**2, 32, 2, NHWC), 132).statistics["INPUTS"]

    assert [inputs(960, 0), inputs(640, 320), inputs(656, 304)] == [ONE, WHOLE, SPLIT]
    large = Sizes(1, 256, 0, 512**2, 32, 2, NHWC)  # 4 tiles of 64 channels
    assert [select(large, units).chunks for units in (108, 132, 148)] == [
        27,
        32,
        37,
    ]  # 32: each of them 16 of the 512 blocks
