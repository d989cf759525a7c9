"""A small class-conditional U-Net for 28x28 grey images: the model that ships with the package.

It follows the convention every part of pydiff expects of a model, ``model(x, t, labels=None)``, with continuous time in
[0, 1] and the classifier-free guidance label as one more class. The architecture is the usual one: residual blocks with
GroupNorm and SiLU, a sinusoidal time embedding to which the class embedding is added, self-attention where the image is
small. Every block receives the embedding as a per-channel scale and shift.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NULL_LABEL = 10
NUM_CLASSES = 10


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of continuous time: t [B] in [0, 1] -> [B, dim] float32, ``dim`` even.

    Time is stretched by 1000, so that the frequencies mean what they mean for the usual thousand discrete steps. The
    arithmetic is float32 whatever the model's dtype: bfloat16 cannot tell neighbouring times apart.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(index * (-math.log(max_period) / half))
    angles = 1000.0 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """Two convolutions behind GroupNorm and SiLU, added to x; the identity (or its projection) at initialisation."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        _set_to_zero(self.conv2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, in, H, W], embedding [B, emb] -> [B, out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.embedding(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class SelfAttention(nn.Module):
    """Attention over all positions, added to its input."""

    def __init__(self, channels: int, head_dim: int, groups: int):
        super().__init__()
        self.heads = channels // head_dim
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        _set_to_zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        channels, height, width = x.shape[1:]
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, channels // self.heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # three of [B, heads, HW, head_dim]
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.out(h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).unflatten(2, (height, width))


class Block(nn.ModuleList):
    """A residual block and, on the levels that have it, attention."""

    def __init__(self, residual: ResBlock, attention: SelfAttention | None):
        super().__init__([residual] if attention is None else [residual, attention])

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, in, H, W], embedding [B, emb] -> [B, out, H, W]."""
        h = self[0](x, embedding)
        return self[1](h) if len(self) > 1 else h


class Upsample(nn.Module):
    """Twice the height and width by repetition, then a convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """The class-conditional U-Net.

    Args:
        channels: width of each level, from full resolution down; every level halves height and width.
        blocks: residual blocks of each level, the same number on the way down and up.
        attention: for each level, whether its residual blocks are followed by self-attention.
        embedding_dim: width of the time and class embedding.
        head_dim: width of an attention head; divides the width of every level with attention.
        groups: groups of every GroupNorm; divides every width.

    The class attributes say what the network was trained for, in the words the rest of the package reads.

    Raises: ValueError naming the argument that does not fit the others.
    """

    schedule_config = {"schedule": "VPCosine", "s": 0.008}
    prediction = "v_prediction"
    sample_shape = (1, 28, 28)
    num_classes = NUM_CLASSES
    null_label = NULL_LABEL

    def __init__(
        self,
        channels: tuple[int, ...] = (32, 64, 128),
        blocks: tuple[int, ...] = (1, 1, 1),
        attention: tuple[bool, ...] = (False, False, True),
        embedding_dim: int = 128,
        head_dim: int = 32,
        groups: int = 8,
    ):
        super().__init__()
        channels, blocks, attention = tuple(channels), tuple(blocks), tuple(attention)
        _check_config(channels, blocks, attention, embedding_dim, head_dim, groups, self.sample_shape)
        self.config = {
            "channels": list(channels), "blocks": list(blocks), "attention": list(attention),
            "embedding_dim": embedding_dim, "head_dim": head_dim, "groups": groups,
        }  # fmt: skip
        self.embedding_dim = embedding_dim
        self.time_embedding = nn.Sequential(
            nn.Linear(embedding_dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.class_embedding = nn.Embedding(self.num_classes + 1, embedding_dim)

        def block(level: int, in_channels: int) -> Block:
            width = channels[level]
            attend = SelfAttention(width, head_dim, groups) if attention[level] else None
            return Block(ResBlock(in_channels, width, embedding_dim, groups), attend)

        levels = range(len(channels))
        self.conv_in = nn.Conv2d(self.sample_shape[0], channels[0], 3, padding=1)
        self.down = nn.ModuleList(nn.ModuleList(block(i, channels[i]) for _ in range(blocks[i])) for i in levels)
        self.downsample = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 3, stride=2, padding=1) for i in levels[:-1]
        )
        self.middle = nn.ModuleList([block(levels[-1], channels[-1]), block(levels[-1], channels[-1])])
        self.up = nn.ModuleList(nn.ModuleList(block(i, 2 * channels[i]) for _ in range(blocks[i])) for i in levels)
        self.upsample = nn.ModuleList(Upsample(channels[i + 1], channels[i]) for i in levels[:-1])
        self.norm_out = nn.GroupNorm(groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], self.sample_shape[0], 3, padding=1)
        _set_to_zero(self.conv_out)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x [B, 1, 28, 28], t [B] or 0-d in [0, 1], labels int64 [B] in 0..10 -> the v prediction [B, 1, 28, 28].

        Label 10 is the null label, unconditional; ``labels=None`` gives it to every row. The output has the dtype the
        parameters have. Labels and times are not checked: a check would wait for the device.
        """
        return self.trunk(x, self.embed(t, labels, x.shape[0]))

    def trunk(self, x: Tensor, embedding: Tensor) -> Tensor:
        """From the image, and the embedding that every block is told, to the prediction."""
        h = self.conv_in(x.to(self.conv_in.weight.dtype))
        skips: list[Tensor] = []
        for i, level in enumerate(self.down):
            for block in level.children():
                h = block(h, embedding)
                skips.append(h)
            if i < len(self.downsample):
                h = self.downsample[i](h)
        for block in self.middle:
            h = block(h, embedding)
        for i in reversed(range(len(self.up))):
            for block in self.up[i].children():
                h = self.joined(block, h, skips.pop(), embedding)
            if i > 0:
                h = self.upsample[i - 1](h)
        return self.conv_out(self.activated(h))

    def joined(self, block: nn.Module, h: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
        """A block on the way up, on [h; skip]."""
        return block(torch.cat([h, skip], dim=1), embedding)

    def activated(self, h: Tensor) -> Tensor:
        """What the last convolution reads."""
        return F.silu(self.norm_out(h))

    def embed(self, t: Tensor, labels: Tensor | None, batch: int) -> Tensor:
        """What every block is told: time and class in one vector, [batch, embedding_dim]. It does not depend on x."""
        if labels is None:
            labels = torch.full((batch,), self.null_label, dtype=torch.int64, device=t.device)
        waves = timestep_embedding(t.expand(batch), self.embedding_dim)
        time = self.time_embedding(waves.to(self.class_embedding.weight.dtype))
        return F.silu(time + self.class_embedding(labels))


def _set_to_zero(layer: nn.Module) -> None:
    """The last layer of a residual branch starts at zero, so that the branch starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _check_config(channels, blocks, attention, embedding_dim, head_dim, groups, sample_shape) -> None:
    """Raise ValueError naming the argument that does not fit."""
    if not channels or not len(channels) == len(blocks) == len(attention):
        raise ValueError(
            f"channels, blocks and attention need one entry a level and at least one level; "
            f"got {len(channels)}, {len(blocks)} and {len(attention)} entries"
        )
    factor = 2 ** (len(channels) - 1)
    if any(size % factor for size in sample_shape[1:]):
        raise ValueError(f"channels: {len(channels)} levels need sizes divisible by {factor}, not {sample_shape[1:]}")
    if any(c < 1 or c % groups for c in channels):
        raise ValueError(f"channels must be positive multiples of groups={groups}; got {channels}")
    if any(n < 1 for n in blocks):
        raise ValueError(f"blocks must be at least 1 on every level; got {blocks}")
    if any(on and c % head_dim for on, c in zip(attention, channels)):
        raise ValueError(f"head_dim={head_dim} must divide the width of the levels with attention; got {channels}")
    if embedding_dim < 2 or embedding_dim % 2:
        raise ValueError(f"embedding_dim must be even and positive; got {embedding_dim}")
