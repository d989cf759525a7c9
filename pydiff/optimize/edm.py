"""The U-Nets of EDM (SongUNet: DDPM++ and NCSN++; DhariwalUNet: ADM), fused.

What changes in a block: GroupNorm and SiLU are one operation, in which the first convolution's bias and the
embedding's projection enter the second norm; the last bias, the shortcut and `skip_scale` are one pointwise operation;
resampling by a box filter is nearest upsampling or average pooling; attention's 1x1 convolutions are matrix products
over pixels. The up path hands a block its two inputs, so that their concatenation is never made.

The classes come out of pickles, in modules without a lasting name, so that they are met by their bare names, and each
block is compared with its fused form before it is replaced (`pydiff.optimize.probe`). Weights are converted to the
dtype of the image in every call, as the originals do. A preconditioner around a network stays what it is.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydiff.ops.attention import attention
from pydiff.ops.group_norm import group_norm
from pydiff.ops.residual import residual_add
from pydiff.optimize import probe
from pydiff.optimize.hoisting import Hoistable, assign, gathered, own_columns
from pydiff.optimize.parts import cat, is_nhwc, plain_weight, product_of_pixels, unhooked
from pydiff.optimize.swap import Fused, Rule, fused_class, ready


class _Persistent(Fused):
    """A fused module whose own class may be one that pickles itself by its source text."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not hasattr(self._original, "_orig_module_src"):
            return super().__reduce_ex__(protocol)
        # Such a class has no name that pickle could find, and its way of pickling is for itself: it comes back unfused.
        plain = self._original.__new__(self._original)
        plain.__dict__.update({k: v for k, v in vars(self).items() if not k.startswith("_pydiff_")})
        return plain.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(vars(self), memo))
        return twin


def norm_act(norm: Any, x: Tensor, activate: bool, **extra: Tensor | None) -> Any:
    """EDM's GroupNorm as `pydiff.ops.group_norm`, then SiLU where asked for."""
    if unhooked(norm) and plain_weight(norm.weight):
        return group_norm(
            x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation="silu" if activate else None, **extra
        )
    x = cat(x, extra.get("x2"))
    add, scale, shift = extra.get("add"), extra.get("scale"), extra.get("shift")
    if add is not None:
        x = x + _per_channel(add, x)
    x = norm(x)
    if scale is not None and shift is not None:
        x = torch.addcmul(_per_channel(shift, x), x, _per_channel(scale, x) + 1)
    return F.silu(x) if activate else x


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(*values.shape, 1, 1).to(like.dtype)


def linear(layer: Any, x: Tensor) -> Tensor:
    """EDM's Linear with its bias in the product."""
    if not unhooked(layer) or not plain_weight(layer.weight):
        return layer(x)
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def convolution(conv: Any, x: Tensor, box: bool = False) -> tuple[Tensor, Tensor | None]:
    """EDM's Conv2d on x, and its bias, which is still to be added; box: whether it resamples by a box filter."""
    if not unhooked(conv) or not plain_weight(conv.weight) or (not box and (conv.up or conv.down)):
        return conv(x), None
    if conv.down:
        x = F.avg_pool2d(x, 2)
    if conv.weight is None:
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if conv.up else x, None
    weight = conv.weight.to(x.dtype)
    if weight.shape[-1] == 1:
        y = pointwise(x, None, weight)
        return F.interpolate(y, scale_factor=2.0, mode="nearest") if conv.up else y, conv.bias
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if conv.up else x
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2), conv.bias


def pointwise(x: Tensor, x2: Tensor | None, weight: Tensor) -> Tensor:
    """A 1x1 convolution of [x; x2], as matrix products over pixels where they are channels-last."""
    if not is_nhwc(x):
        return F.conv2d(cat(x, x2), weight)
    return product_of_pixels(x, x2, weight.flatten(1))


class FusedEDMBlock(_Persistent):
    """UNetBlock: see the module."""

    def forward(self: Any, x: Tensor, emb: Tensor, *args: Any, skip: Tensor | None = None) -> Tensor:
        """UNetBlock on [x; skip]; emb [N, E], or every block's hoisted columns."""
        params = own_columns(vars(self).get("_pydiff_time"), emb)
        if args or (params is None and not ready(self, x)):
            return super().forward(cat(x, skip), emb, *args)
        boxes = vars(self).get("_pydiff_boxes", (False, False))
        h, bias = convolution(self.conv0, norm_act(self.norm0, x, True, x2=skip), boxes[0])
        params = (linear(self.affine, emb) if params is None else params).to(h.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = norm_act(self.norm1, h, True, add=bias, scale=scale, shift=shift)
        else:
            h = norm_act(self.norm1, h, True, add=params if bias is None else params + bias)
        h, bias = convolution(self.conv1, F.dropout(h, p=self.dropout, training=self.training))
        shortcut, more = self._shortcut(x, skip, boxes[1])
        bias = more if bias is None else bias if more is None else bias + more
        x = residual_add(h, shortcut, bias=bias, scale=float(self.skip_scale))
        return self._attend(x) if self.num_heads else x

    def _shortcut(self: Any, x: Tensor, skip: Tensor | None, box: bool) -> tuple[Tensor, Tensor | None]:
        conv = self.skip
        if conv is None:
            return cat(x, skip), None
        plain = unhooked(conv) and plain_weight(conv.weight) and conv.weight is not None and not (conv.up or conv.down)
        if plain and conv.weight.shape[-1] == 1:
            return pointwise(x, skip, conv.weight.to(x.dtype)), conv.bias
        return convolution(conv, cat(x, skip), box)

    def _attend(self: Any, x: Tensor) -> Tensor:
        h = norm_act(self.norm2, x, False)
        if unhooked(self.qkv) and plain_weight(self.qkv.weight):
            # The channels are (head, width, which of three); as (which, head, width) each is a matrix of its own.
            weight = _regrouped(self.qkv.weight, self.num_heads, h.dtype)
            bias = None if self.qkv.bias is None else _regrouped(self.qkv.bias, self.num_heads, h.dtype)
            qkv = F.linear(h.flatten(2).transpose(1, 2), weight, bias).unflatten(2, (3, self.num_heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = self.qkv(h).flatten(2).unflatten(1, (self.num_heads, -1, 3)).permute(3, 0, 1, 4, 2).unbind(0)
        h = attention(q, k, v).transpose(1, 2).flatten(2)
        if unhooked(self.proj) and plain_weight(self.proj.weight):
            bias = None if self.proj.bias is None else self.proj.bias.to(h.dtype)
            h = F.linear(h, self.proj.weight.flatten(1).to(h.dtype), bias)
            h = h.transpose(1, 2).unflatten(2, x.shape[2:])
            h = h.contiguous() if x.is_contiguous() else h
        else:
            h = self.proj(h.transpose(1, 2).unflatten(2, x.shape[2:]).contiguous())
        return residual_add(h, x, scale=float(self.skip_scale))


def _regrouped(parameter: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Rows (head, width, 3) of a projection as (3, head, width), in `dtype`: one copy."""
    rows = parameter.flatten(1) if parameter.ndim > 1 else parameter
    rows = rows.unflatten(0, (heads, -1, 3)).movedim(2, 0)
    return rows.to(dtype, memory_format=torch.contiguous_format).flatten(0, 2)


def _is_convolution(conv: Any) -> bool:
    return all(hasattr(conv, name) for name in ("weight", "bias", "up", "down", "resample_filter"))


def _is_norm(norm: Any) -> bool:
    return all(hasattr(norm, name) for name in ("weight", "bias", "num_groups", "eps"))


def _refuse_block(block: Any) -> str | None:
    needed = (
        "norm0",
        "conv0",
        "affine",
        "norm1",
        "conv1",
        "skip",
        "skip_scale",
        "adaptive_scale",
        "num_heads",
        "dropout",
    )
    if any(not hasattr(block, name) for name in needed):
        return "it is not EDM's UNetBlock"
    norms = [block.norm0, block.norm1] + ([block.norm2] if block.num_heads else [])
    convolutions = [block.conv0, block.conv1] + [block.skip] * (block.skip is not None)
    convolutions += [block.qkv, block.proj] if block.num_heads else []
    if not all(map(_is_norm, norms)) or not all(map(_is_convolution, convolutions)):
        return "its layers are not EDM's GroupNorm and Conv2d"
    if any(b.is_meta for b in block.buffers()):
        return "its buffers are on the meta device: load them first"
    channels, width = block.norm0.weight.shape[0], block.affine.weight.shape[1]
    variant = (
        block.adaptive_scale,
        min(block.num_heads, 2),
        float(block.skip_scale),
        tuple((c.up, c.down, c.weight is None, c.bias is None, _is_box(c)) for c in convolutions),
    )
    return probe.differs(
        block,
        FusedEDMBlock,
        lambda g: (torch.randn(2, channels, 4, 4, generator=g), torch.randn(2, width, generator=g)),
        variant,
        _prepare_block,
    )


def _is_box(conv: Any) -> bool:
    """Whether a convolution resamples by [1, 1]: repeats pixels, or averages four."""
    f = conv.resample_filter
    fused = getattr(conv, "fused_resample", False)
    return f is not None and tuple(f.shape[-2:]) == (2, 2) and not fused and bool((f == 0.25).all())


def _prepare_block(block: Any) -> None:
    boxes = tuple(conv is not None and _is_box(conv) for conv in (block.conv0, block.skip))
    object.__setattr__(block, "_pydiff_boxes", boxes)


class _FusedEDMNet(_Persistent):
    def forward(
        self: Any,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        if not ready(self, x):
            return super().forward(x, noise_labels, class_labels, augment_labels)
        return self._trunk(x, self._embed(noise_labels, class_labels, augment_labels))

    def _augmented(self: Any, emb: Tensor, augment_labels: Tensor | None) -> Tensor:
        if self.map_augment is None or augment_labels is None:
            return emb
        return emb + linear(self.map_augment, augment_labels)


class FusedDhariwalUNet(_FusedEDMNet):
    """DhariwalUNet (ADM): skip connections read without concatenation, the last norm with SiLU."""

    def _embed(self: Any, noise_labels: Tensor, class_labels: Any, augment_labels: Tensor | None) -> Tensor:
        emb = self._augmented(self.map_noise(noise_labels), augment_labels)
        emb = linear(self.map_layer1, F.silu(linear(self.map_layer0, emb)))
        return F.silu(emb if self.map_label is None else emb + linear(self.map_label, class_labels))

    def _trunk(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if hasattr(block, "affine") else block(x)
            skips.append(x)
        for block in self.dec.values():
            x = joined(block, x, skips, emb)
        return self.out_conv(norm_act(self.out_norm, x, True))


class FusedSongUNet(_FusedEDMNet):
    """SongUNet (DDPM++, NCSN++): skip connections read without concatenation, the last norms with SiLU."""

    def _embed(self: Any, noise_labels: Tensor, class_labels: Any, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(noise_labels)
        emb = emb.roll(emb.shape[1] // 2, 1)  # sines first
        if self.map_label is not None:
            emb = emb + linear(self.map_label, class_labels * math.sqrt(self.map_label.weight.shape[1]))
        emb = self._augmented(emb, augment_labels)
        return F.silu(linear(self.map_layer1, F.silu(linear(self.map_layer0, emb))))

    def _trunk(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        skips: list[Tensor] = []
        aux = x
        for name, block in self.enc.items():
            if "aux_down" in name:
                aux = block(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + block(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = residual_add(block(aux), x, scale=0.5**0.5)
            else:
                x = block(x, emb) if hasattr(block, "affine") else block(x)
                skips.append(x)
        return self._decode(x, skips, emb)

    def _decode(self: Any, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        out = activated = None
        for name, block in self.dec.items():
            if "aux_up" in name:
                out = block(out)
            elif "aux_norm" in name:
                activated = norm_act(block, x, True)
            elif "aux_conv" in name:
                out = block(activated) if out is None else out + block(activated)
            else:
                x = joined(block, x, skips, emb)
        assert out is not None
        return out


def joined(block: Any, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
    """A decoder block on x, or on x and the last skip connection where it wants more channels than x has."""
    if x.shape[1] == block.in_channels:
        return block(x, emb)
    if isinstance(block, FusedEDMBlock) and unhooked(block) and is_nhwc(x) and is_nhwc(skips[-1]):
        return block(x, emb, skip=skips.pop())
    return block(cat(x, skips.pop()), emb)


class _Hoisting(Hoistable):
    hoisted_arguments = ("class_labels", "augment_labels")

    def hoist_times(self: Any, times: Tensor, cond: Mapping[str, Any]) -> Tensor:
        blocks, total = self._pydiff_time_blocks
        emb = self._embed(times, cond.get("class_labels"), cond.get("augment_labels"))
        return gathered([linear(b.affine, emb) for b in blocks], total)

    def hoisted_forward(self: Any, x: Tensor, embedding: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return self._trunk(x, embedding.to(x.dtype))


class HoistableDhariwalUNet(FusedDhariwalUNet, _Hoisting):
    """DhariwalUNet whose blocks' projections of time and label can be computed before the loop."""


class HoistableSongUNet(FusedSongUNet, _Hoisting):
    """SongUNet whose blocks' projections of time and label can be computed before the loop."""


def _refuse_net(model: Any) -> str | None:
    needed = {"map_noise", "map_layer0", "map_layer1", "enc", "dec", "map_label", "map_augment"}
    if any(not hasattr(model, name) for name in needed):
        return f"it is not EDM's {type(model).__name__}"
    known = needed | ({"out_norm", "out_conv"} if type(model).__name__ == "DhariwalUNet" else set())
    more = {name for name, _ in model.named_children()} - known
    if more or list(model.parameters(recurse=False)):
        return f"it has more than EDM's {type(model).__name__}: {', '.join(sorted(more)) or 'parameters of its own'}"
    names = list(inspect.signature(type(model).forward).parameters)
    if names != ["self", "x", "noise_labels", "class_labels", "augment_labels"]:
        return "its forward takes other arguments than (x, noise_labels, class_labels, augment_labels)"
    return None


def _prepare_net(model: Any) -> str | None:
    def inputs(size: int) -> tuple[Any, ...]:
        first = next(p for block in model.enc.values() for p in block.parameters() if p.ndim == 4)
        x = torch.randn(2, first.shape[1], size, size, dtype=first.dtype, device=first.device)
        labels, augment = (
            None if layer is None else x.new_ones(2, layer.weight.shape[1])
            for layer in (model.map_label, model.map_augment)
        )
        return x, x.new_tensor([-1.0, 1.0]), labels, augment

    reason = probe.root_differs(model, inputs)
    if reason:
        return reason
    blocks: list[Any] = [b for part in (model.enc, model.dec) for b in part.values() if hasattr(b, "affine")]
    if not all(isinstance(b, FusedEDMBlock) for b in blocks):
        return None  # a block that was left as it is needs the embedding itself
    narrow = model.map_layer1.weight.shape[0]
    total = assign("_pydiff_time", blocks, [b.affine.weight.shape[0] for b in blocks], (narrow,))
    object.__setattr__(model, "_pydiff_time_blocks", (blocks, total))
    mixin = HoistableSongUNet if isinstance(model, FusedSongUNet) else HoistableDhariwalUNet
    model.__class__ = fused_class(mixin, type(model)._original)
    return None


_NET = "skip connections read without concatenation; last norm with SiLU; embeddings can be hoisted"
RULES = (
    Rule(
        ("UNetBlock",),
        FusedEDMBlock,
        "GroupNorm+SiLU, bias and embedding in the norm, attention by matrix products, one residual operation",
        _refuse_block,
        _prepare_block,
    ),
    Rule(("SongUNet",), FusedSongUNet, _NET, _refuse_net, _prepare_net),
    Rule(("DhariwalUNet",), FusedDhariwalUNet, _NET, _refuse_net, _prepare_net),
)
