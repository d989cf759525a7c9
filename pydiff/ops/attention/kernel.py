"""Attention by the Triton kernels of `pydiff.kernels.attention`: the launch, and whether it may."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pydiff.ops import triton_ops

if TYPE_CHECKING:
    from pydiff.kernels.attention import Config

_LARGEST_STRIDE = 2**24  # of a row, in elements: offsets inside a tile of 128 rows are 32-bit


def attention_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`attention` by the Triton kernels, with a key mask [B, Lk] or none; one launch, as `config` says if given."""
    from pydiff.kernels import attention as kernels

    (b, h, lq, d), lk = q.shape, k.shape[2]
    if config is None:
        units = triton_ops.multiprocessors(q.device)
        config = kernels.select(b, h, lq, lk, d, q.element_size(), units, triton_ops.capability(q.device))
    out = torch.empty((b, lq, h, d), dtype=q.dtype, device=q.device)
    # The kernel takes strides in units of 8 elements; those of dimensions of size 1 may be anything.
    strides = [0 if n == 1 else s // 8 for t in (q, k, v) for n, s in zip(t.shape[:3], t.stride()[:3])]
    mask_stride = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
    log2_scale = (d**-0.5 if scale is None else scale) * math.log2(math.e)
    triton_ops.launch(
        kernels.kernel_of(config), (kernels.programs(config, b, h, lq),), q, k, v,
        q if mask is None else mask.view(torch.uint8), out, log2_scale, h, lq, lk, *strides, mask_stride,
        **kernels.constants(config, d, lk, mask is not None, q.element_size()),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out.transpose(1, 2)


def attention_launches() -> int:
    """Kernels that one call of `attention_kernel` launches."""
    return 1


def can_use_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> triton_ops.Usable:
    """Whether `attention_kernel` runs here, and if not, why."""
    fast, reason = triton_ops.can_use("attention", q, k, v, mask)
    return suits(q, k, v, mask, scale) if fast else (fast, reason)


def suits(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> triton_ops.Usable:
    """Whether the kernel takes such a call on a device that has it, and if not, why."""
    from pydiff.kernels import attention as kernels

    if mask is not None and (mask.dim() != 2 or mask.dtype != torch.bool or mask.stride(1) != 1):
        return False, "the mask is not one of keys, bool [B, Lk] with its last dimension dense"
    if scale is not None and not scale > 0.0:
        return False, f"scale={scale} is not positive"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(3) != 1:
            return False, f"the last dimension of {name} has stride {t.stride(3)}, not 1"
        if any(s % 8 for n, s in zip(t.shape[:3], t.stride()[:3]) if n > 1):
            return False, f"{name} has strides {t.stride()[:3]}, not all multiples of 8"
        if t.stride(2) >= _LARGEST_STRIDE:
            return False, f"the rows of {name} are {t.stride(2)} elements apart, more than {_LARGEST_STRIDE}"
    return kernels.supports(q.shape[3], q.element_size())
