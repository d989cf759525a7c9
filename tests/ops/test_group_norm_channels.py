"""GroupNorm's kernels at the channel counts of real models, 32 groups each, beside the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pydiff.ops import group_norm as op
from tests.ops.interpreted import DTYPES, compare, make

pytest.importorskip("triton")
CHANNELS = (128, 256, 320, 512, 640, 960, 1280, 1920, 2560)
NHWC = torch.channels_last


def image(samples: int, channels: int, height: int, width: int, dtype: torch.dtype, **options: Any) -> torch.Tensor:
    return make(samples, channels, height, width, dtype=dtype, **options).contiguous(memory_format=NHWC)


def norm(channels: int, dtype: torch.dtype, x: torch.Tensor, **more: Any) -> None:
    weight, bias = make(channels, dtype=dtype, seed=1), make(channels, dtype=dtype, seed=2)
    compare(op.group_norm_kernel, op.group_norm_reference, x, 32, weight, bias, 1e-5, activation="silu", **more)


@pytest.mark.parametrize("channels", CHANNELS)
def test_with_the_time_embedding(channels: int) -> None:
    dtype = DTYPES[CHANNELS.index(channels) % 3]
    norm(channels, dtype, image(2, channels, 3, 5, dtype), add=make(2, channels, dtype=dtype, seed=3))


@pytest.mark.parametrize("channels", CHANNELS)
def test_of_two_inputs(channels: int) -> None:
    dtype = DTYPES[(CHANNELS.index(channels) + 1) % 3]
    first = channels // 5 // 8 * 8
    norm(channels, dtype, image(1, first, 3, 3, dtype), x2=image(1, channels - first, 3, 3, dtype, seed=4))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_batches(batch: int, dtype: torch.dtype) -> None:
    norm(64, dtype, image(batch, 64, 7, 3, dtype, mean=1000.0 if dtype == torch.float32 else 10.0))


def test_a_wrong_group_is_noticed() -> None:
    x = image(1, 320, 3, 3, torch.bfloat16)
    with pytest.raises(AssertionError, match="error"):
        compare(lambda x, **_: op.group_norm_kernel(x, 16), lambda x: op.group_norm_reference(x, 32), x)
