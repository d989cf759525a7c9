"""RMSNorm's kernels under Triton's interpreter, beside their references in float64 and beside diffusers' layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pydiff.ops import native
from pydiff.ops import rms_norm as op
from pydiff.ops.rms_norm import (
    qk_norm_rotary,
    qk_norm_rotary_kernel,
    qk_norm_rotary_reference,
    rms_norm,
    rms_norm_kernel,
    rms_norm_reference,
)
from tests.ops.interpreted import DEVICE, DTYPES, Operators, assert_close, compare, make

pytest.importorskip("triton")


def check_norm(*args, **options) -> None:
    compare(rms_norm_kernel, rms_norm_reference, *args, **options)


def check(*args, **options) -> None:
    compare(qk_norm_rotary_kernel, qk_norm_rotary_reference, *args, **options)


def fused(batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Views of the queries and keys in one fused projection."""
    q, k, _ = make(batch, tokens, 3 * heads * dim, dtype=dtype, seed=seed).chunk(3, -1)
    return q.unflatten(-1, (heads, dim)), k.unflatten(-1, (heads, dim))


def rotation(tokens: int, dim: int, interleaved: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [tokens, dim] as diffusers makes them."""
    angles = torch.outer(torch.arange(tokens).float(), 100 ** -(torch.arange(0, dim, 2) / dim))
    tables = (angles.cos().to(DEVICE), angles.sin().to(DEVICE))
    if interleaved:
        return tuple(t.repeat_interleave(2, 1) for t in tables)
    return tuple(torch.cat([t, t], 1) for t in tables)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 64), (5, 97), (1, 2, 3, 128), (2, 1152), (7,), (1, 12288)])
def test_norm(shape, dtype):
    check_norm(make(*shape, dtype=dtype), make(shape[-1], dtype=dtype, seed=1))
    check_norm(make(*shape, dtype=dtype, mean=1000.0), None, 1e-5)
    check_norm(1e-4 * make(*shape, dtype=dtype), make(shape[-1], seed=1), 1e-6)
    check_norm(torch.zeros(shape, dtype=dtype, device=DEVICE), make(shape[-1], dtype=dtype))


def test_rows_in_a_program_and_inputs_that_are_not_contiguous(monkeypatch):
    from pydiff.kernels import rms_norm as kernels

    check_norm(make(2, 3, 80)[..., ::2], make(80)[::2])
    check_norm(make(6, 40).t())
    check_norm(make(3, 90)[:, :50])
    config = kernels.select(1, 50, 1)._replace(rows=4)
    monkeypatch.setattr(kernels, "select", lambda *_: config)
    check_norm(make(7, 50), make(50))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dim, heads", [(64, 3), (128, 2), (72, 4), (40, 1), (2, 5)])
def test_queries_and_keys(dim, heads, interleaved, dtype):
    q, k = fused(2, 3, heads, dim, dtype)
    weights = make(dim, dtype=dtype, seed=1), make(dim, dtype=dtype, seed=2)
    cos, sin = rotation(3, dim, interleaved)
    check(q, k, *weights, cos, sin, interleaved=interleaved)
    check(q, k, None, None, cos, sin, interleaved=interleaved)
    check(q, k, *weights, eps=1e-5)


def test_fewer_key_heads_and_a_rotation_for_each_row():
    q, k = make(3, 2, 5, 16), make(3, 2, 2, 16, seed=1)
    cos, sin = make(3, 2, 16, seed=2), make(3, 2, 16, seed=3)
    check(q, k, make(16), make(16, seed=4), cos, sin)
    check(k, q, None, None, cos, sin, interleaved=False)
    check(q, k, None, None, cos[:1], sin[:1])
    check(q, k, None, None, cos[0], sin.transpose(1, 2).contiguous().transpose(1, 2)[0])


def test_several_programs_for_the_heads(monkeypatch):
    from pydiff.kernels import rms_norm as kernels

    monkeypatch.setattr(kernels, "select_heads", lambda *_: kernels.HeadBlock(2, 16, 1))
    check(make(1, 2, 5, 32), make(1, 2, 3, 32, seed=1), make(32), make(32), *rotation(2, 32))


def test_inputs_that_are_not_contiguous():
    q, k = make(2, 3, 4, 16).permute(0, 2, 1, 3), make(2, 4, 3, 16, seed=1)[..., ::2]
    check(q[..., :8], k, make(16)[::2], make(8), *rotation(4, 8))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 80), st.sampled_from(DTYPES), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape(batch, tokens, heads, half, dtype, interleaved, seed):
    q, k = fused(batch, tokens, heads, 2 * half, dtype, seed)
    weights = make(2 * half, dtype=dtype, seed=seed), make(2 * half, dtype=dtype, seed=seed + 1)
    check(q, k, *weights, *rotation(tokens, 2 * half, interleaved), interleaved=interleaved, ulps=2)


@pytest.mark.parametrize("broken", [{"eps": 1e-2}, {"interleaved": False}])
def test_a_wrong_result_is_noticed(broken):
    q, k = fused(1, 3, 2, 32, torch.bfloat16)
    options = {"eps": 1e-6, "interleaved": True}
    weight = make(32, dtype=torch.bfloat16)
    check(0.1 * q, 0.1 * k, weight, weight, *rotation(3, 32), **options)
    with pytest.raises(AssertionError, match="error"):
        check(0.1 * q, 0.1 * k, weight, weight, *rotation(3, 32), **options, broken=broken)
    with pytest.raises(AssertionError, match="error"):
        assert_close(rms_norm_kernel(q), rms_norm_reference(q.double(), weight.double()), rms_norm_reference(q, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_it_is_diffusers_norm_and_rotation(interleaved, dtype):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    normalization = pytest.importorskip("diffusers.models.normalization")
    q, k = fused(2, 5, 3, 64, dtype)
    options = {"repeat_interleave_real": True} if interleaved else {"repeat_interleave_real": False}
    cos, sin = embeddings.get_1d_rotary_pos_embed(64, torch.arange(5, device=DEVICE), use_real=True, **options)
    norm = normalization.RMSNorm(64, eps=1e-6).to(DEVICE, dtype)
    norm.weight.data.copy_(make(64, seed=1))
    unbind = -1 if interleaved else -2
    expected = [
        embeddings.apply_rotary_emb(norm(x), (cos, sin), use_real_unbind_dim=unbind, sequence_dim=1) for x in (q, k)
    ]
    arguments = (q, k, norm.weight, norm.weight, cos, sin)
    with torch.no_grad():
        exact = qk_norm_rotary_reference(*(t.double() for t in arguments), interleaved=interleaved)
        for function in (qk_norm_rotary, qk_norm_rotary_kernel):
            for results in zip(function(*arguments, interleaved=interleaved), exact, expected):
                assert_close(*results)
        assert_close(rms_norm_kernel(q, norm.weight), rms_norm(q.double(), norm.weight.double()), norm(q))
        if DEVICE == "cpu":
            assert torch.equal(rms_norm(q, norm.weight), norm(q))


def test_bad_input():
    q, k = fused(1, 3, 2, 8)
    w, cos = make(8), make(3, 8)
    for arguments, words in (
        ((q, k[:, :2], w, w), r"q has shape \(1, 3, 2, 8\) and k \(1, 2, 2, 8\)"),
        ((q[0], k[0], w, w), "give "),
        ((q, k.double(), w, w), "give one dtype"),
        ((q[..., :7], k[..., :7], w, w), "heads have 7 elements"),
        ((q, k, w), "both of q_weight and k_weight"),
        ((q, k, w, w, cos), "both of q_weight and k_weight or neither, and so with cos"),
        ((q, k), "nothing to do"),
        ((q, k, w, make(7)), r"k_weight has shape \(7,\)"),
        ((q, k, w, w, make(4, 8), make(4, 8)), r"cos has shape \(4, 8\); give \(3, 8\)"),
        ((q, k, w, w, cos, make(2, 3, 8)), "sin has shape"),
    ):
        with pytest.raises(ValueError, match=words):
            qk_norm_rotary(*arguments)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\)"):
        rms_norm(q, make(7))


def test_gradients_and_float64_take_the_reference():
    q, k = (make(1, 2, 2, 4, seed=seed).double().requires_grad_() for seed in range(2))
    weight = make(4).double().requires_grad_()
    for interleaved in (True, False):
        tables = rotation(2, 4, interleaved)
        assert torch.autograd.gradcheck(
            lambda q, k, w, t=tables, i=interleaved: qk_norm_rotary(q, k, w, w, *t, interleaved=i), (q, k, weight)
        )
    assert torch.autograd.gradcheck(rms_norm, (q, weight))
    assert rms_norm(torch.zeros(0, 8)).shape == (0, 8)


def test_fake_cuda_tensors_see_one_operator(launches):  # noqa: F811
    with FakeTensorMode(), torch.no_grad(), Operators() as seen:
        q, k, _ = torch.empty(2, 3, 96, device="cuda", dtype=torch.bfloat16).chunk(3, -1)
        weight, cos = torch.empty(8, device="cuda"), torch.empty(3, 8, device="cuda")
        results = qk_norm_rotary(q.unflatten(-1, (4, 8)), k.unflatten(-1, (4, 8)), weight, weight, cos, cos)
        y = rms_norm(results[0], weight)
    assert seen.names == ["pydiff::qk_norm_rotary", "pydiff::rms_norm"]
    assert len(launches) == op.qk_norm_rotary_launches() + op.rms_norm_launches()
    for result in (*results, y):
        assert (result.shape, result.stride(), result.dtype) == ((2, 3, 4, 8), (96, 32, 8, 1), torch.bfloat16)


def test_what_the_kernels_refuse(monkeypatch):
    with FakeTensorMode():
        q, long = torch.empty(1, 2, 3, 8, device="cuda"), torch.empty(1, 1, 1, 1026, device="cuda")
        assert op.can_use_qk_norm_rotary(q, q, None) == op.can_use_rms_norm(q) == (True, "")
        assert "1024" in op.can_use_qk_norm_rotary(long, long)[1]
        assert "keys are empty" in op.can_use_qk_norm_rotary(q, torch.empty(1, 2, 0, 8, device="cuda"))[1]
        assert "16384" in op.can_use_rms_norm(torch.empty(1, 16385, device="cuda"))[1]
        monkeypatch.setattr(native, "disabled", frozenset({"rms_norm", "qk_norm_rotary"}))
        assert "PYDIFF_DISABLE" in op.can_use_rms_norm(q)[1] and "PYDIFF_DISABLE" in op.can_use_qk_norm_rotary(q, q)[1]
    assert "CUDA" in op.can_use_rms_norm(make(1, 8))[1]


def test_programs_take_all_heads_within_their_registers():
    from pydiff.kernels import rms_norm as kernels

    assert (kernels.MAX_CHANNELS, kernels.MAX_HEAD_DIM) == (op.MAX_CHANNELS, op.MAX_HEAD_DIM)
    for heads in (1, 24, 38, 64):
        for dim in (2, 40, 64, 72, 128, 1024):
            config = kernels.select_heads(heads, dim)
            assert dim <= 2 * config.half < 2 * dim and config.heads * 2 * config.half <= 4096
            assert config.heads * 2 * config.half <= 32 * 32 * config.num_warps
