"""Decoding in bands: equal to decoding at once, and in less memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pydiff
from pydiff.optimize import tiling
from pydiff.optimize.tiling import Layer, Rows, Statistics, bands, stored
from pydiff.optimize.vae import decode
from tests.optimize.checks import relative, seeded

diffusers = pytest.importorskip("diffusers")

BOUND = {torch.float32: 1e-5, torch.float64: 1e-12}


def autoencoder(
    widths: tuple[int, ...] = (8, 16, 16), layers: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=widths,
            norm_num_groups=4,
            layers_per_block=layers,
            latent_channels=4,
            scaling_factor=1.0,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
        ),
        seed,
    ).to(dtype)


def latents(height: int, width: int, rows: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(4)).to(dtype)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tile", [1, 2, 8, 13, 28, 100])
def test_equals_decoding_at_once(tile: int, recompute: bool, dtype: torch.dtype) -> None:
    """28 rows, which few of these divide; bands below the reach of a ResNet block, bands beyond the image."""
    model, z = autoencoder(dtype=dtype), latents(7, 5, dtype=dtype)
    assert relative(decode(model, z, tile=tile, recompute=recompute), decode(model, z)) < BOUND[dtype]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (9, 4)])
@pytest.mark.parametrize("layers", [0, 2])
def test_sizes_and_depths(layers: int, size: tuple[int, int], recompute: bool) -> None:
    model, z = autoencoder((8, 16), layers, torch.float64), latents(*size, rows=2, dtype=torch.float64)
    assert relative(decode(model, z, tile=3, recompute=recompute), decode(model, z)) < 1e-12


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_optimised(memory_format: torch.memory_format, recompute: bool) -> None:
    model, z = autoencoder(), latents(7, 6, rows=3)
    expected = decode(model, z)
    pydiff.optimize(model, memory_format=memory_format)
    for _ in range(2):
        assert relative(decode(model, z, tile=6, recompute=recompute), expected) < 1e-5


def test_an_image_depends_on_no_other() -> None:
    model, z = autoencoder(), latents(6, 6, rows=3)
    together = decode(model, z, tile=5)
    for row in range(3):
        assert torch.equal(decode(model, z[row : row + 1], tile=5)[0], together[row])
    assert decode(model, z[:0], tile=5).shape == (0, 3, 24, 24)


@pytest.mark.parametrize("recompute", [False, True])
def test_low_precision(recompute: bool) -> None:
    """Against float64, bfloat16 in bands errs at most twice as much as at once."""
    errors: list[list[Tensor]] = [[], []]
    for seed in range(3):
        low = autoencoder(dtype=torch.bfloat16, seed=seed)
        z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
        expected = decode(autoencoder(dtype=torch.bfloat16, seed=seed).double(), z.double())
        for k, tile in enumerate((8, None)):
            errors[k].append(decode(low, z, tile=tile, recompute=recompute and k == 0).double() - expected)
    ours, theirs = (torch.cat(e).square().mean().sqrt() for e in errors)
    assert ours <= 1.3 * theirs
    assert torch.cat(errors[0]).abs().max() <= 2 * torch.cat(errors[1]).abs().max()


class TestTheCheckCanFail:
    """What would be wrong is not mistaken for rounding."""

    @pytest.mark.parametrize("recompute", [False, True])
    def test_reach_one_too_small(self, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        model, z = autoencoder(), latents(7, 5)
        monkeypatch.setattr(tiling, "REACH", 0)
        assert relative(decode(model, z, tile=8, recompute=recompute), decode(model, z)) > 1e-3

    def test_reach_of_the_upsampling_too_small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, z = autoencoder(), latents(7, 5)
        monkeypatch.setattr(tiling, "Layer", lambda run, reach, scale=1: Layer(run, 0 if scale == 2 else reach, scale))
        assert relative(decode(model, z, tile=8), decode(model, z)) > 1e-3

    def test_statistics_of_a_band(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, z = autoencoder(), latents(7, 5)
        see = Statistics.see
        monkeypatch.setattr(Statistics, "see", lambda self, band: None if self.parts else see(self, band))
        assert relative(decode(model, z, tile=8), decode(model, z)) > 1e-3

    def test_overwriting_too_early(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, z = autoencoder(), latents(7, 5)
        whole = tiling.stored
        monkeypatch.setattr(tiling, "stored", lambda *arguments: whole(*arguments[:4]))
        assert relative(decode(model, z, tile=8, recompute=True), decode(model, z)) > 1e-3


class Peak(TorchDispatchMode):
    """The largest sum of the bytes of all tensors that were alive at once, those made before it aside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in before:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def peak(model: Any, z: Tensor, **arguments: Any) -> int:
    with Peak() as mode:
        decode(model, z, **arguments)
    return mode.peak


@pytest.mark.parametrize("optimised", [False, True])
def test_memory(optimised: bool) -> None:
    """In units of the last level's activations: six at once, three in bands, one and a half; and the bands."""
    model, z = autoencoder((16, 32, 64, 64)), latents(16, 16)
    if optimised:
        pydiff.optimize(model, memory_format=torch.channels_last)
    unit = 16 * 128 * 128 * 4
    result = unit * 3 // 16
    decode(model, z)  # packed weights exist from here on
    at_once, banded, least = (peak(model, z, **a) for a in ({}, {"tile": 8}, {"tile": 8, "recompute": True}))
    assert at_once > 4.9 * unit
    assert banded < 3.6 * unit + result
    assert least < 2.2 * unit + result


def test_memory_is_let_go() -> None:
    model, z = autoencoder(), latents(8, 8)
    seen = []
    model.decoder.mid_block.register_forward_hook(lambda m, args, out: seen.append(weakref.ref(out)))
    decode(model, z, tile=8)
    assert seen[0]() is None


class TestRows:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 9), st.lists(st.sampled_from(["conv", "up", "point"]), max_size=4), st.data())
    def test_window(self, height: int, kinds: list[str], data: st.DataObject) -> None:
        make = torch.Generator().manual_seed(height)
        weight = torch.randn(2, 2, 3, 3, generator=make, dtype=torch.float64)
        layers = {
            "conv": Layer(lambda x: F.conv2d(x, weight, padding=1), 1),
            "up": Layer(lambda x: F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1), 1, 2),
            "point": Layer(torch.tanh, 0),
        }
        rows = Rows(torch.randn(1, 2, height, 3, generator=make, dtype=torch.float64))
        whole = rows.base
        for kind in kinds:
            rows, whole = rows.then(layers[kind]), layers[kind].run(whole)
        assert rows.height == whole.shape[2]
        start = data.draw(st.integers(0, rows.height - 1))
        stop = data.draw(st.integers(start + 1, rows.height))
        torch.testing.assert_close(rows.window(start, stop), whole[:, :, start:stop], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("rows", [1, 2, 3, 5, 20])
    @pytest.mark.parametrize("reach", [0, 1, 2, 4])
    def test_stored_over_what_is_read(self, reach: int, rows: int) -> None:
        x = torch.randn(1, 2, 11, 3, dtype=torch.float64)
        weight = torch.randn(2, 2, 2 * reach + 1, 1, dtype=torch.float64)
        layer = Layer(lambda x: F.conv2d(x, weight, padding=(reach, 0)), reach)
        expected = layer.run(x)
        image = Rows(x).then(layer)
        assert torch.allclose(stored(image.window, 11, rows), expected)
        assert stored(image.window, 11, rows, x, reach) is x
        assert torch.allclose(x, expected)

    def test_bands(self) -> None:
        assert list(bands(7, 3)) == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_with_a_large_mean(dtype: torch.dtype) -> None:
    """Mean 1000 and deviation 1 (8 in bfloat16, which has no finer steps there); the bands differ in both."""
    norm = nn.GroupNorm(2, 6).requires_grad_(False)
    nn.init.normal_(norm.weight)
    x = 1000 + (1 if dtype == torch.float32 else 8) * torch.randn(1, 6, 10, 4)
    x[:, :, 7:] = x[:, :, 7:] * 1.01 - 5
    x = x.to(dtype)
    statistics = Statistics(norm)
    for start, stop in bands(10, 3):
        statistics.see(x[:, :, start:stop])
    conv = nn.Identity()
    result = statistics.layer(nn.Identity(), conv).run(x)
    expected = F.group_norm(x.double(), 2, norm.weight.double(), norm.bias.double(), norm.eps)
    theirs = (F.group_norm(x, 2, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps).double() - expected).abs().max()
    assert result.dtype == dtype
    assert (result.double() - expected).abs().max() <= 2 * theirs + torch.finfo(dtype).eps * expected.abs().max()


class TestRefusals:
    def check(self, change: Any, words: str) -> None:
        model = autoencoder()
        change(model.decoder)
        with pytest.raises(ValueError, match=f"cannot be decoded in bands: .*{words}"):
            decode(model, latents(4, 4), tile=8)

    def test_attention_in_an_up_block(self) -> None:
        model = seeded(
            lambda: diffusers.AutoencoderKL(
                block_out_channels=(8, 8),
                norm_num_groups=4,
                layers_per_block=1,
                latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            )
        )
        with pytest.raises(ValueError, match="up_blocks.0 is AttnUpDecoderBlock2D"):
            decode(model, latents(4, 4), tile=8)

    def test_hooks_that_would_not_fire(self) -> None:
        for find in (
            lambda d: d,
            lambda d: d.up_blocks[1],
            lambda d: d.up_blocks[1].resnets[0],
            lambda d: d.up_blocks[0].resnets[1].norm2,
            lambda d: d.conv_norm_out,
        ):
            self.check(lambda d, find=find: find(d).register_forward_hook(lambda *args: None), "hooked")

    def test_seamless_textures(self) -> None:
        self.check(lambda d: setattr(d.up_blocks[0].resnets[0].conv1, "padding_mode", "circular"), "not 3x3")
        self.check(lambda d: setattr(d.conv_out, "padding_mode", "circular"), "last convolution")

    def test_another_block(self) -> None:
        self.check(lambda d: setattr(d.up_blocks[0].resnets, "0", nn.Identity()), "Identity 0: it is no")


def test_hooks_on_layers_fire() -> None:
    """Convolutions and activations are called as the modules they are, once for each band."""
    model, seen = autoencoder(), []
    model.decoder.up_blocks[2].resnets[0].conv1.register_forward_hook(lambda m, args, out: seen.append(out.shape[2]))
    model.decoder.up_blocks[2].resnets[0].nonlinearity.register_forward_hook(lambda m, args, out: seen.append(0))
    decode(model, latents(4, 4), tile=8)
    assert [n for n in seen if n] == [9, 9]
    assert seen.count(0) == 4
