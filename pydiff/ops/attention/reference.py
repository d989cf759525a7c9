"""Attention by PyTorch, and the layouts and masks that all backends share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def sequence_major(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, L, D], copied unless its memory is already [B, L, H, D]."""
    y = x.transpose(1, 2)  # clone, not contiguous: a torch without CUDA has that for fake CUDA tensors too
    return (y if y.is_contiguous() else y.clone(memory_format=torch.contiguous_format)).transpose(1, 2)


def expanded_mask(mask: torch.Tensor) -> torch.Tensor:
    """A key mask [B, Lk] in the form that PyTorch takes, [B, 1, 1, Lk]; other masks as they are."""
    return mask[:, None, None, :] if mask.dim() == 2 else mask


def without_dead_rows(out: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`out` [B, H, Lq, D] with zeros in the rows that may attend to nothing, where PyTorch's backends differ."""
    if mask is None:
        return out
    mask = expanded_mask(mask)
    dead = ~mask.any(-1, keepdim=True) if mask.dtype == torch.bool else (mask == -math.inf).all(-1, keepdim=True)
    return out.masked_fill(dead, 0.0)


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """`attention` by PyTorch's own choice of `scaled_dot_product_attention`; differentiable, any floating dtype."""
    k, v = (t.expand(q.shape[0], *t.shape[1:]) for t in (k, v))
    attn_mask = None if mask is None else expanded_mask(mask)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
    return sequence_major(without_dead_rows(out, mask))
