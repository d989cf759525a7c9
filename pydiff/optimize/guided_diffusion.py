"""The U-Net of guided-diffusion (ADM), its blocks also as latent-diffusion and other forks have them, fused.

What changes in a residual block: GroupNorm and SiLU are one operation, in which the first convolution's bias and the
embedding's projection (added, or as scale and shift) enter the second norm; the last bias and the shortcut are one
pointwise operation. Attention's projections are matrix products over pixels
that are tokens without a copy where the image is channels-last. Nothing is checkpointed, for there is no backward. The
up path hands a residual block its two inputs, so that their concatenation is never made.

The classes are met by their bare names, for forks keep them in modules of their own; each is compared with its fused
form before it is replaced (`pydiff.optimize.probe`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydiff.ops.attention import attention
from pydiff.ops.group_norm import group_norm
from pydiff.ops.residual import residual_add
from pydiff.ops.upsample import upsample_conv2d
from pydiff.optimize import parts, probe
from pydiff.optimize.hoisting import Hoistable, assign, gathered, own_columns
from pydiff.optimize.parts import cat, convolution, is_nhwc, is_plain, is_plain_3x3, plain_weight, pointwise, unhooked
from pydiff.optimize.swap import Fused, Rule, fused_class, ready


def is_group_norm(norm: nn.Module) -> bool:
    """nn.GroupNorm, or the GroupNorm32 that computes in float32 whatever it is given, as the fused kernel does."""
    if type(norm) is nn.GroupNorm:
        return True
    return type(norm).__name__ == "GroupNorm32" and type(norm).__bases__ == (nn.GroupNorm,)


def is_silu(activation: nn.Module) -> bool:
    """nn.SiLU, or the SiLU or Swish that older code has of its own."""
    return type(activation).__name__ in ("SiLU", "Swish") and not list(activation.parameters())


def norm_act(norm: Any, activation: nn.Module | None, x: Tensor, **extra: Tensor | None) -> Any:
    """`parts.norm_act`, which also knows GroupNorm32 and SiLU by other classes."""
    hooked = not unhooked(norm) or (activation is not None and not (unhooked(activation) and is_silu(activation)))
    if hooked or not is_group_norm(norm) or not plain_weight(norm.weight):
        return parts.norm_act(norm, activation, x, **extra)
    return group_norm(
        x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=None if activation is None else "silu", **extra
    )


def _layers(sequence: nn.Module) -> list[Any] | None:
    """The layers of a Sequential that may be called one by one."""
    return list(sequence.children()) if unhooked(sequence) else None


class FusedGuidedResBlock(Fused):
    """ResBlock: GroupNorm and SiLU in one operation, bias and embedding in the second; one residual operation."""

    def forward(self: Any, x: Tensor, emb: Tensor, *args: Any, skip: Tensor | None = None) -> Tensor:
        """The block on [x; skip]; emb [N, E], or every block's hoisted columns."""
        modulation = own_columns(vars(self).get("_pydiff_time"), emb)
        if args or (modulation is None and not ready(self, x)):
            return super().forward(cat(x, skip), emb, *args)
        updown, h, bias = getattr(self, "updown", False), x, None
        if updown or unhooked(self.in_layers):
            norm, activation, conv = self.in_layers.children()
            h = norm_act(norm, activation, x, x2=skip)
            h, bias = _resampled(self.h_upd, conv, h) if updown else convolution(conv, h)
        else:
            h = self.in_layers(cat(x, skip))
        if updown:
            x, skip = self.x_upd(cat(x, skip)), None
        h, bias = self._second(h, bias, (self.emb_layers(emb) if modulation is None else modulation).to(h.dtype))
        return residual_add(h, self._shortcut(x, skip), bias=bias)

    def _second(self: Any, h: Tensor, bias: Tensor | None, modulation: Tensor) -> tuple[Tensor, Tensor | None]:
        """From the first convolution to the second, and the bias that is still to be added."""
        norm, activation, dropout, conv = self.out_layers.children()
        if self.use_scale_shift_norm:
            scale, shift = modulation.chunk(2, dim=1)
            h = norm_act(norm, activation, h, add=bias, scale=scale, shift=shift)
            return convolution(conv, dropout(h))
        modulation = modulation if bias is None else modulation + bias
        if not unhooked(self.out_layers):
            return self.out_layers(h + modulation.reshape(*modulation.shape, *([1] * (h.ndim - 2)))), None
        return convolution(conv, dropout(norm_act(norm, activation, h, add=modulation)))

    def _shortcut(self: Any, x: Tensor, skip: Tensor | None) -> Tensor:
        if isinstance(self.skip_connection, nn.Conv2d):
            return pointwise(self.skip_connection, x, skip)
        return self.skip_connection(cat(x, skip))


def _resampled(resample: Any, conv: Any, h: Tensor) -> tuple[Tensor, Tensor | None]:
    """Resampling and a convolution, and the bias still to be added."""
    folds = isinstance(resample, FusedGuidedUpsample) and unhooked(resample) and not resample.use_conv
    if folds and is_plain_3x3(conv):
        return upsample_conv2d(h, conv.weight), conv.bias
    return convolution(conv, resample(h))


def _is_norm_act_conv(layers: Any, dropout: bool) -> bool:
    found = list(layers.children()) if isinstance(layers, nn.Sequential) else []
    kinds = [nn.Dropout] if dropout else []
    if len(found) != 3 + len(kinds) or not is_group_norm(found[0]) or not is_silu(found[1]):
        return False
    # A wrapper around a convolution (LoRA, quantised weights) is called as it is.
    return all(isinstance(layer, kind) for layer, kind in zip(found[2:], kinds))


def _refuse_resblock(block: Any) -> str | None:
    needed = ("in_layers", "emb_layers", "out_layers", "skip_connection", "use_scale_shift_norm")
    if any(not hasattr(block, name) for name in needed):
        return "it is not guided-diffusion's ResBlock"
    if not _is_norm_act_conv(block.in_layers, False) or not _is_norm_act_conv(block.out_layers, True):
        return "its layers are not GroupNorm, SiLU and a convolution"
    linear = [m for m in block.emb_layers.children() if hasattr(m, "in_features")]
    if len(linear) != 1:
        return "its embedding is not projected by one linear layer"
    channels, width = block.in_layers[0].num_channels, linear[0].in_features
    dims = getattr(block.in_layers[2], "weight", torch.empty(0, 0, 0, 0)).ndim - 2
    variant = (
        block.use_scale_shift_norm,
        getattr(block, "updown", False),
        dims,
        getattr(block.skip_connection, "kernel_size", None),
    )
    return probe.differs(
        block,
        FusedGuidedResBlock,
        lambda g: (torch.randn(2, channels, *[4] * dims, generator=g), torch.randn(2, width, generator=g)),
        variant,
    )


class FusedGuidedAttention(Fused):
    """AttentionBlock: tokens without a copy, and the attention backend measured fastest."""

    def forward(self: Any, x: Tensor, *args: Any) -> Tensor:
        """AttentionBlock on [N, C, *spatial], every position a token."""
        inner = (self.attention, self.qkv, self.proj_out)
        if args or not all(unhooked(m) for m in inner) or not ready(self, x) or not _plain_projections(self):
            return super().forward(x, *args)
        tokens = norm_act(self.norm, None, x.flatten(2)).transpose(1, 2)
        qkv = F.linear(tokens, self.qkv.weight.flatten(1), self.qkv.bias)
        heads = self.attention.n_heads
        if type(self.attention).__name__ == "QKVAttentionLegacy":
            q, k, v = qkv.unflatten(2, (heads, 3, -1)).transpose(1, 2).unbind(3)
        else:
            q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        h = attention(q, k, v).transpose(1, 2).flatten(2)
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        image = h.transpose(1, 2).unflatten(2, x.shape[2:])
        return residual_add(image.contiguous() if x.is_contiguous() else image, x)


def _plain_projections(block: Any) -> bool:
    return is_plain(block.qkv, nn.Conv1d) and is_plain(block.proj_out, nn.Conv1d)


def _refuse_attention(block: Any) -> str | None:
    if any(not hasattr(block, name) for name in ("norm", "qkv", "attention", "proj_out")):
        return "it is not guided-diffusion's AttentionBlock"
    if not is_group_norm(block.norm) or not _plain_projections(block) or block.qkv.kernel_size != (1,):
        return "its norm is no GroupNorm, or its projections are no 1x1 convolutions"
    kind = type(block.attention).__name__
    if kind not in ("QKVAttention", "QKVAttentionLegacy") or not hasattr(block.attention, "n_heads"):
        return f"its attention is {kind}, not QKVAttention or QKVAttentionLegacy"
    if block.proj_out.out_channels != block.norm.num_channels:
        return "it changes the number of channels"
    channels = block.norm.num_channels
    return probe.differs(
        block,
        FusedGuidedAttention,
        lambda g: (torch.randn(2, channels, 3, 2, generator=g),),
        block.attention.n_heads > 1,
    )


class FusedGuidedUpsample(Fused):
    """Nearest upsampling and its 3x3 convolution as one operation; without one, the residual block around folds it."""

    def forward(self: Any, x: Tensor, *args: Any) -> Tensor:
        """x [B, C, H, W] -> [B, out, 2H, 2W]."""
        if args or x.ndim != 4 or not ready(self, x) or (self.use_conv and not is_plain_3x3(self.conv)):
            return super().forward(x, *args)
        if not self.use_conv:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return upsample_conv2d(x, self.conv.weight, self.conv.bias)


def _refuse_upsample(module: Any) -> str | None:
    if not all(hasattr(module, name) for name in ("use_conv", "dims", "channels")) or module.dims != 2:
        return "it is not guided-diffusion's Upsample, of images"
    if module.use_conv and not is_plain_3x3(getattr(module, "conv", None)):
        return "its convolution is not a plain 3x3 one"
    return probe.differs(
        module, FusedGuidedUpsample, lambda g: (torch.randn(1, module.channels, 3, 2, generator=g),), module.use_conv
    )


class FusedGuidedUNet(Fused):
    """UNetModel: skip connections read without concatenation, the last norm with SiLU."""

    def forward(self: Any, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], timesteps [B], labels y [B]."""
        if (y is None) != (self.num_classes is None) or not ready(self, x):
            return super().forward(x, timesteps, y)
        return self._trunk(x, self._embed(timesteps, y))

    def _embed(self: Any, timesteps: Tensor, y: Tensor | None) -> Tensor:
        emb = self.time_embed(self._pydiff_waves(timesteps, self.model_channels))
        return emb if y is None else emb + self.label_emb(y)

    def _trunk(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        """From the image and what the blocks are told to the output image."""
        h = x.to(self.dtype)
        skips = []
        for module in self.input_blocks:
            h = module(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = joined(module, h, skips.pop(), emb)
        h = h.to(x.dtype)
        out = _layers(self.out)
        if out is None:
            return self.out(h)
        return out[2](norm_act(out[0], out[1], h))


class HoistableGuidedUNet(FusedGuidedUNet, Hoistable):
    """UNetModel whose blocks' projections of time and label can be computed before the loop."""

    hoisted_arguments = ("y",)

    def hoist_times(self: Any, times: Tensor, cond: Mapping[str, Any]) -> Tensor:
        blocks, total = self._pydiff_time_blocks
        emb = self._embed(times, cond.get("y"))
        return gathered([b.emb_layers(emb) for b in blocks], total)

    def hoisted_forward(self: Any, x: Tensor, embedding: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return self._trunk(x, embedding.to(self.dtype))


def joined(module: Any, h: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
    """An output block on [h; skip], whose concatenation is made only for a block that wants it."""
    layers = _layers(module)
    fused = layers is not None and isinstance(layers[0], FusedGuidedResBlock) and unhooked(layers[0])
    if layers is None or not fused or not is_nhwc(h) or not is_nhwc(skip):
        return module(cat(h, skip), emb)
    h = layers[0](h, emb, skip=skip)
    for layer in layers[1:]:
        h = layer(h, emb) if _takes_embedding(layer) else layer(h)
    return h


def _takes_embedding(layer: nn.Module) -> bool:
    return any(cls.__name__ == "TimestepBlock" for cls in type(layer).__mro__)


CHILDREN = {"time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out"}


def _refuse_unet(model: Any) -> str | None:
    children = {name for name, _ in model.named_children()}
    if children - {"label_emb"} != CHILDREN - {"label_emb"} or list(model.parameters(recurse=False)):
        return "it is not guided-diffusion's UNetModel"
    if list(inspect.signature(type(model).forward).parameters) != ["self", "x", "timesteps", "y"]:
        return "its forward takes other arguments than (x, timesteps, y)"
    if ("label_emb" in children) != (getattr(model, "num_classes", None) is not None) or not hasattr(model, "dtype"):
        return "its classes are embedded in another way"
    if "timestep_embedding" not in getattr(type(model).forward, "__globals__", {}):
        return "its time embedding is not the function timestep_embedding"
    blocks = [*model.input_blocks, model.middle_block, *model.output_blocks]
    if any(type(b).__name__ != "TimestepEmbedSequential" for b in blocks):
        return "its blocks are not TimestepEmbedSequential"
    return None if _is_norm_act_conv(model.out, False) else "its last layers are not GroupNorm, SiLU and a convolution"


def _prepare_unet(model: Any) -> str | None:
    original = type(model)._original
    object.__setattr__(model, "_pydiff_waves", original.forward.__globals__["timestep_embedding"])

    def inputs(size: int) -> tuple[Any, ...]:
        first = next(model.input_blocks[0].parameters())
        x = torch.randn(2, first.shape[1], size, size, device=first.device)
        y = None if model.num_classes is None else torch.zeros(2, dtype=torch.int64, device=first.device)
        return x, torch.tensor([7.0, 500.0], device=first.device), y

    reason = probe.root_differs(model, inputs)
    if reason:
        return reason
    told = [m for m in model.modules() if _takes_embedding(m) and not isinstance(m, nn.Sequential)]
    if not all(isinstance(m, FusedGuidedResBlock) for m in told):
        return None  # a block that was left as it is needs the embedding itself
    blocks: list[Any] = list(told)
    widths = [2 * _width(b) if b.use_scale_shift_norm else _width(b) for b in blocks]
    total = assign("_pydiff_time", blocks, widths, (model.time_embed[2].out_features,))
    object.__setattr__(model, "_pydiff_time_blocks", (blocks, total))
    model.__class__ = fused_class(HoistableGuidedUNet, original)
    return None


def _width(block: Any) -> int:
    return block.out_layers[0].num_channels


RULES = (
    Rule(
        ("ResBlock",),
        FusedGuidedResBlock,
        "GroupNorm+SiLU, bias and embedding in the norm, one residual operation",
        _refuse_resblock,
    ),
    Rule(
        ("AttentionBlock",),
        FusedGuidedAttention,
        "tokens without a copy; the fastest attention backend",
        _refuse_attention,
    ),
    Rule(
        ("Upsample",),
        FusedGuidedUpsample,
        "upsampling folded into the convolution",
        _refuse_upsample,
        option="fold_upsampling",
    ),
    Rule(
        ("UNetModel",),
        FusedGuidedUNet,
        "skip connections read without concatenation; last norm with SiLU; embeddings can be hoisted",
        _refuse_unet,
        _prepare_unet,
    ),
)
