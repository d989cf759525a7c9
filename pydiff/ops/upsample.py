"""A 3x3 convolution after nearest-neighbour upsampling by 2, without the upsampled tensor and 5/9 of its products.

Contract: *close*. Taps of the convolution that meet the same pixel are added beforehand (in float32) and rounded to the
weight's dtype, which PyTorch's chain does not do: with u the dtype's unit roundoff (2^-8 for bfloat16, 2^-11 for
float16), an output moves by at most u times the sum of |folded weight| |x| over its window, on top of the chain's own
roundings. Where outputs are as large as such sums usually are, that is about what the chain's own roundings do; where a
channel's weights cancel and x is nearly constant, it is more, in relation to the small output. In float32 it is the
rounding of any other order of summation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pydiff.ops import triton_ops
from pydiff.ops.measured import Measured

# Whether the folded way is the faster one, for each shape on each device.
measured = Measured()


def upsample_conv2d_launches() -> int:
    """Kernels that one `upsample_conv2d` launches in the folded way: fold, convolve, interleave."""
    return 3


def upsample_conv2d_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`upsample_conv2d` as PyTorch's own chain; differentiable, any floating dtype."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def _channels_last(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch's convolution would answer in channels_last."""
    return any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight))


def upsample_conv2d_kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`upsample_conv2d` with the upsampling folded into the weights by a Triton kernel, and four 2x2 convolutions."""
    from pydiff.kernels import upsample as kernels

    n, c, h, w = x.shape
    o = weight.shape[0]
    folded = torch.empty((4 * o, 2, 2, c), dtype=x.dtype, device=x.device)
    fold = kernels.select_fold(c)
    triton_ops.launch(
        kernels.fold, (-(-c // fold.block_c), -(-o // fold.block_o)), weight, folded, o, c, *weight.stride(),
        BLOCK_O=fold.block_o, BLOCK_C=fold.block_c, num_warps=fold.num_warps,
    )  # fmt: skip
    # Channels lie side by side in the convolution: cuDNN is fastest so, and answers so where the weight is so.
    y = F.conv2d(x, folded.permute(0, 3, 1, 2), padding=1).to(memory_format=torch.channels_last)

    last = _channels_last(x, weight)
    out = torch.empty((n, 2 * h, 2 * w, o) if last else (n, o, 2 * h, 2 * w), dtype=x.dtype, device=x.device)
    tile = kernels.select_interleave(o, last)
    out_c, out_p = (1, o) if last else (4 * h * w, 1)
    triton_ops.launch(
        kernels.interleave, (-(-4 * h * w // tile.block_p), -(-o // tile.block_c), n), y, bias, out, o, h, w,
        4 * o * h * w, out_c, out_p, BLOCK_P=tile.block_p, BLOCK_C=tile.block_c,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2) if last else out


def _pays(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    from pydiff.kernels import upsample as kernels

    n, c, h, w = x.shape
    return kernels.pays(n, c, weight.shape[0], h, w, x.element_size(), bias is not None)


def can_use_upsample_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> triton_ops.Usable:
    """Whether `upsample_conv2d_kernel` runs here, and if not, why."""
    usable = triton_ops.can_use("upsample_conv2d", x, weight, bias)
    if not usable[0]:
        return usable
    if torch.is_autocast_enabled(x.device.type):
        return False, "autocast chooses the dtype"
    if bias is not None and bias.stride(0) != 1:
        return False, "bias is not dense (call .contiguous())"
    return True, ""


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}: give [N, C, H, W]")
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (x.shape[1], 3, 3):
        raise ValueError(f"weight has shape {tuple(weight.shape)}: give [O, {x.shape[1]}, 3, 3] for x {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: give [{weight.shape[0]}], one for each output channel")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name} is {tensor.dtype}: convert it to x's {x.dtype}")


def upsample_conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight [O, C, 3, 3], bias, padding=1), without its detour.

    x [N, C, H, W] -> [N, O, 2H, 2W], in the layout that PyTorch's convolution would give. Close, as the module says.
    The weight is folded in every call, so that changes made in place count. On CUDA the folded way runs where it pays
    by the hardware's ceilings (`pydiff.kernels.upsample.pays`) and won the measurement that the first call with a new
    shape makes. Otherwise, elsewhere and for gradients, PyTorch's chain.
    """
    _check(x, weight, bias)
    fast, reason = can_use_upsample_conv2d(x, weight, bias)
    if not fast:
        triton_ops.refused("upsample_conv2d", x, reason)
        return upsample_conv2d_reference(x, weight, bias)
    if not _pays(x, weight, bias):
        return upsample_conv2d_reference(x, weight, bias)
    if triton_ops.traced(x):
        return _op(x, weight, bias)
    candidates = {
        "folded": lambda: upsample_conv2d_kernel(x, weight, bias),
        "chain": lambda: upsample_conv2d_reference(x, weight, bias),
    }
    return candidates[measured.choose(_key(x, weight, bias), candidates, x.device)]()


def _key(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, ...]:
    return x.device.index, x.dtype, *x.shape, weight.shape[0], _channels_last(x, weight), bias is not None


def _traced(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What a compiler sees: the folded way unless PyTorch's chain was measured to be faster."""
    chain = measured.known(_key(x, weight, bias)) == "chain"
    return (upsample_conv2d_reference if chain else upsample_conv2d_kernel)(x, weight, bias)


_op = triton_ops.define(
    "upsample_conv2d(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _traced, upsample_conv2d_reference
)
