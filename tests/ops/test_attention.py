"""Attention: the Triton kernels against float64, what the function promises of memory, masks and bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pydiff.check.fake_cuda import fake_mode
from pydiff.ops import attention as op
from pydiff.ops.attention import attention, attention_kernel, attention_launches, attention_reference
from pydiff.ops.attention.kernel import suits
from tests.ops.interpreted import DEVICE, DTYPES, Operators, assert_close, make

kernels = pytest.importorskip("pydiff.kernels.attention")
HALF = (torch.bfloat16, torch.float16)
MODEL_DIMS = (40, 64, 80, 96, 128, 160)


def projections(b: int, h: int, lq: int, lk: int, d: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0):
    """q, k and v as a model has them: [B, L, H, D] in memory."""
    shapes = ((b, lq, h, d), (b, lk, h, d), (b, lk, h, d))
    return [make(*s, dtype=dtype, scale=scale, seed=3 * seed + i).transpose(1, 2) for i, s in enumerate(shapes)]


def exactly(q, k, v, mask=None, scale=None) -> torch.Tensor:
    """Attention in float64, without PyTorch's own."""
    q, k, v = (t.double() for t in (q, k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=-1e300))
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ v


def check(q, k, v, mask=None, scale=None, config=None) -> None:
    got = attention_kernel(q, k, v, mask, scale, config)
    assert_close(got, exactly(q, k, v, mask, scale), attention_reference(q, k, v, mask, scale))
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("d", [8, 16, 24, 32, 48, 56, *MODEL_DIMS, 192, 256])
def test_every_head_dimension_over_several_blocks_of_keys(d):
    check(*projections(1, 2, 19, 131, d, torch.float16 if d > 160 else torch.float32))


@pytest.mark.parametrize("d", MODEL_DIMS)
def test_the_text_of_a_prompt(d):
    check(*projections(2, 1, 37, 77, d, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lq, lk", [(1, 1), (67, 129), (64, 64), (33, 256)])
def test_odd_even_and_prime_lengths(dtype, lq, lk):
    check(*projections(1, 1, lq, lk, 40, dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_the_head_of_a_vae(dtype):
    check(*projections(1, 1, 35, 67, 512, dtype))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_batches_and_heads_are_kept_apart(batch):
    check(*projections(batch, 3, 5, 20, 24, torch.float32))


CONFIGS = [
    kernels.Config(32, 16, 4, 1), kernels.Config(128, 64, 8, 3), kernels.Config(64, 32, 4, 3, slices=2),
    kernels.Config(16, 0, 4, 2, repeat=3), kernels.Config(32, 0, 4, 2, repeat=1),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_configuration_computes_the_same(config, masked):
    q, k, v = projections(2, 1, 50, 77, 80, torch.float16)
    mask = make(2, 77) < 0.5
    mask[0, :20] = False
    check(q, k, v, mask if masked else None, config=config)


@pytest.mark.parametrize("lk", [45, 200])
def test_rows_without_any_key_are_zero(lk):
    q, k, v = projections(3, 1, 10, lk, 40, torch.float16)
    mask = make(3, lk) < 0.0
    mask[1], mask[2], mask[2, -1] = False, False, True
    check(q, k, v, mask)
    for function in (attention_kernel, attention_reference):
        out = function(q, k, v, mask)
        assert (out[1] == 0).all()
        torch.testing.assert_close(out[2], v[2, :, -1:].expand_as(out[2]))


def test_a_mask_that_all_rows_share():
    q, k, v = projections(3, 1, 9, 30, 16, torch.float32)
    mask = make(1, 30) < 0.3
    torch.testing.assert_close(attention_kernel(q, k, v, mask), exactly(q, k, v, mask.expand(3, 30)).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [30.0, 1e-3])
def test_large_and_small_logits(dtype, scale):
    check(*projections(1, 1, 30, 150, 40, dtype, scale=scale))


def test_rows_of_equal_logits_average_and_a_mean_of_a_thousand_is_kept():
    q, k, v = projections(1, 1, 20, 139, 40, torch.float32)
    k = torch.ones_like(k)
    check(q, k, v + 1000)


def test_the_scale():
    check(*projections(1, 1, 20, 40, 32, torch.float32), scale=0.5)


def test_views_of_fused_projections_and_of_hoisted_text():
    b, h, n, d = 2, 2, 21, 40
    fused = make(b, n, 3 * h * d, dtype=torch.float16).view(b, n, 3, h, d)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    assert q.stride(2) == 3 * h * d
    check(q, k, v)
    check(q.contiguous(), k, v.contiguous())
    hoisted = make(b, 77, 7 * 2 * h * d, dtype=torch.float16).view(b, 77, 7, 2, h, d)
    check(q, hoisted[:, :, 4, 0].transpose(1, 2), hoisted[:, :, 4, 1].transpose(1, 2))


def test_keys_that_all_rows_of_a_batch_share():
    q, _, _ = projections(3, 2, 9, 20, 16, torch.float32)
    _, k, v = projections(1, 2, 9, 20, 16, torch.float32, seed=1)
    expected = attention_kernel(q, k.repeat(3, 1, 1, 1), v.repeat(3, 1, 1, 1))
    assert torch.equal(attention_kernel(q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)), expected)
    torch.testing.assert_close(attention(q, k, v), expected)


@settings(max_examples=12, deadline=None)
@given(lq=st.integers(1, 40), lk=st.integers(1, 180), d=st.sampled_from((8, 40, 48)), seed=st.integers(0, 99))
def test_any_small_shape(lq, lk, d, seed):
    check(*projections(1, 1, lq, lk, d, torch.float16, seed=seed))


@pytest.mark.parametrize("wrong", ["scale", "shifted keys", "mask"])
def test_the_check_sees_a_wrong_result(wrong):
    q, k, v = projections(1, 1, 20, 140, 40, torch.float16)
    exact, chain = exactly(q, k, v), attention_reference(q, k, v)
    mask = torch.ones(1, 140, dtype=torch.bool, device=q.device)
    mask[0, 139] = False
    got = {
        "scale": lambda: attention_kernel(q, k, v, None, 40**-0.5 * 1.05),
        "shifted keys": lambda: attention_kernel(q, k.roll(1, 2), v),
        "mask": lambda: attention_kernel(q, k, v, mask),
    }[wrong]()
    with pytest.raises(AssertionError, match="error"):
        assert_close(got, exact, chain)


def test_the_reference_has_gradients_works_in_float64_and_takes_general_masks():
    q, k, v = (t.double().requires_grad_() for t in projections(2, 2, 5, 7, 8, torch.float32))
    attention(q, k, v).square().sum().backward()
    assert q.grad is not None and k.grad.abs().sum() > 0
    allowed = make(1, 2, 5, 7) < 0.5
    allowed[0, 1, 3] = False
    bias = torch.zeros(1, 2, 5, 7, dtype=torch.float64, device=q.device).masked_fill(~allowed, -torch.inf)
    for mask in (allowed, bias):
        out = attention(q, k, v, mask=mask)
        assert (out[:, 1, 3] == 0).all() and out.isfinite().all() and out.transpose(1, 2).is_contiguous()
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_a_mask_of_keys_in_four_dimensions_is_one_in_two():
    q, k, v = projections(2, 2, 5, 7, 8, torch.float32)
    mask = make(2, 7) < 0.5
    assert torch.equal(attention(q, k, v, mask=mask), attention(q, k, v, mask=mask[:, None, None]))
    with fake_mode(), torch.no_grad():
        q, k, v = (torch.empty(2, 2, length, 8, device="cuda") for length in (5, 7, 7))
        keys = torch.empty(2, 1, 1, 7, device="cuda", dtype=torch.bool)
        for mask, operators in ((keys, ["pydiff::attention"]), (keys.float(), [])):  # which takes masks of keys alone
            with Operators() as seen:
                attention(q, k, v, mask=mask)
            assert seen.names == operators


def test_bad_input_names_argument_value_and_remedy():
    q, k, v = projections(2, 2, 5, 7, 8, torch.float32)
    bad = [
        (dict(q=q[0], k=k, v=v), "q is torch.float32 \\(2, 5, 8\\)"),
        (dict(q=q, k=k[:, :1], v=v), "k has shape \\(2, 1, 7, 8\\).*must be \\[2 or 1, 2, Lk, 8\\]"),
        (dict(q=q, k=k, v=v[:, :, :6]), "v has shape"),
        (dict(q=q, k=k.half(), v=v), "k is torch.float16.*convert"),
        (dict(q=q, k=k[:, :, :0], v=v[:, :, :0]), "one key at least"),
        (dict(q=q, k=k, v=v, mask=torch.ones(2, 7, device=q.device)), "mask is torch.float32 \\(2, 7\\)"),
        (dict(q=q, k=k, v=v, mask=torch.ones(5, 7, dtype=torch.bool, device=q.device)), "of keys, \\[2 or 1, 7\\]"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            attention(**arguments)


def test_why_the_kernel_refuses():
    q, k, v = projections(2, 2, 5, 7, 40, torch.float32)
    assert suits(q, k, v, None, None) == (True, "")
    wide = make(2, 2, 5, 41)[..., :40]
    refused = [
        (suits(q, k, v, None, 0.0), "scale=0.0"),
        (suits(wide, k, v, None, None), "q has strides"),
        (suits(q, k, v.transpose(2, 3).contiguous().transpose(2, 3), None, None), "last dimension of v"),
        (suits(q, k, v, (make(2, 14) < 0)[:, ::2], None), "mask"),
        (kernels.supports(20, 2), "multiple of 8"),
        (kernels.supports(264, 2), "neither 512"),
        (kernels.supports(512, 4), "float32"),
    ]
    for (usable, reason), part in refused:
        assert not usable and part in reason
    if DEVICE == "cpu":
        assert not op.can_use_attention(q, k, v)[0]


@pytest.mark.parametrize("d, lk, masked", [(40, 77, False), (80, 300, True)])
def test_fake_cuda_tensors_see_one_operator_and_the_promised_memory(d, lk, masked):
    with FakeTensorMode():
        q = torch.empty(2, 300, 8, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        k = torch.empty(2, lk, 8, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        mask = torch.empty(2, lk, device="cuda", dtype=torch.bool) if masked else None
        with torch.no_grad(), Operators() as seen:
            out = attention(q, k, k, mask=mask)
    assert seen.names == ["pydiff::attention"] and attention_launches() == 1
    assert out.shape == q.shape and out.dtype == q.dtype and out.device == q.device
    assert out.transpose(1, 2).is_contiguous()


def test_the_function_compiles_without_a_break():
    q, k, v = projections(2, 2, 5, 7, 8, torch.float32)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), attention(q, k, v))


def test_heads_are_cut_into_powers_of_two():
    cuts = {8: (16, 0), 24: (32, 0), 40: (32, 16), 56: (64, 0), 64: (64, 0), 77: (64, 16), 80: (64, 16), 160: (128, 32)}
    assert {d: kernels.chunks(d) for d in cuts} == cuts
    for size in range(1, 513):
        first, second = kernels.chunks(size)
        assert first & (first - 1) == 0 and second & (second - 1) == 0
        assert size <= first + second <= max(16, 2 * size) and second in range(first + 1)


def test_the_configuration_occupies_the_device():
    for b, h, lq, lk, d in kernels.SHAPES:
        config = kernels.select(b, h, lq, lk, d)
        assert config.repeat == 0 or lk <= kernels.SHORT_KEYS
        small = lq <= 256
        assert kernels.programs(config, b, h, lq) >= (64 if small else 120), (config, b, h, lq)


SPILLS = """
from pydiff.kernels.attention import compile_cases
from pydiff.kernels.resources import inspect_case
for case in compile_cases((arch // 10, arch % 10)):
    found = inspect_case("attention", case, arch)
    if found.spills or found.error or not found.blocks_per_sm:
        print(found)
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_what_an_architecture_selects_compiles_for_it_without_spilling(arch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-c", f"arch = {arch}{SPILLS}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("d", [*MODEL_DIMS, 512])
@pytest.mark.parametrize("lq, lk", [(129, 77), (127, 509), (131, 128)])
def test_longer_sequences(dtype, d, lq, lk):
    check(*projections(2, 2, lq, lk, d, dtype))


def test_autocast_converts_what_differs_in_dtype():
    q, k = make(1, 2, 5, 8), make(1, 2, 7, 8, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        assert attention(q, k, k).dtype == torch.bfloat16
