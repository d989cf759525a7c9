"""Stand-ins for EDM's U-Nets: their class and attribute names, their arithmetic, at any width."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.to(x.dtype).t()
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Conv2d(nn.Module):
    """A convolution (none if kernel is 0) after resampling by a separable filter."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        up: bool = False,
        down: bool = False,
        resample_filter: tuple[int, ...] = (1, 1),
        fused_resample: bool = False,
    ):
        super().__init__()
        self.up, self.down, self.fused_resample = up, down, fused_resample
        scale = 1 / math.sqrt(max(inputs * kernel * kernel, 1))
        self.weight = nn.Parameter(scale * torch.randn(outputs, inputs, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(outputs)) if kernel else None
        taps = torch.tensor(resample_filter, dtype=torch.float32)
        taps = (taps[:, None] * taps)[None, None] / taps.sum() ** 2
        self.register_buffer("resample_filter", taps if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        pad = 0 if weight is None else weight.shape[-1] // 2
        if self.down and self.fused_resample:
            x = F.conv2d(x, weight, padding=pad + self.reach)
            x = self.depthwise(F.conv2d, x, 1, 0)
        else:
            if self.up:
                x = self.depthwise(F.conv_transpose2d, x, 4, self.reach)
            if self.down:
                x = self.depthwise(F.conv2d, x, 1, self.reach)
            if weight is not None:
                x = F.conv2d(x, weight, padding=pad)
        return x if self.bias is None else x + self.bias.to(x.dtype).reshape(1, -1, 1, 1)

    @property
    def reach(self) -> int:
        return (self.resample_filter.shape[-1] - 1) // 2

    def depthwise(self, function: Any, x: Tensor, gain: float, padding: int) -> Tensor:
        taps = self.resample_filter.to(x.dtype).mul(gain).repeat(x.shape[1], 1, 1, 1)
        return function(x, taps, groups=x.shape[1], stride=2, padding=padding)


class GroupNorm(nn.Module):
    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.num_groups, self.eps = min(32, channels // 4), eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class UNetBlock(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        emb: int,
        up: bool = False,
        down: bool = False,
        heads: int = 0,
        skip_scale: float = 1.0,
        adaptive_scale: bool = True,
        resample_filter: tuple[int, ...] = (1, 1),
        resample_proj: bool = False,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.num_heads, self.dropout = inputs, outputs, heads, 0.1
        self.skip_scale, self.adaptive_scale = skip_scale, adaptive_scale
        resampling: dict[str, Any] = dict(up=up, down=down, resample_filter=resample_filter)
        self.norm0 = GroupNorm(inputs)
        self.conv0 = Conv2d(inputs, outputs, 3, **resampling)
        self.affine = Linear(emb, outputs * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(outputs)
        self.conv1 = Conv2d(outputs, outputs, 3)
        self.skip = None
        if outputs != inputs or up or down:
            self.skip = Conv2d(inputs, outputs, int(resample_proj or outputs != inputs), **resampling)
        if heads:
            self.norm2 = GroupNorm(outputs)
            self.qkv = Conv2d(outputs, 3 * outputs, 1)
            self.proj = Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        told = self.affine(emb).to(h.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm1(h) * (scale + 1) + shift
        else:
            h = self.norm1(h + told)
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            q, k, v = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (self.num_heads, -1, 3)).unbind(3)
            scores = torch.einsum("nhcq,nhck->nhqk", q.float(), k.float() / math.sqrt(q.shape[2])).softmax(-1)
            h = torch.einsum("nhqk,nhck->nhcq", scores.to(q.dtype), v).reshape(x.shape)
            x = (self.proj(h) + x) * self.skip_scale
        return x


class Frequencies(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", torch.logspace(0, -3, channels // 2))

    def forward(self, x: Tensor) -> Tensor:
        angles = x[:, None] * self.freqs.to(x.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def run(block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
    return block(x, emb) if isinstance(block, UNetBlock) else block(x)


class _Net(nn.Module):
    """Two levels, one block each, with attention on the lower one."""

    def __init__(self, width: int, label_dim: int, augment_dim: int, label_width: int, **block: Any):
        super().__init__()
        emb, wide = 2 * width, 2 * width
        self.map_noise = Frequencies(width)
        self.map_label = Linear(label_dim, label_width) if label_dim else None
        self.map_augment = Linear(augment_dim, width, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = Linear(width, emb), Linear(emb, emb)
        self.enc = nn.ModuleDict(
            {
                "8x8_conv": Conv2d(3, width, 3),
                "8x8_block0": UNetBlock(width, width, emb, **block),
                "4x4_down": UNetBlock(width, width, emb, down=True, **block),
                "4x4_block0": UNetBlock(width, wide, emb, heads=2, **block),
            }
        )
        self.dec = nn.ModuleDict(
            {
                "4x4_in0": UNetBlock(wide, wide, emb, heads=2, **block),
                "4x4_in1": UNetBlock(wide, wide, emb, **block),
                "4x4_block0": UNetBlock(2 * wide, wide, emb, **block),
                "4x4_block1": UNetBlock(wide + width, wide, emb, heads=2, **block),
                "8x8_up": UNetBlock(wide, wide, emb, up=True, **block),
                "8x8_block0": UNetBlock(wide + width, width, emb, **block),
                "8x8_block1": UNetBlock(2 * width, width, emb, **block),
            }
        )


class DhariwalUNet(_Net):
    def __init__(self, width: int = 16, label_dim: int = 0, augment_dim: int = 0):
        super().__init__(width, label_dim, augment_dim, 2 * width)
        self.out_norm, self.out_conv = GroupNorm(width), Conv2d(width, 3, 3)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        emb = F.silu(emb if self.map_label is None else emb + self.map_label(class_labels))
        skips = []
        for block in self.enc.values():
            skips.append(x := run(block, x, emb))
        for block in self.dec.values():
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


class SongUNet(_Net):
    """encoder: "standard", "skip" or "residual"; decoder: "standard" or "skip"."""

    def __init__(
        self,
        width: int = 16,
        label_dim: int = 0,
        augment_dim: int = 0,
        encoder: str = "standard",
        decoder: str = "standard",
        resample_filter: tuple[int, ...] = (1, 1),
    ):
        super().__init__(
            width,
            label_dim,
            augment_dim,
            width,
            skip_scale=math.sqrt(0.5),
            adaptive_scale=False,
            resample_filter=resample_filter,
            resample_proj=True,
        )
        items = []
        for name, block in self.enc.items():
            items.append((name, block))
            if name == "4x4_down" and encoder == "skip":
                items += [
                    ("4x4_aux_down", Conv2d(3, 3, 0, down=True, resample_filter=resample_filter)),
                    ("4x4_aux_skip", Conv2d(3, width, 1)),
                ]
            if name == "4x4_down" and encoder == "residual":
                items.append(
                    (
                        "4x4_aux_residual",
                        Conv2d(3, width, 3, down=True, resample_filter=resample_filter, fused_resample=True),
                    )
                )
        self.enc = nn.ModuleDict(items)
        items = []
        for name, block in self.dec.items():
            items.append((name, block))
            if name == "4x4_block1" and decoder == "skip":
                items += [("4x4_aux_norm", GroupNorm(2 * width)), ("4x4_aux_conv", Conv2d(2 * width, 3, 3))]
            if name == "8x8_block1" and decoder == "skip":
                items.append(("8x8_aux_up", Conv2d(3, 3, 0, up=True, resample_filter=resample_filter)))
        self.dec = nn.ModuleDict([*items, ("8x8_aux_norm", GroupNorm(width)), ("8x8_aux_conv", Conv2d(width, 3, 3))])

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        emb = self.map_noise(noise_labels)
        emb = torch.cat(emb.chunk(2, dim=1)[::-1], dim=1)
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(class_labels.shape[1]))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        skips: list[Tensor] = []
        aux: Any = x
        for name, block in self.enc.items():
            if "aux_down" in name:
                aux = block(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + block(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + block(aux)) / math.sqrt(2)
            else:
                skips.append(x := run(block, x, emb))
        aux = normed = None
        for name, block in self.dec.items():
            if "aux_up" in name:
                aux = block(aux)
            elif "aux_norm" in name:
                normed = F.silu(block(x))
            elif "aux_conv" in name:
                aux = block(normed) if aux is None else block(normed) + aux
            else:
                x = block(x if x.shape[1] == block.in_channels else torch.cat([x, skips.pop()], dim=1), emb)
        return aux


class Precond(nn.Module):
    """A preconditioner: the network in half precision, everything around it in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        c_in = (sigma**2 + 1).rsqrt()[:, None, None, None]
        out = self.model((c_in * x).to(self.dtype), sigma.log() / 4, class_labels=class_labels)
        assert out.dtype == self.dtype
        return x + out.float()
