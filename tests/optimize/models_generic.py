"""Modules that no rule knows, with norms, activations and attention in many arrangements."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InSequential(nn.Module):
    """Two pairs in a Sequential that is called, and one that is used layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Sequential(
            nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU()
        )
        self.taken_apart = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x)
        h = self.taken_apart[0](x) * 2 + 1
        return x + self.taken_apart[1](h)


class ByAttribute(nn.Module):
    """Two pairs of attributes; `post` is called with something else than the norm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.act1, self.conv1 = nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.acts = nn.ModuleList([nn.SiLU()])
        self.norm3, self.post = nn.GroupNorm(2, 8), nn.SiLU()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h = self.conv1(self.act1(self.norm1(x)))
        h = self.norm2(h)
        h = self.acts[0](h)
        h = self.conv2(h) * scale
        return x + self.post(self.norm3(h) + x)


class OuterUser(nn.Module):
    """Uses its part's norm alone, besides calling the part."""

    def __init__(self) -> None:
        super().__init__()
        self.block = ByAttribute()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block.act1(self.block.norm1(x) * 0.5 - 1)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.GroupNorm(2, 8), nn.SiLU()

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        h = self.norm(x)
        if double:
            h = h * 2
        return self.act(h)


class HiddenBranch(Branching):
    """The branch is in a method."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.shifted(self.norm(x)))

    def shifted(self, h: Tensor) -> Tensor:
        return h * 2 if getattr(self, "double", False) else h


class Stateful(Branching):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.act(self.norm(x))


class TwoUsers(Branching):
    """The norm's output is read twice."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.act(h) + h


class SharedActivation(Branching):
    """One SiLU for everything."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x)) + self.act(x)


class Functional(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(x))
        q, k, v = self.qkv(h.flatten(2).transpose(1, 2)).unsqueeze(1).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)


class Untraceable(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x)) * float(x.shape[1] * 1.0) * len(range(int(x.sum() * 0) + 1))


class Attending(nn.Module):
    """torch's attention over pixels: its own, to a context, and with padding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        options = {"batch_first": True, **options}
        self.norm = nn.LayerNorm(8)
        self.own, self.cross = (nn.MultiheadAttention(8, 2, **options) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x.flatten(2).transpose(1, 2))
        h = h + self.own(h, h, h, need_weights=False)[0]
        context = h[:, :5]
        padding = torch.arange(5, device=x.device).expand(x.shape[0], 5) > 2
        h = h + self.cross(h, context, context, key_padding_mask=padding, need_weights=False)[0]
        float_padding = torch.zeros(x.shape[0], 5, dtype=x.dtype, device=x.device).masked_fill(padding, float("-inf"))
        h = h + self.cross(h, context, context, key_padding_mask=float_padding, need_weights=False)[0]
        out, weights = self.own(h, h, h)
        return (out * weights.sum()).transpose(1, 2).reshape(x.shape)


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            [
                InSequential(),
                ByAttribute(),
                OuterUser(),
                TwoUsers(),
                SharedActivation(),
                Branching(),
                HiddenBranch(),
                Functional(),
                Attending(),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x
