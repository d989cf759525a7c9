"""The residual addition's kernel under Triton's interpreter, beside its reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pydiff.ops import native
from pydiff.ops import residual as op
from pydiff.ops.residual import residual_add, residual_add_kernel, residual_add_reference
from tests.ops.interpreted import DTYPES, Operators, compare, make

pytest.importorskip("triton")
NHWC = torch.channels_last


def check(*args, **options) -> None:
    compare(residual_add_kernel, residual_add_reference, *args, **options)


def image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, nhwc: bool = True) -> torch.Tensor:
    tensor = make(*shape, dtype=dtype, seed=seed)
    return tensor.contiguous(memory_format=NHWC) if nhwc else tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 5, 7), (1, 97, 3, 3), (3, 320, 2, 2), (5, 13, 1, 1)])
def test_images(shape, nhwc, dtype):
    x, residual = (image(*shape, dtype=dtype, seed=seed, nhwc=nhwc) for seed in (0, 1))
    bias, gate = make(shape[1], dtype=dtype, seed=2), make(*shape[:2], dtype=dtype, seed=3)
    for given_residual in (residual, None):
        check(x, given_residual, bias=bias, gate=gate, scale=0.7)
    check(x, residual, bias=bias)
    check(x, residual, scale=1 / 2**0.5)
    check(x, residual, gate=gate[..., None, None])
    assert residual_add_kernel(x, residual).stride() == residual_add(x, residual).stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 320), (4, 5, 31), (1, 7, 1152), (3, 8)])
def test_tokens(shape, dtype):
    x, residual = (make(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
    bias = make(shape[-1], dtype=dtype, seed=2)
    gate = make(shape[0], 3 * shape[-1], dtype=dtype, seed=3).chunk(3, 1)[1]
    check(x, residual, bias=bias, gate=gate, scale=0.3, channel_dim=-1)
    check(x, None, bias=bias, channel_dim=-1)
    check(x, residual, gate=gate[:1] if len(shape) == 2 else gate[:, None], channel_dim=-1)


@pytest.mark.parametrize("x_nhwc", [False, True])
def test_the_layout_is_that_of_x(x_nhwc):
    x, residual = image(2, 6, 3, 5, nhwc=x_nhwc), image(2, 6, 3, 5, seed=1, nhwc=not x_nhwc)
    bias = make(12, seed=2)[::2]
    check(x, residual, bias=bias)
    for function in (residual_add_kernel, residual_add_reference):
        assert function(x, residual, bias=bias).stride() == x.stride()
    odd = make(2, 6, 4, 8)[..., 1::2]
    check(odd, residual=odd.flip(0), bias=bias, gate=make(6, 2).t())
    assert residual_add_kernel(odd).is_contiguous() and residual_add_reference(odd).is_contiguous()


@pytest.mark.parametrize("channels_first", [False, True])
def test_other_numbers_of_dimensions(channels_first):
    video = make(2, 6, 3, 2, 2)
    check(video if channels_first else video.contiguous(memory_format=torch.channels_last_3d), video, bias=make(6))
    sound = make(2, 6, 9) if channels_first else make(2, 9, 6).transpose(1, 2)
    check(sound, sound.flip(1), bias=make(6), gate=make(2, 6))
    assert residual_add_kernel(sound, bias=make(6)).stride() == sound.stride()


@pytest.mark.parametrize("config", [(1, 16, 1), (4, 16, 4), (16, 64, 2)])
@pytest.mark.parametrize("nhwc", [False, True])
def test_blocks_that_do_not_divide_the_matrix(monkeypatch, config, nhwc):
    from pydiff.kernels import residual as kernels

    monkeypatch.setattr(kernels, "select", lambda *_: kernels.MatrixBlock(*config))
    x, residual = image(2, 21, 5, 5, nhwc=nhwc), image(2, 21, 5, 5, seed=1, nhwc=nhwc)
    check(x, residual, bias=make(21, seed=2), gate=make(2, 21, seed=3), scale=2.0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 5), st.integers(1, 70), st.integers(1, 40), st.sampled_from(DTYPES), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape(batch, channels, pixels, dtype, nhwc, seed):
    x, residual = (image(batch, channels, pixels, 1, dtype=dtype, seed=seed + i, nhwc=nhwc) for i in range(2))
    bias, gate = make(channels, dtype=dtype, seed=seed), make(batch, channels, dtype=dtype, seed=seed + 2)
    check(x, residual, bias=bias, gate=gate, scale=1 + seed, ulps=2)


def test_a_large_mean_and_parameters_of_another_dtype():
    x = image(2, 32, 4, 4, dtype=torch.bfloat16) + 1000
    check(x, x.flip(0), bias=make(32), gate=make(2, 32, seed=1))


@pytest.mark.parametrize("broken", [{"bias": None}, {"gate": None}, {"scale": 0.95}, {"gate": make(2, 8).flip(0)}])
def test_a_wrong_result_is_noticed(broken):
    options = {"bias": make(8, seed=2), "gate": make(2, 8), "scale": 1.0}
    options = {name: value.bfloat16() if name != "scale" else value for name, value in options.items()}
    x, residual = (image(2, 8, 3, 3, dtype=torch.bfloat16, seed=seed) for seed in (3, 4))
    check(x, residual, **options)
    with pytest.raises(AssertionError, match="error"):
        check(x, residual, **options, broken=broken)


def test_bad_input():
    x = make(2, 8, 3, 4)
    for arguments, words in (
        ({"residual": x[:1]}, r"residual is torch.float32 \(1, 8, 3, 4\)"),
        ({"residual": x.half()}, "residual is torch.float16"),
        ({"bias": make(4)}, r"bias has shape \(4,\)"),
        ({"gate": make(2, 4)}, "gate has shape"),
        ({"gate": make(3, 8)}, "gate has shape"),
        ({"gate": x}, "gate has shape"),
        ({"gate": make(8)}, "gate has shape"),
        ({"channel_dim": 2}, "channel_dim is 2"),
    ):
        with pytest.raises(ValueError, match=words):
            residual_add(x, **arguments)


def test_gradients_and_float64_take_the_reference():
    x, residual = (make(2, 3, 2, 2, seed=seed).double().requires_grad_() for seed in range(2))
    bias, gate = make(3).double().requires_grad_(), make(2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, r, b, g: residual_add(x, r, bias=b, gate=g, scale=0.5), (x, residual, bias, gate)
    )
    alone = residual_add(x.detach())
    assert alone.data_ptr() != x.data_ptr() and torch.equal(alone, x)
    assert residual_add(torch.zeros(0, 3, 8)).shape == (0, 3, 8)


@pytest.mark.parametrize("layout", [torch.contiguous_format, NHWC])
def test_fake_cuda_tensors_see_one_operator(layout, launches):  # noqa: F811
    with FakeTensorMode(), torch.no_grad(), Operators() as seen:
        x = torch.empty(2, 6, 3, 5, device="cuda", dtype=torch.bfloat16, memory_format=layout)
        y = residual_add(x, x, bias=torch.empty(6, device="cuda"), gate=torch.empty(2, 6, device="cuda"), scale=0.5)
    assert seen.names == ["pydiff::residual_add"] and len(launches) == op.residual_add_launches()
    assert (y.shape, y.stride(), y.dtype, y.device.type) == (x.shape, x.stride(), x.dtype, "cuda")


def test_what_the_kernel_refuses(monkeypatch):
    with FakeTensorMode():
        x = torch.empty(1, 2, 8, device="cuda")
        assert op.can_use_residual_add(x, x, None) == (True, "")
        assert "gradients" in op.can_use_residual_add(x, torch.empty(1, 2, 8, device="cuda", requires_grad=True))[1]
        monkeypatch.setattr(native, "disabled", frozenset({"residual_add"}))
        assert "PYDIFF_DISABLE" in op.can_use_residual_add(x)[1]
    assert "CUDA" in op.can_use_residual_add(make(1, 2, 8))[1]
