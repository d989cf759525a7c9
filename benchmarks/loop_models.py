"""The models whose whole sampling loop is timed: published configurations, random weights.

Small models are what a sampling loop costs most: between two launches a GPU waits longer than it computes. Nothing is
downloaded; with `smoke` every width and size is small, so that a CPU runs the same layers in a moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import unet_models

Condition = dict[str, Any]


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Times, [B] or one for all rows, as float32 [B or 1, width]."""
    index = torch.arange(width // 2, dtype=torch.float32, device=t.device)
    angles = t.float().reshape(-1, 1) * torch.exp(index * (-math.log(10_000.0) / (width // 2 - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


# ------------------------------------------------------------------------------------ a robot's policy


def conv_norm_mish(in_channels: int, out_channels: int, kernel: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(in_channels, out_channels, kernel, padding=kernel // 2), nn.GroupNorm(groups, out_channels), nn.Mish()
    )


class FiLMBlock(nn.Module):
    """Two convolutions of [B, in, T]; between them the condition [B, C] scales and shifts each channel."""

    def __init__(self, in_channels: int, out_channels: int, condition: int, kernel: int, groups: int):
        super().__init__()
        self.first = conv_norm_mish(in_channels, out_channels, kernel, groups)
        self.second = conv_norm_mish(out_channels, out_channels, kernel, groups)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * out_channels))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[:, :, None].chunk(2, dim=1)
        return self.second(scale * self.first(x) + shift) + self.skip(x)


class PolicyUNet(nn.Module):
    """The 1-D U-Net of Diffusion Policy (Chi et al. 2023): noisy actions, given what the robot has observed.

    x [B, horizon, action], t [B] or 0-d, observation [B, steps, width] -> [B, horizon, action].
    """

    def __init__(
        self,
        action: int = 2,
        observation: int = 2 * 20,
        horizon: int = 16,
        time_width: int = 256,
        widths: tuple[int, ...] = (256, 512, 1024),
        kernel: int = 5,
        groups: int = 8,
    ):
        super().__init__()
        self.sample_shape = (horizon, action)
        self.observation, self.time_width = observation, time_width
        self.time = nn.Sequential(
            nn.Linear(time_width, 4 * time_width), nn.Mish(), nn.Linear(4 * time_width, time_width)
        )

        def pair(in_channels: int, out_channels: int) -> nn.ModuleList:
            return nn.ModuleList(
                FiLMBlock(n, out_channels, time_width + observation, kernel, groups)
                for n in (in_channels, out_channels)
            )

        steps = list(zip(widths, widths[1:]))
        self.down = nn.ModuleList([pair(action, widths[0]), *(pair(a, b) for a, b in steps)])
        self.downsample = nn.ModuleList(nn.Conv1d(a, a, 3, stride=2, padding=1) for a, _ in steps)
        self.middle = pair(widths[-1], widths[-1])
        self.up = nn.ModuleList(pair(2 * b, a) for a, b in reversed(steps))
        self.upsample = nn.ModuleList(nn.ConvTranspose1d(a, a, 4, stride=2, padding=1) for a, _ in reversed(steps))
        self.out = nn.Sequential(conv_norm_mish(widths[0], widths[0], kernel, groups), nn.Conv1d(widths[0], action, 1))

    def forward(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        time = self.time(sinusoids(t, self.time_width).to(x.dtype)).expand(x.shape[0], -1)
        condition = torch.cat([time, observation.flatten(1)], dim=1)
        h, skips = x.transpose(1, 2), []
        for level, blocks in enumerate(self.down):
            h = self.through(blocks, h, condition)
            skips.append(h)  # the first level's is never joined again
            if level < len(self.downsample):
                h = self.downsample[level](h)
        h = self.through(self.middle, h, condition)
        for blocks, upsample in zip(self.up, self.upsample):
            h = upsample(self.through(blocks, torch.cat([h, skips.pop()], dim=1), condition))
        return self.out(h).transpose(1, 2)

    def through(self, blocks: Any, h: Tensor, condition: Tensor) -> Tensor:
        for block in blocks:
            h = block(h, condition)
        return h


# ------------------------------------------------------------------------------------ a waveform, a table


class WaveLayer(nn.Module):
    """A dilated convolution behind a gate: [B, C, T] -> (the next layer's input, what is summed for the output)."""

    def __init__(self, channels: int, dilation: int, time_width: int):
        super().__init__()
        self.time = nn.Linear(time_width, channels)
        self.dilated = nn.Conv1d(channels, 2 * channels, 3, padding=dilation, dilation=dilation)
        self.out = nn.Conv1d(channels, 2 * channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        gate, signal = self.dilated(x + self.time(time)[:, :, None]).chunk(2, dim=1)
        residual, skip = self.out(gate.sigmoid() * signal.tanh()).chunk(2, dim=1)
        return (x + residual) * math.sqrt(0.5), skip


class WaveNet(nn.Module):
    """DiffWave without a condition (Kong et al. 2021), its base size: x [B, 1, T], t [B] or 0-d -> [B, 1, T]."""

    def __init__(
        self, length: int = 16_000, channels: int = 64, layers: int = 30, cycle: int = 10, time_width: int = 512
    ):
        super().__init__()
        self.sample_shape, self.time_width = (1, length), time_width
        self.time = nn.Sequential(
            nn.Linear(time_width // 4, time_width), nn.SiLU(), nn.Linear(time_width, time_width), nn.SiLU()
        )
        self.first = nn.Sequential(nn.Conv1d(1, channels, 1), nn.ReLU())
        self.layers = nn.ModuleList(WaveLayer(channels, 2 ** (k % cycle), time_width) for k in range(layers))
        self.last = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.ReLU(), nn.Conv1d(channels, 1, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(sinusoids(t, self.time_width // 4).to(x.dtype))
        h, skip = self.layers[0](self.first(x), time)
        total = skip
        for layer in self.layers[1:]:
            h, skip = layer(h, time)
            total = total + skip
        return self.last(total * len(self.layers) ** -0.5)


class TableMLP(nn.Module):
    """A multilayer perceptron as in TabDDPM (Kotelnikov et al. 2023): x [B, columns], t [B] or 0-d -> [B, columns]."""

    def __init__(self, columns: int = 10, width: int = 512, layers: int = 4, time_width: int = 128):
        super().__init__()
        self.sample_shape, self.time_width = (columns,), time_width
        self.time = nn.Sequential(nn.Linear(time_width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.first = nn.Linear(columns, time_width)
        self.hidden = nn.ModuleList(nn.Linear(time_width if k == 0 else width, width) for k in range(layers))
        self.last = nn.Linear(width, columns)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x) + self.time(sinusoids(t, self.time_width).to(x.dtype))
        for layer in self.hidden:
            h = F.relu(layer(h))
        return self.last(h)


def policy(smoke: bool) -> nn.Module:
    return PolicyUNet(widths=(16, 32, 64), time_width=32) if smoke else PolicyUNet()


def waveform(smoke: bool) -> nn.Module:
    return with_larger_weights(WaveNet(length=64, channels=8, layers=6, cycle=3, time_width=32) if smoke else WaveNet())


def tabular(smoke: bool) -> nn.Module:
    return with_larger_weights(TableMLP(width=32) if smoke else TableMLP())


def with_larger_weights(model: nn.Module) -> nn.Module:
    """PyTorch's initial weights let the signal die out, and no sample would tell a wrong call from a right one."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
    return model


# ------------------------------------------------------------------------------------ the rows


@dataclass
class Case:
    """A model on a device, with all that a run of its loop is given: x is x_T [B, *sample] in float32."""

    model: nn.Module
    x: Tensor
    cond: Condition
    uncond: Condition | None
    guidance: float
    prediction: str
    call: Condition  # what the loop of diffusers adds to a call

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


def image_shape(model: Any) -> tuple[int, ...]:
    return (model.config.in_channels, model.config.sample_size, model.config.sample_size)


def no_condition(model: Any, batch: int) -> Condition:
    return {}


class LoopModel(NamedTuple):
    """`make(smoke)` gives the model on torch's default device, in float32, and `condition(model, batch)` what a call is
    given beside x and t; `shape(model)` is that of one sample."""

    title: str
    make: Callable[[bool], nn.Module]
    shape: Callable[[Any], tuple[int, ...]] = lambda model: model.sample_shape
    condition: Callable[[Any, int], Condition] = no_condition
    batch: int = 1
    guidance: float = 1.0
    prediction: str = "epsilon"
    cuda_dtype: torch.dtype = torch.bfloat16
    call: Condition = {}
    on_cpu: bool = True  # small enough to be timed on a CPU unasked

    def build(self, device: torch.device, dtype: torch.dtype, *, batch: int | None = None, smoke: bool = False) -> Case:
        """The same weights, x_T and condition every time on a device, whatever the dtype."""
        batch = batch or (min(self.batch, 2) if smoke else self.batch)
        torch.manual_seed(0)
        with torch.device(device), torch.no_grad():
            model = self.make(smoke)
            x = torch.randn(batch, *self.shape(model))
            cond = self.condition(model, batch)
            uncond = self.condition(model, batch) if self.guidance != 1 else None
        for parameter in model.parameters():  # not model.to: diffusers' warns of a cast
            parameter.data = parameter.data.to(dtype)
        model.eval().requires_grad_(False)
        return Case(
            model,
            x,
            as_dtype(cond, dtype),
            None if uncond is None else as_dtype(uncond, dtype),
            self.guidance,
            self.prediction,
            self.call,
        )


def as_dtype(condition: Condition, dtype: torch.dtype) -> Condition:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in condition.items()}


MODELS = {
    "policy": LoopModel(
        "diffusion policy's 1-D U-Net (Push-T: 16 actions, 2 observations of 20)",
        policy,
        condition=lambda model, batch: {"observation": torch.randn(batch, 2, model.observation // 2)},
    ),
    "tabular": LoopModel("TabDDPM's MLP, 10 columns", tabular, batch=256, cuda_dtype=torch.float32),
    "bundled": LoopModel(
        "the bundled U-Net, 28x28",
        unet_models.bundled,
        batch=16,
        prediction="v_prediction",
        condition=lambda model, batch: {"labels": torch.full((batch,), 3)},
    ),
    "waveform": LoopModel("DiffWave, 1 s at 16 kHz", waveform, cuda_dtype=torch.float32),
    "cifar10": LoopModel(
        "google/ddpm-cifar10-32 (diffusers UNet2DModel), 32x32",
        unet_models.ddpm_cifar10,
        image_shape,
        call={"return_dict": False},
    ),
    "sd15": LoopModel(
        "SD1.5 U-Net, 512x512, guidance 7.5",
        unet_models.sd15,
        image_shape,
        guidance=7.5,
        condition=lambda model, batch: {
            "encoder_hidden_states": torch.randn(batch, unet_models.TEXT_TOKENS, model.config.cross_attention_dim)
        },
        call={"return_dict": False},
        on_cpu=False,
    ),
}
