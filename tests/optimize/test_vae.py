"""diffusers' autoencoders under `optimize`, and `decode`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydiff
from pydiff.optimize.vae import decode
from tests.optimize import checks

diffusers = pytest.importorskip("diffusers")

WIDTHS = (16, 32, 32)
COMMON = dict(
    block_out_channels=WIDTHS,
    norm_num_groups=8,
    layers_per_block=1,
    sample_size=32,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
)


def sd() -> Any:
    """Stable Diffusion's and SDXL's layout: a single-head attention in the middle, 1x1 convolutions at the latents."""
    return diffusers.AutoencoderKL(**COMMON, latent_channels=4)


def flux() -> Any:
    """Flux's and Stable Diffusion 3's: more latent channels, which are shifted, and no 1x1 convolutions."""
    return diffusers.AutoencoderKL(
        **COMMON,
        latent_channels=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        force_upcast=False,
    )


def standardised() -> Any:
    """With a mean and a deviation for each latent channel, and no attention."""
    return diffusers.AutoencoderKL(
        **COMMON,
        latent_channels=4,
        mid_block_add_attention=False,
        latents_mean=(0.5, -1.0, 0.0, 2.0),
        latents_std=(1.0, 2.0, 0.5, 3.0),
    )


MODELS = {"sd": sd, "flux": flux, "standardised": standardised}


@pytest.fixture(params=MODELS)
def make(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]


def image(dtype: torch.dtype = torch.float32, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype) * 2 - 1


def latents(model: Any, dtype: torch.dtype = torch.float32, size: tuple[int, int] = (6, 5), rows: int = 2) -> Tensor:
    shape = (rows, model.config.latent_channels, *size)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def both_ways(model: Any) -> Tensor:
    return model(image()).sample


def decoded(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return model.decode(latents(model, dtype)).sample


def encoded(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return model.encode(image(dtype, (14, 18))).latent_dist.parameters


def test_close(make: Any) -> None:
    checks.assert_close_in_float32(
        lambda: make().decoder,
        lambda decoder: decoder(
            torch.ones(2, 1, 5, 6).expand(2, decoder.conv_in.in_channels, 5, 6) * torch.linspace(-2, 2, 6)
        ),
    )
    checks.assert_close_in_float32(lambda: make().encoder, lambda encoder: encoder(image(size=(14, 18))))
    for call in (decoded, encoded):
        model = checks.seeded(make)
        expected = call(model)
        assert checks.relative(call(pydiff.optimize(model)), expected) < 2e-5


@pytest.mark.parametrize("call", [decoded, encoded])
def test_low_precision(call: Any) -> None:
    checks.assert_low_precision_error(sd, call)


def test_restored(make: Any) -> None:
    checks.assert_restored(make, both_ways)


def test_copies() -> None:
    checks.assert_copies(sd, both_ways)


def test_compiles() -> None:
    checks.assert_compiles(lambda: sd().decoder, lambda decoder: decoder(torch.linspace(-2, 2, 80).view(1, 4, 4, 5)))


def test_follows_weights() -> None:
    names = [
        f"decoder.{name}.weight"
        for name in (
            "conv_norm_out",
            "conv_out",
            "mid_block.attentions.0.to_v",
            "up_blocks.0.resnets.0.norm2",
            "up_blocks.0.upsamplers.0.conv",
        )
    ]
    checks.assert_follows_weights(sd, both_ways, [*names, "encoder.conv_norm_out.bias", "post_quant_conv.weight"])


def test_hooks_fire(make: Any) -> None:
    checks.assert_hooks_fire(make, both_ways, (nn.GroupNorm, nn.Conv2d, nn.Linear, nn.SiLU))


def test_training_and_gradients() -> None:
    checks.assert_reference_path(sd, both_ways)


def test_gradient_checkpointing() -> None:
    plain, fused = checks.seeded(sd), pydiff.optimize(checks.seeded(sd))
    results = []
    for model in (plain, fused):
        model.requires_grad_(True).enable_gradient_checkpointing()
        both_ways(model).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_report() -> None:
    _, report = pydiff.optimize(checks.seeded(sd), report=True)
    assert {"Encoder", "Decoder", "ResnetBlock2D", "Attention"} == {e.cls for e in report.replaced}
    assert {"Upsample2D"} == {e.cls for e in report.left}


def test_spatial_norms_stay() -> None:
    def movq() -> nn.Module:
        return diffusers.VQModel(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            num_vq_embeddings=8,
            norm_type="spatial",
        )

    model = checks.seeded(movq)
    z = torch.randn(1, 4, 4, 4)
    expected = model.decode(z, force_not_quantize=True).sample
    _, report = pydiff.optimize(model, report=True)
    left = {entry.name: entry.what for entry in report.left}
    assert "SpatialNorm, conditioned on the latents" in left["decoder"]
    assert checks.relative(model.decode(z, force_not_quantize=True).sample, expected) < 2e-5


class TestDiffusersOwnTiling:
    """`enable_tiling` and `enable_slicing` go on working on an optimised autoencoder."""

    @pytest.mark.parametrize("way", ["enable_tiling", "enable_slicing"])
    def test_same(self, way: str) -> None:
        results = []
        for model in (checks.seeded(sd), pydiff.optimize(checks.seeded(sd), memory_format=torch.channels_last)):
            getattr(model, way)()
            results.append(
                (
                    model.decode(latents(model, size=(12, 11))).sample,
                    encoded(model),
                    decode(model, latents(model, size=(12, 11))),
                )
            )
        for result, expected in zip(*results):
            assert checks.relative(result, expected) < 2e-5

    def test_is_no_decoding_at_once(self) -> None:
        model = pydiff.optimize(checks.seeded(sd))
        z = latents(model, size=(12, 11))
        at_once = model.decode(z).sample
        model.enable_tiling()
        assert checks.relative(model.decode(z).sample, at_once) > 1e-3
        assert checks.relative(decode(model, z * model.config.scaling_factor, tile=16), at_once) < 1e-5


class TestDecode:
    def test_unscales_as_the_pipelines_do(self) -> None:
        for make, unscaled in (
            (sd, lambda z: z / 0.18215),
            (flux, lambda z: z / 0.3611 + 0.1159),
            (
                standardised,
                lambda z: (
                    z * torch.tensor([1.0, 2.0, 0.5, 3.0]).view(1, 4, 1, 1) / 0.18215
                    + torch.tensor([0.5, -1.0, 0.0, 2.0]).view(1, 4, 1, 1)
                ),
            ),
        ):
            model = checks.seeded(make)
            z = latents(model)
            assert checks.relative(decode(model, z), model.decode(unscaled(z)).sample) < 1e-6
            assert checks.relative(decode(model, z), model.decode(z).sample) > 1e-2

    @pytest.mark.parametrize("tile", [None, 8])
    def test_bfloat16_is_decoded_in_bfloat16(self, tile: int | None) -> None:
        model = pydiff.optimize(checks.seeded(sd).bfloat16())
        assert model.config.force_upcast
        seen = set()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda m, args, out: seen.add((args[0].dtype, out.dtype)))
        result = decode(model, latents(model), tile=tile)
        assert seen == {(torch.bfloat16, torch.bfloat16)}
        assert result.dtype == torch.float32 and model.dtype == torch.bfloat16

    def test_double(self) -> None:
        model = checks.seeded(sd).double()
        for tile in (None, 8):
            assert decode(model, latents(model), tile=tile).dtype == torch.float64

    def test_no_gradients(self) -> None:
        model = checks.seeded(sd).requires_grad_(True)
        for tile in (None, 8):
            assert not decode(model, latents(model).requires_grad_(), tile=tile).requires_grad

    @pytest.mark.parametrize("tile", [None, 8])
    def test_an_offloaded_autoencoder_is_fetched(self, tile: int | None) -> None:
        class Hook:
            def pre_forward(self, module: nn.Module) -> None:
                fetched.append(module)

        model, fetched = checks.seeded(sd), []
        model._hf_hook = Hook()
        decode(model, latents(model), tile=tile)
        assert tile is None or fetched == [model]

    def test_another_autoencoder(self) -> None:
        model = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).eval()
        z = torch.randn(1, 4, 4, 4)
        with torch.no_grad():
            assert torch.equal(decode(model, z), model.decode(z / model.config.scaling_factor).sample)
        with pytest.raises(ValueError, match="decoder is DecoderTiny"):
            decode(model, z, tile=8)


class TestBadInput:
    def test_float16_that_overflows(self) -> None:
        model = checks.seeded(sd).half()
        with pytest.raises(ValueError, match=r"force_upcast.*vae.to\(torch.bfloat16\)"):
            decode(model, latents(model))

    def test_no_autoencoder(self) -> None:
        with pytest.raises(TypeError, match="vae must be an autoencoder .* got Linear"):
            decode(nn.Linear(2, 2), torch.zeros(1, 4, 2, 2))

    def test_latents(self) -> None:
        model = checks.seeded(sd)
        with pytest.raises(TypeError, match="latents must be a tensor of floats, got torch.int64"):
            decode(model, torch.zeros(1, 4, 2, 2, dtype=torch.int64))
        with pytest.raises(ValueError, match="unpack them first"):
            decode(model, torch.zeros(1, 16, 64))
        with pytest.raises(ValueError, match="must have 4 channels"):
            decode(model, torch.zeros(1, 16, 4, 4))

    @pytest.mark.parametrize("tile", [0, -8, 1.5, True])
    def test_tile(self, tile: Any) -> None:
        model = checks.seeded(sd)
        with pytest.raises(ValueError, match="tile must be a number of rows"):
            decode(model, latents(model), tile=tile)

    def test_recompute_without_tile(self) -> None:
        model = checks.seeded(sd)
        with pytest.raises(ValueError, match="recompute=True needs tile"):
            decode(model, latents(model), recompute=True)
