"""The convolutional blocks of diffusers' U-Nets and autoencoders, fused.

What changes in a ResNet block: GroupNorm and SiLU are one operation; the first convolution's bias and the time
embedding's projection enter the second norm, which reads the convolution's output anyway; the second convolution's
bias, the shortcut and the division by `output_scale_factor` are one pointwise operation. A 1x1 shortcut is a matrix
product over channels-last pixels. An up block hands a ResNet block its two inputs, so that their concatenation is never
made.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pydiff.ops.residual import residual_add
from pydiff.ops.upsample import upsample_conv2d
from pydiff.optimize.hoisting import own_columns
from pydiff.optimize.parts import (
    activation_name,
    cat,
    convolution,
    is_nhwc,
    is_plain_3x3,
    norm_act,
    pointwise,
    unhooked,
)
from pydiff.optimize.swap import Fused, Rule, ready


class FusedResnetBlock2D(Fused):
    """ResnetBlock2D: GroupNorm and SiLU in one operation, bias and time in the second, one residual operation."""

    def forward(
        self: Any,
        input_tensor: Tensor,
        temb: Tensor | None = None,
        *args: Any,
        skip: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """diffusers' ResnetBlock2D on [input_tensor; skip], temb [N, E] or every block's hoisted columns."""
        if args or kwargs or not ready(self, input_tensor):
            return super().forward(cat(input_tensor, skip), temb, *args, **kwargs)
        x = input_tensor
        h = norm_act(self.norm1, self.nonlinearity, x, x2=skip)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            x, skip, h = resample(cat(x, skip)), None, resample(h)
        columns = own_columns(vars(self).get("_pydiff_time"), temb)
        h, bias = convolution(self.conv1, h, split=None if columns is None else True)
        add, scale, shift = self._modulation(temb, bias) if columns is None else self._hoisted(columns, bias)
        h = norm_act(self.norm2, self.nonlinearity, h, add=add, scale=scale, shift=shift)
        h, bias = convolution(self.conv2, self.dropout(h))
        if self.conv_shortcut is not None:
            x = pointwise(self.conv_shortcut, x, skip)
        return residual_add(h, x, bias=bias, scale=1.0 / self.output_scale_factor)

    def _modulation(self: Any, temb: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """What enters the second norm: (added before it, scale, shift), the convolution's bias among it."""
        projected = None
        if self.time_emb_proj is not None and temb is not None:
            projected = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            if projected is None:
                raise ValueError("temb must be given where time_embedding_norm is 'scale_shift'")
            scale, shift = projected.chunk(2, dim=1)
            return bias, scale, shift
        if projected is None or bias is None:
            return (bias if projected is None else projected), None, None
        return projected + bias, None, None

    def _hoisted(self: Any, columns: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """The same, of the columns that `hoisted_columns` made."""
        if self.time_embedding_norm == "scale_shift":
            scale, shift = columns.chunk(2, dim=1)
            return bias, scale, shift
        own = getattr(self.conv1, "bias", None)
        if bias is None and own is not None:  # the convolution was called as a module, and added its bias itself
            columns = columns - own
        return columns, None, None

    def hoisted_columns(self: Any, activated: Tensor) -> Tensor:
        """The block's projection of the embedding [N, E], with the first convolution's bias where it is added to it."""
        projected, bias = self.time_emb_proj(activated), getattr(self.conv1, "bias", None)
        return projected if bias is None or self.time_embedding_norm == "scale_shift" else projected + bias


def _refuse_resnet(block: Any) -> str | None:
    if activation_name(block.nonlinearity) is None:
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    if not isinstance(block.norm1, nn.GroupNorm):
        return f"its norm is {type(block.norm1).__name__}, not GroupNorm"
    return None


class FusedUpBlock(Fused):
    """UpBlock2D, AttnUpBlock2D and CrossAttnUpBlock2D: the skip connection goes to the ResNet block as it is."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [B, C, H, W]; the skip connections in the order of the way down, the last one first used."""
        if args or not ready(self, hidden_states) or _freeu(self):
            return super().forward(hidden_states, res_hidden_states_tuple, temb, *args, **kwargs)
        size = kwargs.pop("upsample_size", None)
        attentions = getattr(self, "attentions", None) or [None] * len(self.resnets)
        for resnet, attention, skip in zip(self.resnets, attentions, reversed(res_hidden_states_tuple)):
            hidden_states = joined(resnet, hidden_states, skip, temb)
            if attention is not None:
                reads = getattr(self, "has_cross_attention", False)
                hidden_states = _attend(attention, hidden_states, kwargs if reads else None)
        for upsampler in self.upsamplers or ():
            if getattr(self, "upsample_type", "conv") == "resnet":
                hidden_states = upsampler(hidden_states, temb)
            else:
                hidden_states = upsampler(hidden_states, size)
        return hidden_states


def joined(resnet: nn.Module, x: Tensor, skip: Tensor, temb: Tensor | None) -> Tensor:
    """A ResNet block on the concatenation of its two inputs, which is made only where something wants it.

    In NCHW the 1x1 shortcut does, so that it is made once, for norm and shortcut alike.
    """
    if isinstance(resnet, FusedResnetBlock2D) and unhooked(resnet) and is_nhwc(x) and is_nhwc(skip):
        return resnet(x, temb, skip=skip)
    return resnet(cat(x, skip), temb)


def _attend(attention: nn.Module, hidden_states: Tensor, arguments: dict[str, Any] | None) -> Tensor:
    if arguments is None:
        return attention(hidden_states)
    return attention(hidden_states, return_dict=False, **arguments)[0]


def _freeu(block: Any) -> bool:
    return all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))


class FusedUpsample2D(Fused):
    """Nearest upsampling and its 3x3 convolution as one operation."""

    def forward(self: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [B, C, H, W] -> [B, out, 2H, 2W]."""
        conv = self.conv if self.name == "conv" else self.Conv2d_0
        doubled = output_size is None or tuple(output_size) == tuple(2 * n for n in hidden_states.shape[-2:])
        if args or kwargs or not doubled or not ready(self, hidden_states) or not is_plain_3x3(conv):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return upsample_conv2d(hidden_states, conv.weight, conv.bias)


def _refuse_upsample(module: Any) -> str | None:
    if module.use_conv_transpose or not module.use_conv or not module.interpolate or module.norm is not None:
        return "it is not nearest upsampling followed by a 3x3 convolution"
    return None


_MODELS = "diffusers.models"
RULES = (
    Rule(
        (f"{_MODELS}.resnet.ResnetBlock2D",),
        FusedResnetBlock2D,
        "GroupNorm+SiLU, bias and time embedding in the norm, one residual operation",
        _refuse_resnet,
    ),
    Rule(
        tuple(
            f"{_MODELS}.unets.unet_2d_blocks.{name}" for name in ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D")
        ),
        FusedUpBlock,
        "skip connections read without concatenation",
    ),
    Rule(
        (f"{_MODELS}.upsampling.Upsample2D",),
        FusedUpsample2D,
        "upsampling folded into the convolution",
        _refuse_upsample,
        option="fold_upsampling",
    ),
)
