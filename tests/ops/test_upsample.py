"""Upsampling folded into its convolution, beside interpolate and conv2d in float64; where it pays and what it costs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pydiff.ops import native, triton_ops
from pydiff.ops import upsample as op
from pydiff.ops.measured import Measured
from pydiff.ops.upsample import upsample_conv2d, upsample_conv2d_kernel, upsample_conv2d_reference
from tests.ops.interpreted import DTYPES, Operators, compare, make

kernels = pytest.importorskip("pydiff.kernels.upsample")
LAST = torch.channels_last


def layer(n, c, o, h, w, dtype: torch.dtype = torch.float32, bias: bool = True, mean: float = 0.0):
    x = make(n, c, h, w, dtype=dtype, mean=mean)
    weight = make(o, c, 3, 3, dtype=dtype, scale=(9 * c) ** -0.5, seed=1)
    return x, weight, make(o, dtype=dtype, seed=2) if bias else None


def laid_out(x, weight, bias, layout):
    return x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), bias


def folded(weight: torch.Tensor) -> torch.Tensor:
    """The taps by definition: an impulse at each pixel of a 2x2 image, upsampled, under the 3x3 window."""
    taps = torch.zeros(4, *weight.shape[:2], 2, 2, dtype=weight.dtype)
    for a in (0, 1):
        for b in (0, 1):
            for i in (0, 1):
                for j in (0, 1):
                    rows = [k for k in range(3) if (a + k - 1) // 2 == a + i - 1]
                    columns = [k for k in range(3) if (b + k - 1) // 2 == b + j - 1]
                    taps[2 * a + b, :, :, i, j] = weight[:, :, rows][:, :, :, columns].sum((2, 3))
    return taps.flatten(0, 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 3, 5, 4, 3), (1, 5, 67, 1, 9), (3, 70, 2, 5, 1), (5, 8, 8, 3, 5)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel(shape, dtype, layout) -> None:
    for bias in (True, False):
        arguments = laid_out(*layer(*shape, dtype, bias), layout)
        compare(upsample_conv2d_kernel, upsample_conv2d_reference, *arguments)
        expected = upsample_conv2d_reference(*arguments)
        assert upsample_conv2d_kernel(*arguments).is_contiguous(memory_format=layout)
        assert expected.shape == (shape[0], shape[2], 2 * shape[3], 2 * shape[4])


def test_mixed_layouts_and_other_strides() -> None:
    x, weight, bias = layer(2, 6, 10, 5, 4)
    for first, second in ((x.to(memory_format=LAST), weight), (x, weight.to(memory_format=LAST))):
        compare(upsample_conv2d_kernel, upsample_conv2d_reference, first, second, bias)
        assert upsample_conv2d_kernel(first, second, bias).is_contiguous(memory_format=LAST)
    part = make(2, 12, 9, 8)[:, ::2, 2:7, ::2]
    compare(upsample_conv2d_kernel, upsample_conv2d_reference, part, weight.transpose(2, 3), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [1.0, 30.0, 1000.0])
def test_inputs_with_a_mean_and_constant_rows(mean, dtype) -> None:
    x, weight, bias = layer(1, 64, 32, 8, 8, dtype, mean=mean)
    compare(upsample_conv2d_kernel, upsample_conv2d_reference, x, weight, bias)
    compare(upsample_conv2d_kernel, upsample_conv2d_reference, torch.full_like(x, mean), weight, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_price_of_rounded_sums_is_what_the_contract_says(dtype) -> None:
    """Weights that cancel under a constant image: the chain errs by its small output, the folded way by its taps."""
    x, weight, _ = layer(1, 64, 32, 6, 6)
    x = torch.full_like(x, 8.0).to(dtype)
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)).to(dtype)
    within = (..., slice(2, -2), slice(2, -2))  # at the border windows are cut, and nothing cancels
    exact, got, chain = (
        way(*tensors).double()[within]
        for way, tensors in (
            (upsample_conv2d_reference, (x.double(), weight.double())),
            (upsample_conv2d_kernel, (x, weight)),
            (upsample_conv2d_reference, (x, weight)),
        )
    )
    unit = torch.finfo(dtype).eps / 2
    taps = 8.0 * folded(weight.double()).abs().sum((1, 2, 3)).max()
    error, allowed = (got - exact).abs().max(), (chain - exact).abs().max()
    assert 5 * allowed < error <= unit * (taps + got.abs().max()) + allowed


def test_wrong_taps_phases_or_bias_would_be_seen() -> None:
    x, weight, bias = layer(1, 16, 8, 6, 5, torch.bfloat16)
    for wrong in (
        lambda x, w, b: upsample_conv2d_kernel(x, w.transpose(2, 3), b),
        lambda x, w, b: upsample_conv2d_kernel(x, w, b).roll(1, 2),
        lambda x, w, b: upsample_conv2d_kernel(x, w, b.roll(1)),
        lambda x, w, b: upsample_conv2d_kernel(x, w.roll(1, 0), b),
    ):
        with pytest.raises(AssertionError, match="the chain's"):
            compare(wrong, upsample_conv2d_reference, x, weight, bias)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 3), c=st.integers(1, 20), o=st.integers(1, 20), h=st.integers(1, 7), w=st.integers(1, 7),
    dtype=st.sampled_from(DTYPES), last=st.booleans(),
)  # fmt: skip
def test_any_sizes(n, c, o, h, w, dtype, last) -> None:
    """Elementwise: in a small output the chain may be lucky, so that a multiple of its error is no bound here."""
    arguments = laid_out(*layer(n, c, o, h, w, dtype), LAST if last else torch.contiguous_format)
    got = upsample_conv2d_kernel(*arguments)
    exact, reach = (
        upsample_conv2d_reference(*(way(t.double()) for t in arguments)) for way in (lambda t: t, torch.abs)
    )
    chain = upsample_conv2d_reference(*arguments)
    assert got.dtype == chain.dtype and got.shape == chain.shape
    # Folded weights, the convolution (each within reach) and its sum with the bias are rounded to the dtype, which
    # Triton's interpreter does by truncation: eps, not half of it. Before that come, in float32, at most 3 additions of
    # taps, a product, and 4c + 1 more additions.
    bound = torch.finfo(dtype).eps * (2 * reach + exact.abs()) + torch.finfo(torch.float32).eps * (2 * c + 3) * reach
    assert ((got.double() - exact).abs() <= bound + (chain.double() - exact).abs().max()).all()


def test_weights_changed_in_place_count() -> None:
    x, weight, bias = layer(1, 8, 8, 4, 4)
    before = upsample_conv2d_kernel(x, weight, bias)
    weight.mul_(2)
    compare(upsample_conv2d_kernel, upsample_conv2d_reference, x, weight, bias)
    assert not torch.equal(before, upsample_conv2d_kernel(x, weight, bias))


def test_gradients_take_the_reference() -> None:
    x, weight, bias = (t.requires_grad_() for t in layer(1, 16, 16, 32, 32))
    grads = torch.autograd.grad(upsample_conv2d(x, weight, bias).square().sum(), (x, weight, bias))
    expected = torch.autograd.grad(upsample_conv2d_reference(x, weight, bias).square().sum(), (x, weight, bias))
    for grad, other in zip(grads, expected, strict=True):
        assert torch.equal(grad, other)


def test_bad_input() -> None:
    x, weight, bias = layer(1, 4, 6, 3, 3)
    for arguments, message in [
        ((x[0], weight), r"x has shape \(4, 3, 3\): give \[N, C, H, W\]"),
        ((x[:, :3], weight), r"weight has shape \(6, 4, 3, 3\): give \[O, 3, 3, 3\]"),
        ((x, weight[..., :2]), r"weight has shape \(6, 4, 3, 2\)"),
        ((x, weight, bias[:2]), r"bias has shape \(2,\): give \[6\]"),
        ((x, weight.double()), "weight is torch.float64: convert it to x's torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            upsample_conv2d(*arguments)


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, device="cuda", dtype=dtype)


@pytest.mark.parametrize("last", [True, False])
def test_fake_cuda_tensors_see_one_operator(last) -> None:
    with FakeTensorMode(), torch.no_grad(), Operators() as seen:
        x, weight, bias = fake(2, 640, 32, 32), fake(320, 640, 3, 3), fake(320)
        if last:
            x = x.to(memory_format=LAST)
        out, plain = upsample_conv2d(x, weight, bias), upsample_conv2d(x, weight)
        assert seen.names == ["pydiff::upsample_conv2d"] * 2
        upsample_conv2d(fake(2, 1280, 8, 8), fake(1280, 1280, 3, 3))
        assert len(seen.names) == 2, "too small to pay"
    for result in (out, plain):
        assert (result.shape, result.dtype, result.device.type) == ((2, 320, 64, 64), torch.bfloat16, "cuda")
        assert result.stride() == ((1310720, 1, 20480, 320) if last else (1310720, 4096, 64, 1))


def test_what_the_kernel_refuses(monkeypatch) -> None:
    with FakeTensorMode():
        x, weight, bias = fake(1, 8, 4, 4), fake(8, 8, 3, 3), fake(8)
        assert op.can_use_upsample_conv2d(x, weight, bias) == (True, "")
        sparse = torch.empty_strided((8,), (2,), device="cuda", dtype=torch.bfloat16)
        assert "dense" in op.can_use_upsample_conv2d(x, weight, sparse)[1]
        assert "gradients" in op.can_use_upsample_conv2d(x, fake(8, 8, 3, 3).requires_grad_())[1]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
            assert "autocast" in op.can_use_upsample_conv2d(x, weight)[1]
        monkeypatch.setattr(native, "disabled", frozenset({"upsample_conv2d"}))
        assert "PYDIFF_DISABLE" in op.can_use_upsample_conv2d(x, weight)[1]
    assert op.upsample_conv2d_launches() == 3


@pytest.mark.parametrize("faster", [0, 1])
def test_the_faster_way_is_measured_once_and_taken(monkeypatch, faster) -> None:
    timed, launched, launch = [], [], triton_ops.launch

    def timer(candidate) -> float:
        candidate()
        timed.append(len(timed))
        return float(timed[-1] != faster)

    def counting(kernel, *args, **meta):
        launched.append(kernel.__name__)
        launch(kernel, *args, **meta)

    monkeypatch.setattr(op, "measured", Measured(timer=timer))
    monkeypatch.setattr(op, "can_use_upsample_conv2d", lambda *_: (True, ""))
    monkeypatch.setattr(kernels, "pays", lambda *_: True)
    monkeypatch.setattr(triton_ops, "launch", counting)
    x, weight, bias = layer(1, 6, 4, 3, 5)
    for _ in range(2):
        compare(upsample_conv2d, upsample_conv2d_reference, x, weight, bias)
    assert timed == [0, 1] and launched == ["fold", "interleave"] * (1 + 2 * (faster == 0))
    assert [choice.name for choice in op.measured.choices().values()] == [("folded", "chain")[faster]]
    monkeypatch.setattr(kernels, "pays", lambda *_: False)
    del launched[:]
    upsample_conv2d(x, weight, bias)
    assert not launched


def test_where_folding_pays() -> None:
    assert not kernels.pays(2, 1280, 1280, 8, 8, 2)  # folding the weight costs more than so small an image saves
    for n, c, size in ((2, 1280, 16), (2, 640, 32), (2, 1280, 32), (2, 640, 64), (1, 512, 128), (1, 256, 512)):
        assert kernels.pays(n, c, c, size, size, 2) and kernels.pays(n, c, c, size, size, 2, bias=False)
    assert kernels.pays(16, 1280, 1280, 8, 8, 2)


def test_blocks_cover_channels_with_little_waste() -> None:
    for channels in (1, 64, 128, 256, 320, 512, 640, 1280):
        fold, tile = kernels.select_fold(channels), kernels.select_interleave(channels, True)
        assert -(-channels // fold.block_c) * fold.block_c - channels < 64 and fold.block_o * fold.block_c == 512
        assert -(-channels // tile.block_c) * tile.block_c - channels < 64 and tile.block_p * tile.block_c == 2048
    assert kernels.select_interleave(320, False).block_p >= 64


@pytest.mark.gpu
@pytest.mark.parametrize("n, c, size", [(2, 1280, 16), (2, 640, 64), (1, 256, 128)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_on_a_device(n, c, size, layout) -> None:
    with torch.no_grad():
        arguments = laid_out(*layer(n, c, c, size, size, torch.bfloat16), layout)
        compare(upsample_conv2d_kernel, upsample_conv2d_reference, *arguments)
        compare(upsample_conv2d, upsample_conv2d_reference, *arguments)
        compare(torch.compile(upsample_conv2d, fullgraph=True), upsample_conv2d_reference, *arguments)
