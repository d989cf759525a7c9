"""LayerNorm over the last dimension, with the gated residual before it and the adaptive scale and shift after it."""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pydiff.ops import triton_ops

Normed = Tensor | tuple[Tensor, Tensor]

MAX_CHANNELS = 16384  # of a row that one program of the kernel holds


def layer_norm_launches() -> int:
    """Kernels that one call launches."""
    return 1


def _aligned(modulation: Tensor, x: Tensor) -> Tensor:
    """[B, C] seen as [B, 1, ..., C], so that it broadcasts over the tokens of x; any other shape as it is."""
    if modulation.dim() == 2 and x.dim() > 2:
        return modulation.reshape(modulation.shape[0], *[1] * (x.dim() - 2), modulation.shape[1])
    return modulation


def _check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, total_bias: Tensor | None,
) -> None:  # fmt: skip
    if x.dim() < 2:
        raise ValueError(f"layer_norm: x has shape {tuple(x.shape)}; give [B, ..., C]")
    for name, tensor in (("weight", weight), ("bias", bias), ("total_bias", total_bias)):
        if tensor is not None and tuple(tensor.shape) != (x.shape[-1],):
            raise ValueError(f"layer_norm: {name} has shape {tuple(tensor.shape)}; x ends in {x.shape[-1]} channels")
    if gate is not None and residual is None:
        raise ValueError("layer_norm: gate is given without residual; it multiplies x before the residual is added")
    if total_bias is not None and residual is None:
        raise ValueError("layer_norm: total_bias is given without residual; it is added to the sum of the two")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"layer_norm: residual is {residual.dtype} {tuple(residual.shape)}; give the dtype and shape of x, "
            f"{x.dtype} {tuple(x.shape)}"
        )
    for name, tensor in (("gate", gate), ("scale", scale), ("shift", shift)):
        if tensor is None or tensor.shape == x.shape:
            continue
        shape = tuple(tensor.shape)
        right = len(shape) in (2, x.dim()) and shape[-1] == x.shape[-1] and shape[0] in (1, x.shape[0])
        if not right or any(size != 1 for size in shape[1:-1]):
            raise ValueError(
                f"layer_norm: {name} has shape {shape}; give [B, C], [B, 1, C] or the shape of x, {tuple(x.shape)}"
            )


def layer_norm_reference(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    residual: Tensor | None = None, gate: Tensor | None = None, scale: Tensor | None = None,
    shift: Tensor | None = None, total_bias: Tensor | None = None,
) -> Normed:  # fmt: skip
    """`layer_norm` as PyTorch's own chain: multiply, add, `F.layer_norm`, multiply, add; differentiable."""
    total = x
    if residual is not None:
        total = (residual + (x if gate is None else _aligned(gate, x) * x)).to(x.dtype)
    affine = [t for t in (weight, bias) if t is not None]
    if any(t.dtype != x.dtype for t in affine):  # as FP32LayerNorm does
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
        y = F.layer_norm(total.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype)
    else:
        y = F.layer_norm(total, x.shape[-1:], weight, bias, eps)
    if scale is not None:
        y = y * (1 + _aligned(scale, x))
    if shift is not None:
        y = y + _aligned(shift, x)
    y = y.to(x.dtype).contiguous()
    if total_bias is not None:
        total = (total + total_bias).to(x.dtype)
    return y if residual is None else (y, total.contiguous())


def _rows(tensor: Tensor | None, x: Tensor) -> tuple[Tensor | None, int, int]:
    """`tensor`, its channels side by side, and its strides over batch and tokens where x is [B, tokens, C]."""
    if tensor is None:
        return None, 0, 0
    tensor = _aligned(tensor, x)
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    if tensor.shape == x.shape:
        flat = tensor.unsqueeze(1) if x.dim() == 2 else tensor.flatten(1, -2)
        return flat, flat.stride(0), flat.stride(1)
    return tensor, tensor.stride(0) if tensor.shape[0] > 1 else 0, 0


def layer_norm_kernel(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    residual: Tensor | None = None, gate: Tensor | None = None, scale: Tensor | None = None,
    shift: Tensor | None = None, total_bias: Tensor | None = None,
) -> Normed:  # fmt: skip
    """One launch of `pydiff.kernels.layer_norm`."""
    from pydiff.kernels import layer_norm as kernels

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels = x.shape[-1]
    rows = y.numel() // channels
    config = kernels.select(rows, channels, triton_ops.multiprocessors(x.device))
    weight, bias, total_bias = (None if t is None else t.contiguous() for t in (weight, bias, total_bias))
    flat, *x_strides = _rows(x, x)
    assert flat is not None
    residual, *residual_strides = _rows(residual, x)
    gate, *gate_strides = _rows(gate, x)
    scale, *scale_strides = _rows(scale, x)
    shift, *shift_strides = _rows(shift, x)
    triton_ops.launch(
        kernels.layer_norm_kernel, (-(-rows // config.rows),),
        flat, residual, gate, weight, bias, scale, shift, total_bias, y, total, rows, rows // x.shape[0],
        *x_strides, *residual_strides, *gate_strides, *scale_strides, *shift_strides, eps,
        CHANNELS=channels, BLOCK=config.block, ROWS=config.rows, num_warps=config.num_warps,
    )  # fmt: skip
    return y if total is None else (y, total)


def can_use_layer_norm(x: Tensor, *others: Tensor | None) -> triton_ops.Usable:
    """Whether the kernel takes these tensors, and if not, why."""
    if x.shape[-1] > MAX_CHANNELS:
        return False, f"{x.shape[-1]} channels are more than {MAX_CHANNELS}"
    return triton_ops.can_use("layer_norm", x, *others)


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, residual: None = None,
    gate: None = None, scale: Tensor | None = None, shift: Tensor | None = None, total_bias: None = None,
) -> Tensor: ...  # fmt: skip


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor,
    gate: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
    total_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    residual: Tensor | None = None, gate: Tensor | None = None, scale: Tensor | None = None,
    shift: Tensor | None = None, total_bias: Tensor | None = None,
) -> Normed:  # fmt: skip
    """Normalise the channels of x, or of ``residual + gate * x``, and return ``norm * (1 + scale) + shift``.

    Statistics are float32. Close: within twice the error of PyTorch's separate operations in x's dtype. Elsewhere than
    on a CUDA device, for gradients and for more than 16384 channels, `layer_norm_reference`.

    Args:
        x: [B, ..., C], float; results are contiguous, of x's shape and dtype.
        weight, bias: [C], each may be None.
        residual: like x. Given, the result is ``(y, s)``: s the sum, rounded to x's dtype, and y the norm of s.
        total_bias: [C], added to the s that is returned and not to what is normed: the bias of a product that is to be
            accumulated into s.
        gate, scale, shift: [B, C] or [B, 1, C] for all tokens of a row (B may be 1), or of x's shape. No gate: 1.
    """
    _check(x, weight, bias, residual, gate, scale, shift, total_bias)
    fast, reason = can_use_layer_norm(x, weight, bias, residual, gate, scale, shift, total_bias)
    if not fast:
        triton_ops.refused("layer_norm", x, reason)
    elif triton_ops.traced(x):
        if residual is None:
            return _layer_norm(x, weight, bias, eps, scale, shift)
        return _add_layer_norm(x, residual, weight, bias, eps, gate, scale, shift, total_bias)
    function = layer_norm_kernel if fast else layer_norm_reference
    return function(x, weight, bias, eps, residual=residual, gate=gate, scale=scale, shift=shift, total_bias=total_bias)


_layer_norm = triton_ops.define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift) -> Tensor",
    lambda x, weight, bias, eps, scale, shift: layer_norm_kernel(x, weight, bias, eps, scale=scale, shift=shift),
    lambda x, weight, bias, eps, scale, shift: layer_norm_reference(x, weight, bias, eps, scale=scale, shift=shift),
)
_add_layer_norm = triton_ops.define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, Tensor? gate, Tensor? scale, "
    "Tensor? shift, Tensor? total_bias) -> (Tensor, Tensor)",
    lambda x, residual, weight, bias, eps, gate, scale, shift, total_bias: layer_norm_kernel(
        x, weight, bias, eps, residual=residual, gate=gate, scale=scale, shift=shift, total_bias=total_bias
    ),
    lambda x, residual, weight, bias, eps, gate, scale, shift, total_bias: layer_norm_reference(
        x, weight, bias, eps, residual=residual, gate=gate, scale=scale, shift=shift, total_bias=total_bias
    ),
)
