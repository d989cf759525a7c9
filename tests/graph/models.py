"""Models of the graph tests, for the CPU and for a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """A small denoiser of any sample shape; `labels` [B] shift what it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.9))
        self.register_buffer("offset", torch.tensor(0.01))
        self.scale = 1.0

    def forward(self, x, t, labels=None):
        y = self.scale * self.gain * x / (1 + t.reshape(-1, *([1] * (x.ndim - 1)))) + self.offset
        return y if labels is None else y + 0.1 * labels.reshape(-1, *([1] * (x.ndim - 1))).to(y.dtype)


class ConvNet(nn.Module):
    """Convolutions, a norm and attention on images [B, 4, H, W]: kernels of cuDNN, cuBLAS and PyTorch."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        self.norm, self.qkv = nn.GroupNorm(8, width), nn.Linear(width, 3 * width)
        self.time = nn.Linear(1, width)

    def forward(self, x, t, labels=None):
        h = self.first(x) + self.time(t[:, None].to(x.dtype))[..., None, None]
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 4, -1)).transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.last(F.silu(h + attended.transpose(1, 2).reshape(h.shape)))
        return y if labels is None else y + 0.1 * labels.reshape(-1, 1, 1, 1).to(y.dtype)
