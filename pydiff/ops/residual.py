"""Residual addition with what surrounds it: the layer's bias, a gate, the output scale."""

from __future__ import annotations

import torch
from torch import Tensor

from pydiff.ops import triton_ops


def residual_add_launches() -> int:
    """Kernels that one call launches."""
    return 1


def _check(x: Tensor, residual: Tensor | None, bias: Tensor | None, gate: Tensor | None, channel_dim: int) -> None:
    if x.dim() < 2 or channel_dim not in (1, -1):
        raise ValueError(
            f"residual_add: x has shape {tuple(x.shape)} and channel_dim is {channel_dim}; give [N, C, ...] with "
            "channel_dim=1 or [B, ..., C] with channel_dim=-1"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual_add: residual is {residual.dtype} {tuple(residual.shape)}; give the dtype and shape of x, "
            f"{x.dtype} {tuple(x.shape)}"
        )
    channels = x.shape[channel_dim]
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"residual_add: bias has shape {tuple(bias.shape)}; give one value a channel, ({channels},)")
    if gate is not None:
        shape = tuple(gate.shape)
        ones = [1] * (x.dim() - 2)
        rest = [*shape[2:]] if channel_dim == 1 else [*shape[1:-1]]
        right = len(shape) >= 2 and shape[0] in (1, x.shape[0]) and rest in ([], ones)
        if not right or shape[1 if channel_dim == 1 else -1] != channels:
            raise ValueError(f"residual_add: gate has shape {shape}; give [B, C]: ({x.shape[0]}, {channels})")


def _per_row(gate: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """The gate as [B or 1, C]."""
    return gate.reshape(gate.shape[0], x.shape[channel_dim])


def residual_add_reference(
    x: Tensor, residual: Tensor | None = None, *, bias: Tensor | None = None, gate: Tensor | None = None,
    scale: float = 1.0, channel_dim: int = 1,
) -> Tensor:  # fmt: skip
    """`residual_add` as PyTorch's own chain: add the bias, multiply, add the residual, scale; differentiable."""
    shape = [1] * x.dim()
    shape[channel_dim] = x.shape[channel_dim]
    y = x
    if bias is not None:
        y = y + bias.reshape(shape)
    if gate is not None:
        gate = _per_row(gate, x, channel_dim)
        y = gate.reshape(gate.shape[0], *shape[1:]) * y
    if residual is not None:
        y = residual + y
    y = (y if scale == 1.0 else y * scale).to(x.dtype)
    like = _dense(x, channel_dim)
    return torch.empty_like(like).copy_(y) if y is x or y.stride() != like.stride() else y


def _dense(x: Tensor, channel_dim: int) -> Tensor:
    """x if it is contiguous with its channels either first or last, else a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(channel_dim, -1).is_contiguous() else x.contiguous()


def residual_add_kernel(
    x: Tensor, residual: Tensor | None = None, *, bias: Tensor | None = None, gate: Tensor | None = None,
    scale: float = 1.0, channel_dim: int = 1,
) -> Tensor:  # fmt: skip
    """One launch of `pydiff.kernels.residual`; a second to copy a residual whose layout is not that of x."""
    from pydiff.kernels import residual as kernels

    x = _dense(x, channel_dim)
    y = torch.empty_like(x)
    if residual is not None and residual.stride() != x.stride():
        residual = torch.empty_like(x).copy_(residual)
    channels, batch = x.shape[channel_dim], x.shape[0]
    by_row = not x.movedim(channel_dim, -1).is_contiguous()
    rows = batch * channels if by_row else x.numel() // channels
    cols = x.numel() // rows
    period = rows // batch
    if gate is not None:
        gate = _per_row(gate, x, channel_dim)
        gate = gate if gate.stride(1) == 1 else gate.contiguous()
    gate_batch = gate.stride(0) if gate is not None and gate.shape[0] > 1 else 0
    config = kernels.select(rows, cols, triton_ops.multiprocessors(x.device))
    triton_ops.launch(
        kernels.residual_add_kernel, (-(-rows // config.rows) * -(-cols // config.cols),),
        x, residual, None if bias is None else bias.contiguous(), gate, y, rows, cols, period, gate_batch, float(scale),
        CHANNEL_ROWS=by_row, ROWS=config.rows, COLS=config.cols, num_warps=config.num_warps,
    )  # fmt: skip
    return y


def can_use_residual_add(x: Tensor, *others: Tensor | None) -> triton_ops.Usable:
    """Whether the kernel takes these tensors, and if not, why."""
    return triton_ops.can_use("residual_add", x, *others)


def residual_add(
    x: Tensor, residual: Tensor | None = None, *, bias: Tensor | None = None, gate: Tensor | None = None,
    scale: float = 1.0, channel_dim: int = 1,
) -> Tensor:  # fmt: skip
    """``(residual + gate * (x + bias)) * scale``, computed in float32 and rounded once.

    Close: within twice the error of PyTorch's separate operations in x's dtype. Elsewhere than on a CUDA device, and
    for gradients, `residual_add_reference`.

    Args:
        x: [N, C, *spatial], contiguous or channels_last (channel_dim=1), or tokens [B, ..., C] (channel_dim=-1). The
            result has its shape, dtype and layout; any other layout of x becomes contiguous.
        residual: like x, in any layout, or None.
        bias: [C], or None.
        gate: [B, C] (B may be 1; dimensions of size 1 may stand for the spatial ones), or None for 1.
        scale: 1 / output_scale_factor in diffusers' residual blocks.
        channel_dim: the dimension of x that bias and gate index, 1 or -1.
    """
    _check(x, residual, bias, gate, channel_dim)
    fast, reason = can_use_residual_add(x, residual, bias, gate)
    if not fast:
        triton_ops.refused("residual_add", x, reason)
        return residual_add_reference(x, residual, bias=bias, gate=gate, scale=scale, channel_dim=channel_dim)
    if triton_ops.traced(x):
        return _residual_add(x, residual, bias, gate, scale, channel_dim)
    return residual_add_kernel(x, residual, bias=bias, gate=gate, scale=scale, channel_dim=channel_dim)


_residual_add = triton_ops.define(
    "residual_add(Tensor x, Tensor? residual, Tensor? bias, Tensor? gate, float scale, int channel_dim) -> Tensor",
    lambda x, residual, bias, gate, scale, channel_dim: residual_add_kernel(
        x, residual, bias=bias, gate=gate, scale=scale, channel_dim=channel_dim
    ),
    lambda x, residual, bias, gate, scale, channel_dim: residual_add_reference(
        x, residual, bias=bias, gate=gate, scale=scale, channel_dim=channel_dim
    ),
)
