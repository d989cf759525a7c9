"""Attention of images and text: softmax(scale q k^T) v, by the fastest of several backends for its shape.

`attention` is the operation. On the CPU and where gradients are needed it is PyTorch's `scaled_dot_product_attention`,
`attention_reference`; on CUDA devices `pydiff.ops.attention.backends` chooses among PyTorch's backends and
`attention_kernel`, the Triton kernels of `pydiff.kernels.attention`.
"""

from __future__ import annotations

import torch

from pydiff.ops import triton_ops
from pydiff.ops.attention import backends
from pydiff.ops.attention.kernel import attention_kernel as attention_kernel
from pydiff.ops.attention.kernel import attention_launches as attention_launches
from pydiff.ops.attention.kernel import can_use_attention as can_use_attention
from pydiff.ops.attention.reference import attention_reference


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """k and v in the batch of q, and the mask, one of keys [B, Lk] if it can be; ValueError if they do not fit."""
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype} {tuple(q.shape)}; attention takes floating-point [B, H, Lq, D]")
    b, h, lq, d = q.shape
    for name, t in (("k", k), ("v", v)):
        if t.dim() != 4 or t.shape[0] not in (1, b) or t.shape[1] != h or t.shape[3] != d or t.shape[2] != k.shape[2]:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}, k {tuple(k.shape)} and q {tuple(q.shape)}; k and v must be"
                f" [{b} or 1, {h}, Lk, {d}]"
            )
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"{name} is {t.dtype} on {t.device}, q {q.dtype} on {q.device}; convert one to the other")
    if k.shape[2] == 0 and q.numel():
        raise ValueError("k has no rows: attention needs one key at least")
    k, v = (t if t.shape[0] == b else t.expand(b, h, t.shape[2], d) for t in (k, v))
    return k, v, None if mask is None else _check_mask(mask, q, k.shape[2])


def _check_mask(mask: torch.Tensor, q: torch.Tensor, lk: int) -> torch.Tensor:
    b, h, lq, _ = q.shape
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}, q on {q.device}; move one to the other")
    if mask.dim() == 2 and mask.dtype == torch.bool and mask.shape[0] in (1, b) and mask.shape[1] == lk:
        return mask
    fits = mask.dim() == 4 and all(n in (1, m) for n, m in zip(mask.shape[:3], (b, h, lq))) and mask.shape[3] == lk
    if not fits or mask.dtype not in (torch.bool, q.dtype):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; it must be a bool mask of keys, [{b} or 1, {lk}], or a bool or"
            f" {q.dtype} one, [{b} or 1, {h} or 1, {lq} or 1, {lk}]"
        )
    return mask[:, 0, 0] if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1 else mask


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """softmax(scale q k^T) v, [B, H, Lq, D], whose memory is [B, Lq, H, D] whichever backend ran.

    So ``out.transpose(1, 2).flatten(2)`` is a view. Statistics and accumulators are float32, and the Triton kernels
    multiply float32 inputs exactly (no TF32). Contract: close; the kernels' error against float64 is at most twice that
    of PyTorch's own attention in the same dtype. Which backend runs on a CUDA device is measured, see
    `pydiff.ops.attention.backends`; `attention_reference` runs on the CPU, where gradients are needed, under autocast,
    and with masks that are not of keys.

    Args:
        q: [B, H, Lq, D], any strides; the fast kernels want the last one to be 1 and the others multiples of 8.
        k: [B, H, Lk, D], or with a batch of 1, which all rows share.
        v: the same shape as k.
        mask: bool [B, Lk] (or [B, 1, 1, Lk]), True where a key may be attended to; rows without any such key give
            zeros. A general bool or additive mask [B or 1, H or 1, Lq or 1, Lk] goes to PyTorch. Two dimensions mean
            [B, Lk] here, where `scaled_dot_product_attention` takes them for [Lq, Lk].
        scale: of the scores, D**-0.5 by default.
    """
    if q.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(q.device.type):
        return attention_reference(q, k, v, mask, scale)  # q, k and v may differ in dtype: PyTorch converts them
    k, v, mask = _check(q, k, v, mask)
    if q.device.type != "cuda" or _plain_torch(q, k, v, mask):
        return attention_reference(q, k, v, mask, scale)
    if triton_ops.traced(q):
        return attention_reference(q, k, v, mask, scale) if _op is None else _op(q, k, v, mask, scale)
    return backends.run(q, k, v, mask, scale)


def _plain_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> bool:
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return grad or q.numel() == 0 or (mask is not None and mask.dim() == 4)


def _traced(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """What a compiler sees: the backend that was remembered or is likely best, chosen while tracing."""
    return backends.run_unmeasured(q, k, v, mask, scale)


_op = triton_ops.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale) -> Tensor", _traced, attention_reference
)
