"""diffusers' autoencoders: encoder and decoder fused, and latents to images.

The blocks inside have rules of their own. Here the last norm and its SiLU become one operation. Nothing converts the
latents to channels-last: a convolution whose weights are channels-last answers in that layout, whatever its input's.

Precision: bfloat16 has the range of float32, and the norms' statistics are float32, so a bfloat16 decoder neither
overflows nor needs ``force_upcast``; a diffusers pipeline upcasts only an autoencoder that is in float16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pydiff.optimize import tiling
from pydiff.optimize.parts import norm_act
from pydiff.optimize.swap import Fused, Rule, ready


class FusedEncoder(Fused):
    """Encoder: the last norm and its SiLU are one operation."""

    def forward(self: Any, sample: Tensor) -> Tensor:
        """diffusers' Encoder: images [B, C, H, W] to moments of the latents."""
        if not ready(self, sample):
            return super().forward(sample)
        h = self.conv_in(sample)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(norm_act(self.conv_norm_out, self.conv_act, self.mid_block(h)))


class FusedDecoder(Fused):
    """Decoder: the last norm and its SiLU are one operation."""

    def forward(self: Any, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """diffusers' Decoder: latents [B, C, h, w] to images [B, 3, H, W]."""
        if latent_embeds is not None or not ready(self, sample):
            return super().forward(sample, latent_embeds)
        h = self.mid_block(self.conv_in(sample), None)
        for block in self.up_blocks:
            h = block(h, None)
        return self.conv_out(norm_act(self.conv_norm_out, self.conv_act, h))


def _refuse(module: Any) -> str | None:
    if isinstance(module.conv_norm_out, nn.GroupNorm):
        return None
    return f"its norms are {type(module.conv_norm_out).__name__}, conditioned on the latents, not GroupNorm"


@torch.no_grad()
def decode(vae: Any, latents: Tensor, *, tile: int | None = None, recompute: bool = False) -> Tensor:
    """Images from a sampler's latents: unscaled as the autoencoder's config says, decoded in the autoencoder's dtype.

    The latents are scaled back as diffusers' pipelines do it, ``latents / scaling_factor + shift_factor`` or
    ``latents * latents_std / scaling_factor + latents_mean``, in float32 or better, and then rounded.

    Args:
        vae: diffusers' AutoencoderKL, optimised or not; without `tile`, any autoencoder with ``decode`` and a scaling
            factor. Its own ``enable_tiling()`` and ``enable_slicing()`` are followed where `tile` is None.
        latents: [B, C, h, w], as the sampler leaves them.
        tile: decode image after image, in bands of this many rows (64, for example), to hold about half the memory.
            Unlike ``vae.enable_tiling()``, the result is that of decoding at once up to rounding. None: at once.
        recompute: with `tile`, hold about a third, for 40 % more arithmetic; see `pydiff.optimize.tiling`.

    Returns: the images [B, 3, H, W] as the autoencoder makes them, nominally in [-1, 1] and not clamped, in float32
        (float64 from a float64 autoencoder), on its device. No gradients.

    Raises: TypeError or ValueError for an autoencoder or latents that do not fit, for a tile that is no number of rows
        of at least 1 (or recompute without one), and for an autoencoder in float16 whose config says ``force_upcast``:
        its activations overflow.

    Example:
        from types import SimpleNamespace

        class Autoencoder(torch.nn.Module):  # or AutoencoderKL.from_pretrained(...), pipe.vae
            config, dtype = SimpleNamespace(scaling_factor=0.18215, latent_channels=4), torch.float32

            def decode(self, z, return_dict=True):
                return (torch.nn.functional.interpolate(z[:, :3], scale_factor=8.0),)

        assert pydiff.decode(Autoencoder(), torch.randn(2, 4, 8, 8)).shape == (2, 3, 64, 64)
    """
    _check(vae, latents, tile, recompute)
    z = _unscaled(vae.config, latents).to(vae.dtype)
    kind = torch.float64 if vae.dtype == torch.float64 else torch.float32
    if tile is None:
        return vae.decode(z, return_dict=False)[0].to(kind)
    if hasattr(getattr(vae, "_hf_hook", None), "pre_forward"):
        vae._hf_hook.pre_forward(vae)  # as diffusers' own decode has it: brings an offloaded autoencoder to its device
    decoder = vae.decoder
    factor = 2 ** sum(len(block.upsamplers or ()) for block in decoder.up_blocks)
    shape = (z.shape[0], decoder.conv_out.out_channels, factor * z.shape[2], factor * z.shape[3])
    images = torch.empty(shape, dtype=kind, device=z.device)
    for k in range(z.shape[0]):
        latent = z[k : k + 1] if vae.post_quant_conv is None else vae.post_quant_conv(z[k : k + 1])
        tiling.decoded(decoder, latent, images[k : k + 1], tile, recompute)
    return images


def _unscaled(config: Any, latents: Tensor) -> Tensor:
    z = latents if latents.dtype == torch.float64 else latents.float()
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        mean, std = (z.new_tensor(value).view(1, -1, 1, 1) for value in (mean, std))
        return z * std / config.scaling_factor + mean
    z = z / config.scaling_factor
    shift = getattr(config, "shift_factor", None)
    return z + shift if shift else z


def _check(vae: Any, latents: Tensor, tile: int | None, recompute: bool) -> None:
    config = getattr(vae, "config", None)
    if not hasattr(vae, "decode") or getattr(config, "scaling_factor", None) is None:
        raise TypeError(f"vae must be an autoencoder with decode and config.scaling_factor, got {type(vae).__name__}")
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise TypeError(f"latents must be a tensor of floats, got {getattr(latents, 'dtype', type(latents).__name__)}")
    channels = getattr(config, "latent_channels", None)
    if latents.ndim == 3:
        raise ValueError(f"latents must be [B, C, h, w], got {tuple(latents.shape)}: unpack them first")
    if isinstance(channels, int) and latents.shape[1] != channels:
        raise ValueError(f"latents must have {channels} channels for this vae, got {tuple(latents.shape)}")
    if vae.dtype == torch.float16 and getattr(config, "force_upcast", False):
        raise ValueError(
            "vae is in float16 and its config says force_upcast, for its activations overflow in float16: "
            "convert it, vae.to(torch.bfloat16)"
        )
    if tile is None:
        if recompute:
            raise ValueError("recompute=True needs tile, the rows of a band")
        return
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise ValueError(f"tile must be a number of rows of at least 1, or None, got {tile!r}")
    if latents.ndim != 4:
        raise ValueError(f"latents must be [B, C, h, w] where tile is given, got {tuple(latents.shape)}")
    reason = tiling.refuse(getattr(vae, "decoder", None))
    if reason:
        raise ValueError(f"vae cannot be decoded in bands: {reason}; leave tile=None")


_MODULE = "diffusers.models.autoencoders.vae"
RULES = (
    Rule((f"{_MODULE}.Encoder",), FusedEncoder, "last norm with SiLU", _refuse),
    Rule((f"{_MODULE}.Decoder",), FusedDecoder, "last norm with SiLU", _refuse),
)
