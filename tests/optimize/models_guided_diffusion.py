"""A stand-in for guided-diffusion's U-Net: its class and attribute names, its arithmetic, at any width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(times: Tensor, dim: int) -> Tensor:
    angles = times.float()[:, None] * torch.logspace(0, -4, dim // 2 + 1, device=times.device)[:-1]
    return torch.cat([angles.cos(), angles.sin()], 1)


class GroupNorm32(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class TimestepBlock(nn.Module):
    pass


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.channels, self.use_conv, self.dims = channels, use_conv, 2
        if use_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(TimestepBlock):
    def __init__(
        self,
        channels: int,
        emb: int,
        out: int,
        *,
        scale_shift: bool,
        groups: int = 8,
        use_conv: bool = False,
        resample: type[nn.Module] | None = None,
    ):
        super().__init__()
        self.use_scale_shift_norm, self.updown = scale_shift, resample is not None
        self.in_layers = nn.Sequential(GroupNorm32(groups, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.h_upd = nn.Identity() if resample is None else resample(channels, False)
        self.x_upd = nn.Identity() if resample is None else resample(channels, False)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, (1 + scale_shift) * out))
        self.out_layers = nn.Sequential(
            GroupNorm32(groups, out), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1)
        )
        size = 3 if use_conv else 1
        self.skip_connection: nn.Module = nn.Identity()
        if out != channels:
            self.skip_connection = nn.Conv2d(channels, out, size, padding=size // 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            h = self.in_layers[2](self.h_upd(self.in_layers[1](self.in_layers[0](x))))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        modulation = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            for layer in list(self.out_layers)[1:]:
                h = layer(h)
        else:
            h = self.out_layers(h + modulation)
        return self.skip_connection(x) + h


class _QKV(nn.Module):
    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        batch, width, length = qkv.shape
        q, k, v = self.split(qkv)
        scale = (width // (3 * self.n_heads)) ** -0.25
        weight = torch.einsum("bhct,bhcs->bhts", q * scale, k * scale).float().softmax(-1).to(qkv.dtype)
        return torch.einsum("bhts,bhcs->bhct", weight, v).reshape(batch, -1, length)

    def split(self, qkv: Tensor) -> Any:
        raise NotImplementedError


class QKVAttention(_QKV):
    def split(self, qkv: Tensor) -> Any:
        return qkv.unflatten(1, (3, self.n_heads, -1)).unbind(1)


class QKVAttentionLegacy(_QKV):
    def split(self, qkv: Tensor) -> Any:
        return qkv.unflatten(1, (self.n_heads, 3, -1)).unbind(2)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, heads: int, new_order: bool, groups: int = 8):
        super().__init__()
        self.norm = GroupNorm32(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = (QKVAttention if new_order else QKVAttentionLegacy)(heads)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        return (tokens + self.proj_out(self.attention(self.qkv(self.norm(tokens))))).reshape(x.shape)


class UNetModel(nn.Module):
    """Two levels, one block each; attention on the lower one."""

    def __init__(
        self,
        width: int = 16,
        num_classes: int | None = None,
        scale_shift: bool = True,
        new_order: bool = False,
        resblock_updown: bool = True,
        use_conv: bool = False,
    ):
        super().__init__()
        emb, wide = 4 * width, 2 * width
        self.model_channels, self.num_classes, self.dtype = width, num_classes, torch.float32
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)

        def res(a: int, b: int, resample: Any = None) -> ResBlock:
            return ResBlock(a, emb, b, scale_shift=scale_shift, resample=resample, use_conv=use_conv)

        def attend() -> AttentionBlock:
            return AttentionBlock(wide, 2, new_order)

        down = res(width, width, Downsample) if resblock_updown else Downsample(width, True)
        up = res(wide, wide, Upsample) if resblock_updown else Upsample(wide, True)
        sequences = [[nn.Conv2d(3, width, 3, padding=1)], [res(width, width)], [down], [res(width, wide), attend()]]
        self.input_blocks = nn.ModuleList(TimestepEmbedSequential(*s) for s in sequences)
        self.middle_block = TimestepEmbedSequential(res(wide, wide), attend(), res(wide, wide))
        sequences = [
            [res(2 * wide, wide), attend()],
            [res(wide + width, wide), attend(), up],
            [res(wide + width, width)],
            [res(2 * width, width)],
        ]
        self.output_blocks = nn.ModuleList(TimestepEmbedSequential(*s) for s in sequences)
        self.out = nn.Sequential(GroupNorm32(8, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.time_embed[0].weight.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x.to(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.to(x.dtype))

    def convert_torso(self, dtype: torch.dtype) -> UNetModel:
        """Convolutions of the torso in `dtype`, everything else in float32: what convert_to_fp16 does."""
        self.dtype = dtype
        for part in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in part.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.to(dtype)
        return self
