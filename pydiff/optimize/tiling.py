"""An autoencoder's decoder in bands of rows, with the result of decoding at once.

Tiles that are decoded on their own differ from the whole image: each has its own norm statistics. Here all bands go
through the decoder in lockstep, layer by layer, every norm with the statistics of the whole image, every convolution
with the rows beside its band. Only whole inputs and outputs of layers are held, and what lies between exists a band at
a time. Levels no higher than a band, and all that is global (the middle block's attention), run as they are.

Memory, in units of the last level's activations (128 channels in Stable Diffusion's decoder, 256 MiB at 1024x1024 in
bfloat16): decoding at once holds six, a norm's input and its output before and after SiLU, of 256 channels. In bands it
holds three: a ResNet block's input and its first convolution, which the block's output then overwrites. With
`recompute` it holds one and a half: the last upsampling and the last level's first convolutions are not kept but
computed again for each pass over them, and the output of a ResNet block overwrites its input. The bands come on top:
counted at 1024x1024 with bands of 64 rows, 1.50, 0.83 and 0.49 GiB, for 10.47, 10.80 and 14.91 TFLOP.

A band is computed on a window that is wider by the reach of its convolutions. What they pad at the window's inner
edges is wrong by at most that reach, and cut off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydiff.optimize.parts import activation_name, is_plain, unhooked

REACH = 1
"""Rows beside its own that a 3x3 convolution reads."""


class Layer(NamedTuple):
    """What makes rows from rows: a window of its input [1, C, rows, W] becomes scale * rows of its output."""

    run: Callable[[Tensor], Tensor]
    """The layer itself."""
    reach: int
    """Rows beside its own that it reads, in rows of its output."""
    scale: int = 1
    """Rows of output for a row of input."""


class Rows(NamedTuple):
    """An image that is computed where it is asked for."""

    base: Tensor
    """[1, C, H, W], what there is."""
    layers: tuple[Layer, ...] = ()
    """What makes the image of it, in order."""

    @property
    def height(self) -> int:
        """Rows of the image."""
        height = self.base.shape[2]
        for layer in self.layers:
            height *= layer.scale
        return height

    def then(self, layer: Layer) -> Rows:
        """The image that a further layer makes of this one."""
        return Rows(self.base, (*self.layers, layer))

    def window(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the image, a view where there is nothing to compute."""
        first, last, height = start, stop, self.height
        for layer in reversed(self.layers):
            height //= layer.scale
            first = max((first - layer.reach) // layer.scale, 0)
            last = min(-(-(last + layer.reach) // layer.scale), height)
        x = self.base[:, :, first:last]
        for layer in self.layers:
            x = layer.run(x)
            first *= layer.scale
        return x[:, :, start - first : stop - first]


class Statistics:
    """Mean and variance of a GroupNorm's groups, over the bands that it is shown; float32, or float64 of float64."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm
        self.parts: list[tuple[int, Tensor, Tensor]] = []

    def see(self, band: Tensor) -> None:
        """Count in a band [1, C, rows, W] of the norm's input; each row once."""
        wide = band if band.dtype == torch.float64 else band.float()
        groups = wide.unflatten(1, (self.norm.num_groups, -1))
        variance, mean = torch.var_mean(groups, dim=(0, 2, 3, 4), correction=0)
        self.parts.append((groups[:, 0].numel(), mean, variance))

    def layer(self, activation: nn.Module, conv: nn.Module) -> Layer:
        """Norm with these statistics, activation, 3x3 convolution."""
        norm = self.norm
        mean, variance = self._merged()
        weight, bias = (p if p is None else p.to(mean.dtype) for p in (norm.weight, norm.bias))

        def run(x: Tensor) -> Tensor:
            # With statistics given, GroupNorm of one sample is BatchNorm, which has one kernel for all dtypes here.
            y = F.batch_norm(x, mean, variance, weight, bias, eps=norm.eps)
            return conv(F.silu(y, inplace=True) if activation_name(activation) == "silu" else activation(y))

        return Layer(run, REACH)

    def _merged(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the union of the bands, for each channel [C]."""
        counts = [part[0] for part in self.parts]
        means, variances = torch.stack([part[1] for part in self.parts]), torch.stack([part[2] for part in self.parts])
        shares = means.new_tensor([count / sum(counts) for count in counts])[:, None]
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        per_group = self.norm.num_channels // self.norm.num_groups
        return mean.repeat_interleave(per_group), variance.repeat_interleave(per_group)


def bands(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the bands of an image, the last of which may be lower."""
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


def measured(norm: nn.Module, image: Rows, rows: int) -> Statistics:
    """The statistics a norm needs of a whole image."""
    statistics = Statistics(norm)  # type: ignore[arg-type]
    for start, stop in bands(image.height, rows):
        statistics.see(image.window(start, stop))
    return statistics


def stored(
    compute: Callable[[int, int], Tensor], height: int, rows: int, into: Tensor | None = None, reach: int = 0
) -> Tensor:
    """The bands of compute(start, stop) as one image.

    into: where it goes; None is a new tensor in the first band's dtype and layout. It may be what `compute` reads, up
    to `reach` rows beside its band: a band is written when no other reads what it overwrites.
    """
    lag = -(-reach // rows) if into is not None else 0
    waiting: deque[tuple[int, Tensor]] = deque()
    for start, stop in bands(height, rows):
        waiting.append((start, compute(start, stop)))
        if into is None:
            into = _like(waiting[0][1], height)
        if len(waiting) > lag:
            _write(into, *waiting.popleft())
    assert into is not None
    for start, band in waiting:
        _write(into, start, band)
    return into


def _like(band: Tensor, height: int) -> Tensor:
    """An image for bands like this one, channels-last if it is."""
    nhwc = band.stride(1) == 1 and band.shape[1] > 1
    return torch.empty(
        (*band.shape[:2], height, band.shape[3]),
        dtype=band.dtype,
        device=band.device,
        memory_format=torch.channels_last if nhwc else torch.contiguous_format,
    )


def _write(into: Tensor, start: int, band: Tensor) -> None:
    into[:, :, start : start + band.shape[2]].copy_(band)


def resnet(block: Any, x: Rows, rows: int, recompute: bool) -> Tensor:
    """diffusers' ResnetBlock2D on x, in bands; it may overwrite what x is computed from."""
    height = x.height
    first = measured(block.norm1, x, rows).layer(block.nonlinearity, block.conv1)
    inner = x.then(first)
    statistics = Statistics(block.norm2)

    def first_half(start: int, stop: int) -> Tensor:
        h = inner.window(start, stop)
        statistics.see(h)
        return h

    if recompute:
        for start, stop in bands(height, rows):
            first_half(start, stop)
        second = statistics.layer(block.nonlinearity, block.conv2)
        whole = x.then(Layer(lambda w: _joined(block, second.run(first.run(w)), w), first.reach + second.reach))
        free = not x.layers and block.conv_shortcut is None
        return stored(whole.window, height, rows, x.base if free else None, first.reach + second.reach)
    h = Rows(stored(first_half, height, rows))
    second = statistics.layer(block.nonlinearity, block.conv2)
    outer = h.then(second)
    return stored(
        lambda start, stop: _joined(block, outer.window(start, stop), x.window(start, stop)),
        height,
        rows,
        h.base,
        second.reach,
    )


def _joined(block: Any, h: Tensor, x: Tensor) -> Tensor:
    h = block.dropout(h) + (x if block.conv_shortcut is None else block.conv_shortcut(x))
    return h if block.output_scale_factor == 1 else h / block.output_scale_factor


def decoded(decoder: Any, z: Tensor, out: Tensor, rows: int, recompute: bool) -> None:
    """diffusers' Decoder on one latent image z [1, C, h, w], in bands of `rows` rows, written into out [1, C, H, W].

    Close: what differs from the decoder's own result is rounding. Peak memory and cost: see the module.
    """
    x = Rows(decoder.mid_block(decoder.conv_in(z)))
    for k, block in enumerate(decoder.up_blocks):
        last = recompute and k == len(decoder.up_blocks) - 1
        for part in block.resnets:
            x = Rows(resnet(part, x, rows, last) if x.height > rows else part(x.base, None))
        for part in block.upsamplers or ():
            x = x.then(Layer(part, REACH, 2))
            if x.height <= rows:
                x = Rows(part(x.base))
            elif not (recompute and k == len(decoder.up_blocks) - 2):
                x = Rows(stored(x.window, x.height, rows))
    final = x.then(measured(decoder.conv_norm_out, x, rows).layer(decoder.conv_act, decoder.conv_out))
    stored(final.window, final.height, rows, out)


def refuse(decoder: Any) -> str | None:
    """Why a decoder cannot be run in bands, or None."""
    if type(decoder).__name__ != "Decoder" or not hasattr(decoder, "conv_norm_out"):
        return f"its decoder is {type(decoder).__name__}, not diffusers' Decoder"
    if not unhooked(decoder) or not is_plain(decoder.conv_norm_out, nn.GroupNorm):
        return "its decoder or last norm is hooked, or that norm is no GroupNorm"
    if not _is_3x3(decoder.conv_out):
        return "its last convolution is not 3x3"
    for name, block in decoder.up_blocks.named_children():
        if type(block).__name__ != "UpDecoderBlock2D" or not unhooked(block):
            return f"up_blocks.{name} is {type(block).__name__}, not UpDecoderBlock2D, or it is hooked"
        for inner, part in (*block.resnets.named_children(), *nn.ModuleList(block.upsamplers or ()).named_children()):
            reason = _refuse_part(part)
            if reason:
                return f"up_blocks.{name}, {type(part).__name__} {inner}: {reason}"
    return None


def _refuse_part(part: Any) -> str | None:
    if not unhooked(part):
        return "it is hooked"
    if type(part).__name__ == "Upsample2D":
        plain = part.use_conv and part.interpolate and not part.use_conv_transpose and part.norm is None
        conv = part.conv if part.name == "conv" else part.Conv2d_0
        return None if plain and _is_3x3(conv) else "it is not nearest upsampling followed by a 3x3 convolution"
    if type(part).__name__ != "ResnetBlock2D":
        return "it is no ResnetBlock2D"
    if not (is_plain(part.norm1, nn.GroupNorm) and is_plain(part.norm2, nn.GroupNorm)):
        return "its norms are no GroupNorms, or they are hooked"
    if part.time_emb_proj is not None or part.up or part.down:
        return "it takes a time embedding or resamples"
    return None if _is_3x3(part.conv1) and _is_3x3(part.conv2) else "its convolutions are not 3x3"


def _is_3x3(conv: Any) -> bool:
    """Whether a convolution (or what wraps one, as LoRA does) is 3x3 and surrounds the image with zeros."""
    conv = getattr(conv, "base_layer", conv)
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and "_conv_forward" not in vars(conv)
    )
