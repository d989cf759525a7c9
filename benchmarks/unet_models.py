"""The denoisers that are timed: published configurations with random weights, and their inputs.

Sizes are those of the published models; nothing is downloaded. With `smoke` every width and size is small, so that a
CPU runs the same layers in a moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]

TEXT_TOKENS = 77
SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
}
DDPM_CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


class Workload(NamedTuple):
    """A model called once with its inputs. `make(smoke)` gives the model on torch's default device, in float32, and
    `inputs(model, smoke)` its keyword arguments, there too and in float32 where they are floats."""

    title: str
    make: Callable[[bool], nn.Module]
    inputs: Callable[[nn.Module, bool], Inputs]

    def build(
        self, device: torch.device, dtype: torch.dtype, *, channels_last: bool = False, smoke: bool = False
    ) -> tuple[nn.Module, Inputs]:
        """The same weights and inputs every time on a device; on the meta device only their shapes."""
        torch.manual_seed(0)
        with torch.device(device), torch.no_grad():
            model = self.make(smoke)
            inputs = self.inputs(model, smoke)
        for parameter in model.parameters():  # not model.to: diffusers' warns of a cast
            parameter.data = parameter.data.to(dtype)
        model.eval().requires_grad_(False)
        if channels_last:  # also gives 1x1 weights the strides that tell
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, {k: _cast(v, dtype, channels_last) for k, v in inputs.items()}


def _cast(value: Any, dtype: torch.dtype, channels_last: bool) -> Any:
    if isinstance(value, dict):
        return {k: _cast(v, dtype, channels_last) for k, v in value.items()}
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    value = value.to(dtype)
    return value.to(memory_format=torch.channels_last) if channels_last and value.dim() == 4 else value


# ---------------------------------------------------------------------------- diffusers' models


def sd15(smoke: bool) -> Any:
    from diffusers import UNet2DConditionModel

    small = {
        "sample_size": 16,
        "block_out_channels": (32, 32, 64, 64),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "layers_per_block": 1,
    }
    return UNet2DConditionModel(**(SD15 | small if smoke else SD15))


def sdxl(smoke: bool) -> Any:
    from diffusers import UNet2DConditionModel

    small = {
        "sample_size": 16,
        "block_out_channels": (32, 64, 64),
        "cross_attention_dim": 32,
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "layers_per_block": 1,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    return UNet2DConditionModel(**(SDXL | small if smoke else SDXL))


def text_unet_inputs(model: Any, smoke: bool) -> Inputs:
    """Two rows of latents: one image with classifier-free guidance."""
    config = model.config
    size, width = config.sample_size, config.cross_attention_dim
    inputs = {
        "sample": torch.randn(2, 4, size, size),
        "timestep": torch.full((), 500),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, width),
        "return_dict": False,
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, pooled), "time_ids": torch.randn(2, 6)}
    return inputs


class Decoder(nn.Module):
    """An autoencoder's `decode` as the forward of a module."""

    vae: Any

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        return self.vae.decode(latents, return_dict=False)


def vae_decoder(smoke: bool) -> nn.Module:
    from diffusers import AutoencoderKL

    small = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "sample_size": 64}
    vae: Any = AutoencoderKL(**(SDXL_VAE | small if smoke else SDXL_VAE))
    del vae.encoder, vae.quant_conv  # decoding alone is timed
    return Decoder(vae)


def vae_inputs(model: Any, smoke: bool) -> Inputs:
    size = model.vae.config.sample_size // 8
    return {"latents": torch.randn(1, 4, size, size)}


def ddpm_cifar10(smoke: bool) -> Any:
    from diffusers import UNet2DModel

    small = {"sample_size": 16, "block_out_channels": (32, 32, 64, 64)}
    return UNet2DModel(**(DDPM_CIFAR10 | small if smoke else DDPM_CIFAR10))


def cifar10_inputs(model: Any, smoke: bool) -> Inputs:
    batch, size = 2 if smoke else 64, model.config.sample_size
    return {"sample": torch.randn(batch, 3, size, size), "timestep": torch.full((), 500), "return_dict": False}


# ---------------------------------------------------------------------------- the model that ships with the package


def bundled(smoke: bool) -> nn.Module:
    from pydiff.models import UNet

    model = UNet()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # a new one starts with branches that are zero
            nn.init.normal_(parameter, std=0.05)
    return model


def bundled_inputs(model: Any, smoke: bool) -> Inputs:
    batch = 2 if smoke else 64
    return {"x": torch.randn(batch, *model.sample_shape), "t": torch.full((), 0.5), "labels": torch.full((batch,), 3)}


WORKLOADS = {
    "sd15_512_b2": Workload("SD1.5 U-Net, 512x512, batch 2", sd15, text_unet_inputs),
    "bundled_b64": Workload("the bundled U-Net, 28x28, batch 64", bundled, bundled_inputs),
    "vae_decode_1024_b1": Workload("SDXL VAE decoder, 1024x1024, batch 1", vae_decoder, vae_inputs),
    "cifar10_32_b64": Workload(
        "google/ddpm-cifar10-32 (diffusers UNet2DModel; for EDM's DDPM++, which no package has), 32x32, batch 64",
        ddpm_cifar10,
        cifar10_inputs,
    ),
    "sdxl_1024_b2": Workload("SDXL U-Net, 1024x1024, batch 2", sdxl, text_unet_inputs),
}
