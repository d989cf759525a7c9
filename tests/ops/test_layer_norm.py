"""LayerNorm's kernel under Triton's interpreter, beside its reference in float64 and beside diffusers' layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pydiff.ops import layer_norm as op
from pydiff.ops import native
from pydiff.ops.layer_norm import layer_norm, layer_norm_kernel, layer_norm_reference
from tests.ops.interpreted import DEVICE, DTYPES, Operators, compare, make

pytest.importorskip("triton")


def check(*args, **options) -> None:
    compare(layer_norm_kernel, layer_norm_reference, *args, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 3, 320), (1, 5, 640), (3, 1, 1280), (5, 2, 97), (4, 32), (2, 2, 3, 33), (1, 1, 12288)]
)
def test_norm(shape, dtype):
    x = make(*shape, dtype=dtype)
    weight, bias = (make(shape[-1], dtype=dtype, seed=seed) for seed in (1, 2))
    check(x, weight, bias)
    check(x, None, None, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 320), (3, 2, 97), (4, 40)])
@pytest.mark.parametrize("gated", [False, True])
def test_residual_and_modulation(shape, dtype, gated):
    x, residual = make(*shape, dtype=dtype), make(*shape, dtype=dtype, seed=1)
    gate, scale, shift = make(shape[0], 6 * shape[-1], dtype=dtype, seed=2).chunk(6, 1)[::2]
    weight = make(shape[-1], dtype=dtype, seed=3)
    check(x, weight, None, residual=residual, gate=gate if gated else None, scale=scale, shift=shift)
    check(x, None, weight, residual=residual, gate=gate[:, None].reshape(shape[0], *[1] * (len(shape) - 2), shape[-1]))
    check(x, weight, residual=residual, total_bias=make(shape[-1], dtype=dtype, seed=4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_modulation_per_token_and_for_all_rows(dtype):
    x, residual, gate, scale = (make(2, 3, 48, dtype=dtype, seed=seed) for seed in range(4))
    check(x, residual=residual, gate=gate, scale=scale, shift=make(1, 48, seed=5))
    check(x, scale=make(1, 1, 48, seed=6), shift=residual)


@pytest.mark.parametrize("rows, block, warps", [(2, 64, 1), (4, 64, 4), (8, 128, 2)])
def test_several_rows_in_a_program(monkeypatch, rows, block, warps):
    from pydiff.kernels import layer_norm as kernels

    monkeypatch.setattr(kernels, "select", lambda *_: kernels.RowBlock(rows, block, warps))
    x, residual, gate, shift = make(3, 5, 50), make(3, 5, 50, seed=1), make(3, 50, seed=4), make(3, 1, 50, seed=5)
    check(x, make(50, seed=2), make(50, seed=3), residual=residual, gate=gate, shift=shift)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_a_large_mean_and_constant_rows(dtype):
    check(make(2, 4, 320, dtype=dtype, mean=1000.0))
    for value in (0.0, 1.0, 0.1, 1000.0, 77.7):
        x = torch.full((2, 1280), value).to(dtype)
        assert (layer_norm_kernel(x) == 0).all()


def test_inputs_that_are_not_contiguous():
    x, residual, shift = make(2, 3, 80)[..., ::2], make(2, 40, 3).transpose(1, 2), make(2, 3, 90)[..., :40]
    check(x, make(80)[::2], residual=residual, scale=make(40, 2).t(), shift=shift)
    image = make(2, 24, 3, 5).permute(0, 2, 3, 1)
    check(image, scale=make(2, 24), shift=make(2, 1, 1, 24))
    check(make(2, 7, 40)[:, 1:6])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(2, 260), st.sampled_from(DTYPES), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape(batch, tokens, channels, dtype, residual, seed):
    x, scale = make(batch, tokens, channels, dtype=dtype, seed=seed), make(batch, channels, dtype=dtype, seed=seed + 1)
    other = make(batch, tokens, channels, dtype=dtype, seed=seed + 2) if residual else None
    options = {"residual": other, "gate": scale if residual else None, "scale": scale, "shift": scale}
    check(x, scale[0], **options, ulps=2)  # on so few elements the chain's rounding errors may be lucky


@pytest.mark.parametrize("broken", [{"scale": None}, {"gate": None}, {"shift": make(2, 48, seed=8)}])
def test_a_wrong_result_is_noticed(broken):
    x, residual = make(2, 3, 48, dtype=torch.bfloat16), make(2, 3, 48, dtype=torch.bfloat16, seed=1)
    gate, scale, shift = (make(2, 48, dtype=torch.bfloat16, seed=seed) for seed in (2, 3, 4))
    options = {"residual": residual, "gate": gate, "scale": scale, "shift": shift}
    check(x, **options)
    with pytest.raises(AssertionError, match="error"):
        check(x, **options, broken=broken)
    with pytest.raises(AssertionError, match="error"):
        check(0.1 * x, eps=1e-6, broken={"eps": 1e-3})


def test_it_is_diffusers_adaptive_norms():
    normalization = pytest.importorskip("diffusers.models.normalization")
    x, emb = make(2, 3, 64), make(2, 64, seed=1)
    with torch.no_grad():
        zero = normalization.AdaLayerNormZero(64).to(DEVICE)
        expected, *_ = zero(x, emb=emb)
        shift, scale, *_ = zero.linear(zero.silu(emb)).chunk(6, dim=1)
        continuous = normalization.AdaLayerNormContinuous(64, 64, eps=1e-6).to(DEVICE)
        expected_too = continuous(x, emb)
        scale_too, shift_too = continuous.linear(continuous.silu(emb)).chunk(2, dim=1)
        norm = continuous.norm
        fp32 = normalization.FP32LayerNorm(64).to(DEVICE)
        half = x.bfloat16()
        for function in (layer_norm, layer_norm_kernel):
            torch.testing.assert_close(function(x, eps=1e-6, scale=scale, shift=shift), expected)
            result = function(x, norm.weight, norm.bias, norm.eps, scale=scale_too, shift=shift_too)
            torch.testing.assert_close(result, expected_too)
            torch.testing.assert_close(function(half, fp32.weight, fp32.bias, fp32.eps), fp32(half))


def test_bad_input():
    x = make(2, 3, 8)
    for arguments, words in (
        ({"weight": make(7)}, r"weight has shape \(7,\)"),
        ({"bias": make(1, 8)}, "bias has shape"),
        ({"gate": make(2, 8)}, "gate is given without residual"),
        ({"total_bias": make(8)}, "total_bias is given without residual"),
        ({"residual": x[:, :1]}, "residual is torch.float32"),
        ({"residual": x.double()}, "residual is torch.float64"),
        ({"scale": make(3, 8)}, r"scale has shape \(3, 8\); give \[B, C\]"),
        ({"shift": make(2, 2, 8)}, "shift has shape"),
    ):
        with pytest.raises(ValueError, match=words):
            layer_norm(x, **arguments)
    with pytest.raises(ValueError, match="x has shape"):
        layer_norm(make(8))


def test_gradients_and_float64_take_the_reference():
    x, residual, gate = (make(2, 3, 8, seed=seed).double().requires_grad_() for seed in range(3))
    weight = make(8).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, r, g, w: layer_norm(x, w, residual=r, gate=g, scale=g), (x, residual, gate, weight)
    )
    assert layer_norm(torch.zeros(0, 3, 8)).shape == (0, 3, 8)


def test_fake_cuda_tensors_see_one_operator(launches):
    with FakeTensorMode(), torch.no_grad(), Operators() as seen:
        x = torch.empty_strided((2, 3, 8), (48, 16, 1), device="cuda", dtype=torch.bfloat16)
        modulation = torch.empty(2, 8, device="cuda")
        weight = torch.nn.Parameter(torch.empty(8, device="cuda"))
        y = layer_norm(x, weight, scale=modulation, shift=modulation)
        assert seen.names == ["pydiff::layer_norm"] and len(launches) == op.layer_norm_launches()
        z, s = layer_norm(x, weight, residual=x, gate=modulation)
        assert seen.names == ["pydiff::layer_norm", "pydiff::add_layer_norm"]
    for result in (y, z, s):
        assert (result.shape, result.stride(), result.dtype) == ((2, 3, 8), (24, 8, 1), torch.bfloat16)
        assert result.device.type == "cuda"


def test_what_the_kernel_refuses(monkeypatch):
    with FakeTensorMode():
        x = torch.empty(1, 2, 8, device="cuda")
        assert op.can_use_layer_norm(x) == (True, "")
        assert "gradients" in op.can_use_layer_norm(x, torch.empty(1, 2, 8, device="cuda", requires_grad=True))[1]
        assert "16384" in op.can_use_layer_norm(torch.empty(1, 1, 16385, device="cuda"))[1]
        assert "float64" in op.can_use_layer_norm(torch.empty(1, 2, 8, device="cuda", dtype=torch.float64))[1]
        monkeypatch.setattr(native, "disabled", frozenset({"layer_norm"}))
        assert "PYDIFF_DISABLE" in op.can_use_layer_norm(x)[1]
    assert "CUDA" in op.can_use_layer_norm(make(1, 2, 8))[1]


def test_programs_fill_the_device_and_hold_their_rows():
    from pydiff.kernels import layer_norm as kernels

    assert kernels.MAX_CHANNELS == op.MAX_CHANNELS
    for rows in (1, 128, 2048, 8192, 10**6):
        for channels in (1, 32, 320, 1280, 3072, 12288, 16384):
            config = kernels.select(rows, channels, 132)
            assert channels <= config.block < 2 * channels or config.block == 1
            assert config.rows * config.block <= max(2048, config.block)
            assert 1 <= config.num_warps <= 16 and config.rows * config.block <= 32 * 32 * config.num_warps
            assert config.rows == 1 or rows / config.rows >= 8 * 132 - 1
