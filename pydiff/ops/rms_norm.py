"""RMSNorm over the last dimension, and RMSNorm with rotary embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from pydiff.ops import triton_ops

Pair = tuple[Tensor, Tensor]

MAX_CHANNELS = 16384  # of a row that one program of the kernel holds
MAX_HEAD_DIM = 1024


def rms_norm_launches() -> int:
    """Kernels that one call launches."""
    return 1


def qk_norm_rotary_launches() -> int:
    """Kernels that one call launches: q and k share it."""
    return 1


def rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """`rms_norm` as PyTorch's own chain, that of diffusers' RMSNorm; differentiable."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y.to(torch.promote_types(x.dtype, weight.dtype)) * weight
    return y.to(x.dtype).contiguous()


def rms_norm_kernel(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """One launch of `pydiff.kernels.rms_norm`."""
    from pydiff.kernels import rms_norm as kernels

    channels = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat = x.reshape(-1, channels)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows = flat.shape[0]
    config = kernels.select(rows, channels, triton_ops.multiprocessors(x.device))
    triton_ops.launch(
        kernels.rms_norm_kernel, (-(-rows // config.rows),),
        flat, None if weight is None else weight.contiguous(), y, rows, flat.stride(0), eps,
        CHANNELS=channels, BLOCK=config.block, ROWS=config.rows, num_warps=config.num_warps,
    )  # fmt: skip
    return y


def can_use_rms_norm(x: Tensor, *others: Tensor | None) -> triton_ops.Usable:
    """Whether the kernel takes these tensors, and if not, why."""
    if x.shape[-1] > MAX_CHANNELS:
        return False, f"{x.shape[-1]} channels are more than {MAX_CHANNELS}"
    return triton_ops.can_use("rms_norm", x, *others)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension of x.

    Statistics are float32. Close: within twice the error of diffusers' RMSNorm in x's dtype. Elsewhere than on a CUDA
    device, for gradients and for more than 16384 channels, `rms_norm_reference`.

    Args:
        x: [..., C], float; the result is contiguous, of its shape and dtype.
        weight: [C] or None.
    """
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}; x ends in {x.shape[-1]} channels")
    fast, reason = can_use_rms_norm(x, weight)
    if not fast:
        triton_ops.refused("rms_norm", x, reason)
        return rms_norm_reference(x, weight, eps)
    return _rms_norm(x, weight, eps) if triton_ops.traced(x) else rms_norm_kernel(x, weight, eps)


def _check(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"qk_norm_rotary: q has shape {tuple(q.shape)} and k {tuple(k.shape)}; give [B, L, heads, D] with the same "
            "B, L and D"
        )
    if q.dtype != k.dtype:
        raise ValueError(f"qk_norm_rotary: q is {q.dtype} and k is {k.dtype}; give one dtype")
    batch, tokens, _, dim = q.shape
    if dim % 2:
        raise ValueError(f"qk_norm_rotary: heads have {dim} elements; give an even number, or use rms_norm")
    if (q_weight is None) != (k_weight is None) or (cos is None) != (sin is None):
        raise ValueError("qk_norm_rotary: give both of q_weight and k_weight or neither, and so with cos and sin")
    if q_weight is None and cos is None:
        raise ValueError("qk_norm_rotary: weights and cos are None, so there is nothing to do; give one of them")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and tuple(weight.shape) != (dim,):
            raise ValueError(f"qk_norm_rotary: {name} has shape {tuple(weight.shape)}; heads have {dim} elements")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and tuple(table.shape) not in ((tokens, dim), (batch, tokens, dim), (1, tokens, dim)):
            raise ValueError(
                f"qk_norm_rotary: {name} has shape {tuple(table.shape)}; give ({tokens}, {dim}) or "
                f"({batch}, {tokens}, {dim})"
            )


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    return (x.to(wide) * cos.unsqueeze(-2) + turned.to(wide) * sin.unsqueeze(-2)).to(x.dtype)


def qk_norm_rotary_reference(
    q: Tensor, k: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None, cos: Tensor | None = None,
    sin: Tensor | None = None, *, eps: float = 1e-6, interleaved: bool = True,
) -> Pair:  # fmt: skip
    """`qk_norm_rotary` as diffusers does it: RMSNorm, rounded, then apply_rotary_emb; differentiable."""
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = x if weight is None else rms_norm_reference(x, weight, eps)
        results.append(y if cos is None or sin is None else _rotary(y, cos, sin, interleaved))
    return results[0].contiguous(), results[1].contiguous()


def qk_norm_rotary_kernel(
    q: Tensor, k: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None, cos: Tensor | None = None,
    sin: Tensor | None = None, *, eps: float = 1e-6, interleaved: bool = True,
) -> Pair:  # fmt: skip
    """One launch of `pydiff.kernels.rms_norm` for both tensors."""
    from pydiff.kernels import rms_norm as kernels

    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    q_weight, k_weight = (None if t is None else t.contiguous() for t in (q_weight, k_weight))
    batch, tokens, heads, dim = q.shape
    cos_strides = [0, 0]
    if cos is not None and sin is not None:
        cos, sin = (t if t.dim() == 3 else t.unsqueeze(0) for t in (cos, sin))
        if cos.stride(2) != 1 or cos.shape != sin.shape or cos.stride() != sin.stride():
            cos, sin = (t.contiguous() for t in torch.broadcast_tensors(cos, sin))
        cos_strides = [cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)]
    most = max(heads, k.shape[2])
    config = kernels.select_heads(most, dim)
    triton_ops.launch(
        kernels.qk_norm_rotary_kernel, (batch * tokens, -(-most // config.heads), 2),
        q, k, q_weight, k_weight, cos, sin, q_out, k_out, tokens, heads, k.shape[2],
        *q.stride()[:3], *k.stride()[:3], *cos_strides, eps,
        HEAD_DIM=dim, HEADS=config.heads, HALF=config.half, INTERLEAVED=interleaved, num_warps=config.num_warps,
    )  # fmt: skip
    return q_out, k_out


def can_use_qk_norm_rotary(q: Tensor, k: Tensor, *others: Tensor | None) -> triton_ops.Usable:
    """Whether the kernel takes these tensors, and if not, why."""
    if q.shape[3] > MAX_HEAD_DIM:
        return False, f"heads of {q.shape[3]} elements are longer than {MAX_HEAD_DIM}"
    if k.numel() == 0:
        return False, "the keys are empty"
    return triton_ops.can_use("qk_norm_rotary", q, k, *others)


def qk_norm_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None, cos: Tensor | None = None,
    sin: Tensor | None = None, *, eps: float = 1e-6, interleaved: bool = True,
) -> Pair:  # fmt: skip
    """RMSNorm each head of q and of k, then rotate its pairs: ``x * cos + turned(x) * sin``.

    Statistics are float32, and the normalised values are not rounded before the rotation, as they are in diffusers.
    Close: within twice the error of diffusers' RMSNorm and apply_rotary_emb in q's dtype. Elsewhere than on a CUDA
    device, for gradients and for heads of more than 1024 elements, `qk_norm_rotary_reference`.

    Args:
        q, k: [B, L, heads, D], float, of one dtype; views of a fused projection are read where they are. k may have
            fewer heads than q. The results are contiguous, of these shapes and dtype.
        q_weight, k_weight: [D]; None for both: no norm.
        cos, sin: [L, D] or [B, L, D], as diffusers' get_1d_rotary_pos_embed gives them; None for both: no rotation.
        interleaved: pairs are elements (0, 1), (2, 3), ... (diffusers' use_real_unbind_dim=-1), else (0, D/2),
            (1, D/2 + 1), ... (-2).
    """
    _check(q, k, q_weight, k_weight, cos, sin)
    fast, reason = can_use_qk_norm_rotary(q, k, q_weight, k_weight, cos, sin)
    if not fast:
        triton_ops.refused("qk_norm_rotary", q, reason)
        return qk_norm_rotary_reference(q, k, q_weight, k_weight, cos, sin, eps=eps, interleaved=interleaved)
    if triton_ops.traced(q):
        return _qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, eps, interleaved)
    return qk_norm_rotary_kernel(q, k, q_weight, k_weight, cos, sin, eps=eps, interleaved=interleaved)


_rms_norm = triton_ops.define(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor", rms_norm_kernel, rms_norm_reference
)
_qk_norm_rotary = triton_ops.define(
    "qk_norm_rotary(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, "
    "bool interleaved) -> (Tensor, Tensor)",
    lambda q, k, q_weight, k_weight, cos, sin, eps, interleaved: qk_norm_rotary_kernel(
        q, k, q_weight, k_weight, cos, sin, eps=eps, interleaved=interleaved
    ),
    lambda q, k, q_weight, k_weight, cos, sin, eps, interleaved: qk_norm_rotary_reference(
        q, k, q_weight, k_weight, cos, sin, eps=eps, interleaved=interleaved
    ),
)
