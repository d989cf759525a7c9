"""The bundled U-Net (`pydiff.models.UNet`), fused: its blocks, its attention, its skip connections, and hoisting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pydiff.ops.attention import attention
from pydiff.ops.group_norm import group_norm
from pydiff.ops.residual import residual_add
from pydiff.ops.upsample import upsample_conv2d
from pydiff.optimize.hoisting import Hoistable, assign, gathered, own_columns
from pydiff.optimize.parts import cat, convolution, is_nhwc, is_plain, norm_act, pointwise, unhooked
from pydiff.optimize.swap import Fused, Rule, fused_class, ready


def _norm_silu(norm: Any, x: Tensor, **extra: Tensor | None) -> Any:
    """GroupNorm and the SiLU that the model applies as a function."""
    if not is_plain(norm, nn.GroupNorm):
        return F.silu(norm_act(norm, None, x, **extra))
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation="silu", **extra)


class FusedResBlock(Fused):
    """ResBlock: GroupNorm and SiLU in one operation, bias and embedding in the second; one residual operation."""

    def forward(self: Any, x: Tensor, embedding: Tensor, *, skip: Tensor | None = None) -> Tensor:
        """The block on [x; skip]; embedding [N, E], or every block's hoisted columns."""
        modulation = own_columns(vars(self).get("_pydiff_time"), embedding)
        if modulation is None and not ready(self, x):
            return super().forward(cat(x, skip), embedding)
        h, bias = convolution(self.conv1, _norm_silu(self.norm1, x, x2=skip))
        scale, shift = (self.embedding(embedding) if modulation is None else modulation).chunk(2, dim=1)
        h = _norm_silu(self.norm2, h, add=bias, scale=scale, shift=shift)
        projected = isinstance(self.skip, nn.Conv2d)
        shortcut = pointwise(self.skip, x, skip) if projected else self.skip(cat(x, skip))
        h, bias = convolution(self.conv2, h)
        return residual_add(h, shortcut, bias=bias)


class FusedSelfAttention(Fused):
    """SelfAttention: tokens without a copy, and the attention backend measured fastest."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        if not ready(self, x):
            return super().forward(x)
        tokens = norm_act(self.norm, None, x).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = self.out(attention(q, k, v).transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, x.shape[2:])
        return residual_add(h.contiguous() if x.is_contiguous() else h, x)


class FusedUpsample(Fused):
    """Upsample folded into its convolution."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, out, 2H, 2W]."""
        if not is_plain(self.conv, nn.Conv2d) or not ready(self, x):
            return super().forward(x)
        return upsample_conv2d(x, self.conv.weight, self.conv.bias)


class FusedUNet(Fused):
    """The trunk: skip connections read without concatenation, and the last norm with its SiLU."""

    def joined(self: Any, block: Any, h: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
        """A block on [h; skip], whose concatenation is made only where something wants it."""
        first = block[0]
        fused = unhooked(block) and isinstance(first, FusedResBlock) and unhooked(first)
        if not fused or not is_nhwc(h) or not is_nhwc(skip):
            return super().joined(block, h, skip, embedding)  # type: ignore[misc]
        h = first(h, embedding, skip=skip)
        return block[1](h) if len(block) > 1 else h

    def activated(self: Any, h: Tensor) -> Tensor:
        """What the last convolution reads, from its norm's input h [B, C, H, W]."""
        return _norm_silu(self.norm_out, h) if ready(self, h) else super().activated(h)  # type: ignore[misc]


class HoistableUNet(FusedUNet, Hoistable):
    """The U-Net whose blocks' projections of time and label can be computed before the loop."""

    hoisted_arguments = ("labels",)

    def hoist_times(self: Any, times: Tensor, cond: Mapping[str, Any]) -> Tensor:
        blocks, total = self._pydiff_time_blocks
        embedding = self.embed(times, cond.get("labels"), times.shape[0])
        return gathered([b.embedding(embedding) for b in blocks], total)

    def hoisted_forward(self: Any, x: Tensor, embedding: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return self.trunk(x, embedding)


def _prepare(model: Any) -> None:
    blocks: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "embedding", None), nn.Linear)]
    if not all(isinstance(b, FusedResBlock) for b in blocks):
        return  # a block that was left as it is needs the embedding itself
    total = assign("_pydiff_time", blocks, [b.embedding.out_features for b in blocks], (model.embedding_dim,))
    object.__setattr__(model, "_pydiff_time_blocks", (blocks, total))
    model.__class__ = fused_class(HoistableUNet, type(model)._original)


_HERE = "pydiff.models.unet"
RULES = (
    Rule(
        (f"{_HERE}.ResBlock",), FusedResBlock, "GroupNorm+SiLU, bias and embedding in the norm, one residual operation"
    ),
    Rule((f"{_HERE}.SelfAttention",), FusedSelfAttention, "tokens without a copy; the fastest attention backend"),
    Rule((f"{_HERE}.Upsample",), FusedUpsample, "upsampling folded into the convolution", option="fold_upsampling"),
    Rule(
        (f"{_HERE}.UNet",),
        FusedUNet,
        "skip connections read without concatenation; last norm with SiLU; embeddings can be hoisted",
        prepare=_prepare,
    ),
)
