"""GEGLU's kernels beside their references in float64 and beside diffusers' layer; how one of them is chosen."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pydiff.ops import geglu as op
from pydiff.ops import native, triton_ops
from pydiff.ops.geglu import (
    geglu,
    geglu_kernel,
    geglu_reference,
    linear_geglu,
    linear_geglu_kernel,
    linear_geglu_reference,
)
from pydiff.ops.measured import Measured
from tests.ops.interpreted import DEVICE, DTYPES, Operators, compare, make

kernels = pytest.importorskip("pydiff.kernels.geglu")


def layer(m: int, k: int, n: int, dtype: torch.dtype, bias: bool = True):
    x = make(m, k, dtype=dtype)
    weight = make(2 * n, k, dtype=dtype, scale=k**-0.5, seed=1)
    return x, weight, make(2 * n, dtype=dtype, seed=2) if bias else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (26,), (5, 26), (3, 7, 40), (2, 3, 2560), (1, 130), (17, 514)])
def test_geglu(shape, dtype) -> None:
    compare(geglu_kernel, geglu_reference, make(*shape, dtype=dtype, scale=2.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale, mean", [(1.0, 1000.0), (100.0, 0.0), (1e-3, -6.0), (0.0, 0.0), (0.0, 3.0)])
def test_geglu_of_large_small_and_constant_inputs(scale, mean, dtype) -> None:
    compare(geglu_kernel, geglu_reference, make(4, 64, dtype=dtype, scale=scale, mean=mean))


def test_geglu_of_any_strides() -> None:
    wide = make(3, 4, 200)
    turned, repeated = wide.permute(2, 0, 1)[:10], wide[:1].expand(5, 4, 200)
    for x in (wide[..., 8:72], wide[..., ::2], wide.transpose(0, 1), turned, repeated):
        out = geglu_kernel(x)
        compare(geglu_kernel, geglu_reference, x)
        assert out.is_contiguous() and out.shape == (*x.shape[:-1], x.shape[-1] // 2)


def test_infinities_and_nan_pass() -> None:
    x = torch.tensor([[1.0, math.inf, 2.0, math.nan, math.inf, 1.0, 0.0, 1.0]], device=DEVICE)
    expected = torch.tensor([[math.inf, math.inf, 0.0, math.nan]], device=DEVICE)
    torch.testing.assert_close(geglu_kernel(x), expected, equal_nan=True)


def test_a_swapped_gate_or_an_approximate_gelu_would_be_seen() -> None:
    x = make(4, 64)
    for wrong in (lambda x: geglu_kernel(x.roll(32, 1)), lambda x: x[:, :32] * F.gelu(x[:, 32:], approximate="tanh")):
        with pytest.raises(AssertionError, match="the chain's"):
            compare(wrong, geglu_reference, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "m, k, n", [(1, 16, 16), (5, 7, 3), (70, 48, 40), (130, 80, 130), (131, 67, 37), (257, 32, 16), (2, 200, 5)]
)
def test_linear_geglu(m, k, n, dtype) -> None:
    compare(linear_geglu_kernel, linear_geglu_reference, *layer(m, k, n, dtype))
    compare(linear_geglu_kernel, linear_geglu_reference, *layer(m, k, n, dtype, bias=False))


TILES = sorted({tile for m, _, n in kernels.SHAPES for tile in kernels.ranked(m, n, 2, True, 132)})


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.block_m}x{t.block_n}")
def test_every_tile_at_its_edges(tile) -> None:
    for m, k, n in ((tile.block_m + 3, 2 * tile.block_k, tile.block_n + 16), (tile.block_m, 80, tile.block_n)):
        x, weight, bias = layer(m, k, n, torch.bfloat16)
        compare(lambda *a: linear_geglu_kernel(*a, tile), linear_geglu_reference, x, weight, bias)


def test_many_rows_of_tiles() -> None:
    """More of them than one group, the last group lower than the rest."""
    tile = kernels.Tile(16, 16, 16, 4, 2)
    compare(
        lambda *a: linear_geglu_kernel(*a, tile), linear_geglu_reference, *layer(16 * 11 - 5, 16, 40, torch.float32)
    )


def test_leading_dimensions_and_strides() -> None:
    x, weight, bias = layer(24, 32, 20, torch.float32)
    wide = make(24, 100)
    spaced = make(40, 64)[:, 16:48]  # rows of a wider matrix
    for given_x in (x.view(2, 3, 4, 32), wide[:, 3:35], x.view(4, 6, 32).transpose(0, 1), wide[:, :64:2], x[0]):
        compare(linear_geglu_kernel, linear_geglu_reference, given_x, weight, bias)
        assert linear_geglu_kernel(given_x, weight, bias).shape == (*given_x.shape[:-1], 20)
    compare(linear_geglu_kernel, linear_geglu_reference, x, spaced, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_means_and_constant_rows(dtype) -> None:
    x, weight, bias = layer(20, 64, 24, dtype)
    compare(linear_geglu_kernel, linear_geglu_reference, make(20, 64, mean=1000.0, dtype=dtype), weight, bias)
    compare(linear_geglu_kernel, linear_geglu_reference, torch.full_like(x, 3.0), weight, bias)
    compare(linear_geglu_kernel, linear_geglu_reference, torch.zeros_like(x), weight, bias)


def test_a_wrong_weight_or_bias_would_be_seen() -> None:
    x, weight, bias = layer(20, 64, 24, torch.bfloat16)
    with pytest.raises(AssertionError, match="the chain's"):
        compare(lambda x, w, b: linear_geglu_kernel(x, w.roll(1, 0), b), linear_geglu_reference, x, weight, bias)
    with pytest.raises(AssertionError, match="the chain's"):
        compare(lambda x, w, b: linear_geglu_kernel(x, w, b.roll(24)), linear_geglu_reference, x, weight, bias)


@settings(max_examples=15, deadline=None)
@given(m=st.integers(8, 90), k=st.integers(1, 90), n=st.integers(8, 70), dtype=st.sampled_from(DTYPES))
def test_any_sizes(m, k, n, dtype) -> None:
    compare(linear_geglu_kernel, linear_geglu_reference, *layer(m, k, n, dtype))
    compare(geglu_kernel, geglu_reference, make(m, 2 * n, dtype=dtype))


def test_beside_diffusers() -> None:
    activations = pytest.importorskip("diffusers.models.activations")
    module = activations.GEGLU(32, 24).to(DEVICE)
    x = make(2, 5, 32)
    with torch.no_grad():
        theirs = module(x)
        for ours in (geglu(module.proj(x)), linear_geglu(x, module.proj.weight, module.proj.bias)):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(linear_geglu_kernel(x, module.proj.weight, module.proj.bias), theirs)


def test_gradients_take_the_reference() -> None:
    x, weight, bias = (t.requires_grad_() for t in layer(3, 16, 8, torch.float32))
    linear_geglu(x, weight, bias).sum().backward()
    grads = [t.grad.clone() for t in (x, weight, bias)]
    for t in (x, weight, bias):
        t.grad = None
    linear_geglu_reference(x, weight, bias).sum().backward()
    for t, grad in zip((x, weight, bias), grads, strict=True):
        torch.testing.assert_close(grad, t.grad)
    assert torch.autograd.gradcheck(geglu, make(2, 6).double().requires_grad_())


def test_empty_inputs() -> None:
    assert geglu(torch.empty(0, 6, device=DEVICE)).shape == (0, 3)
    assert linear_geglu(torch.empty(0, 6, device=DEVICE), make(8, 6)).shape == (0, 4)


def test_autocast_keeps_its_dtype() -> None:
    x, weight, bias = layer(3, 16, 8, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        assert linear_geglu(x, weight, bias).dtype == torch.bfloat16
        assert linear_geglu(x.bfloat16(), weight, bias).dtype == torch.bfloat16


def test_bad_input() -> None:
    x, weight, bias = layer(3, 16, 8, torch.float32)
    for arguments, message in [
        ((x[:, :15], weight), r"weight has shape \(16, 16\): give \[2N, 15\]"),
        ((x, weight[:15]), r"weight has shape \(15, 16\)"),
        ((x, weight, bias[:3]), r"bias has shape \(3,\): give \[16\]"),
        ((x, weight.double()), "weight is torch.float64: convert it to x's torch.float32"),
        ((x, weight, bias.half()), "bias is torch.float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_geglu(*arguments)
    for wrong in (x[:, :15], torch.ones(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="x has shape"):
            geglu(wrong)


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, device="cuda", dtype=dtype)


def test_fake_cuda_tensors_see_one_operator() -> None:
    with FakeTensorMode(), torch.no_grad(), Operators() as seen:
        x, weight, bias = fake(2, 64, 320), fake(2560, 320), fake(2560)
        out = linear_geglu(x, weight, bias)
        plain = linear_geglu(x, weight)
        assert seen.names == ["pydiff::linear_geglu"] * 2
        point = geglu(fake(2, 64, 2560))
        assert seen.names[2:] == ["pydiff::geglu"]
    for result in (out, plain, point):
        assert (result.shape, result.stride(), result.dtype) == ((2, 64, 1280), (81920, 1280, 1), torch.bfloat16)
        assert result.device.type == "cuda"


def test_what_the_kernels_refuse(monkeypatch) -> None:
    with FakeTensorMode():
        x, weight, bias = fake(4, 16), fake(32, 16), fake(32)
        assert op.can_use_geglu(x) == op.can_use_linear_geglu(x, weight, bias) == (True, "")
        assert "dense" in op.can_use_linear_geglu(x, fake(16, 32).t())[1]
        sparse = torch.empty_strided((32,), (2,), device="cuda", dtype=torch.bfloat16)
        assert "dense" in op.can_use_linear_geglu(x, weight, sparse)[1]
        assert "gradients" in op.can_use_linear_geglu(x, weight.requires_grad_())[1]
        assert "float64" in op.can_use_geglu(fake(4, 16, dtype=torch.float64))[1]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
            assert "autocast" in op.can_use_linear_geglu(x, fake(32, 16))[1]
        monkeypatch.setattr(native, "disabled", frozenset({"geglu", "linear_geglu"}))
        assert "PYDIFF_DISABLE" in op.can_use_geglu(x)[1] and "PYDIFF_DISABLE" in op.can_use_linear_geglu(x, weight)[1]
    assert op.geglu_launches() == op.linear_geglu_launches() == 1


@pytest.mark.parametrize("favourite", [0, 1, 2])
def test_the_fastest_way_is_measured_once_and_taken(monkeypatch, favourite) -> None:
    timed: list[int] = []

    def timer(candidate) -> float:
        candidate()
        timed.append(len(timed))
        return float(timed[-1] != favourite)

    monkeypatch.setattr(op, "measured", Measured(timer=timer))
    monkeypatch.setattr(op, "can_use_linear_geglu", lambda *_: (True, ""))
    launched = count_launches(monkeypatch)
    x, weight, bias = layer(70, 32, 24, torch.bfloat16)
    compare(linear_geglu, linear_geglu_reference, x, weight, bias)
    taken = "geglu" if favourite == 2 else "linear_geglu"
    assert timed == [0, 1, 2] and launched == ["linear_geglu", "linear_geglu", "geglu", taken]
    (name,) = [choice.name for choice in op.measured.choices().values()]
    assert (name == op.SEPARATE) == (favourite == 2)
    linear_geglu(x, weight, bias)
    assert len(timed) == 3
    linear_geglu(x[:5], weight, bias)  # another shape
    linear_geglu(x, weight)
    assert len(timed) == 9 and len(op.measured.choices()) == 3


def test_without_measuring_the_kernel_runs(monkeypatch) -> None:
    monkeypatch.setattr(op, "measured", Measured(may_measure=lambda: False))
    monkeypatch.setattr(op, "can_use_linear_geglu", lambda *_: (True, ""))
    launched = count_launches(monkeypatch)
    compare(linear_geglu, linear_geglu_reference, *layer(9, 32, 24, torch.float32))
    assert launched == ["linear_geglu"] and op.measured.choices() == {}


def count_launches(monkeypatch) -> list[str]:
    launched, launch = [], triton_ops.launch

    def counting(kernel, *args, **meta):
        launched.append(kernel.__name__)
        launch(kernel, *args, **meta)

    monkeypatch.setattr(triton_ops, "launch", counting)
    return launched


def test_tiles_fill_the_device_and_fit_in_shared_memory() -> None:
    for shared in (kernels.HOPPER_SHARED, kernels.A100_SHARED, 101376):
        for itemsize, aligned in ((2, True), (2, False), (4, True)):
            for m in (1, 77, 128, 512, 2048, 8192, 10**6):
                for n in (8, 1280, 5120):
                    ranked = kernels.ranked(m, n, itemsize, aligned, 132, shared)
                    assert ranked[0] == kernels.select(m, n, itemsize, aligned, 132, shared)
                    for tile in ranked:
                        stage = (tile.block_m + 2 * tile.block_n) * tile.block_k * itemsize
                        assert 2 <= tile.num_stages <= 4 and stage * tile.num_stages <= shared
                        assert tile.block_m * 2 * tile.block_n <= 128 * tile.num_warps * 32  # accumulators of a thread
    assert kernels.select(8192, 2560, 2, True, 132)[:2] == (128, 128)
    for m, n in ((512, 5120), (128, 5120)):  # few rows: smaller tiles, more programs
        tile = kernels.select(m, n, 2, True, 132)
        assert tile.block_m * tile.block_n < 128 * 128


def test_columns_are_covered_with_little_waste() -> None:
    for n in (1, 100, 320, 1280, 2560, 5120, 13824):
        block = kernels.select_pointwise(n)
        assert block.block_r * block.block_n == 2048
        assert -(-n // block.block_n) * block.block_n - n < 128 and n % block.block_n < block.block_n


@pytest.mark.gpu
@pytest.mark.parametrize("m, k, n", kernels.SHAPES)
def test_on_a_device(m, k, n) -> None:
    with torch.no_grad():
        compare(linear_geglu, linear_geglu_reference, *layer(m, k, n, torch.bfloat16))
        compare(geglu, geglu_reference, make(m, 2 * n, dtype=torch.bfloat16))


@pytest.mark.gpu
def test_compiled_on_a_device() -> None:
    x, weight, bias = layer(256, 320, 640, torch.bfloat16)
    with torch.no_grad():
        compare(torch.compile(linear_geglu, fullgraph=True), linear_geglu_reference, x, weight, bias)
