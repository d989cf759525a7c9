"""diffusers' Stable Diffusion 3 and 3.5 transformers under `optimize`, their configurations at reduced width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pydiff
from pydiff.optimize.diffusers import transformers as parts
from pydiff.optimize.hoisting import HoistedModel
from pydiff.optimize.swap import Fused
from tests.optimize import checks
from tests.optimize.diffusers.test_dit import with_adapters

diffusers = pytest.importorskip("diffusers")
processors = pytest.importorskip("diffusers.models.attention_processor")
normalization = pytest.importorskip("diffusers.models.normalization")

COMMON = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=20,
    pos_embed_max_size=8,
)


def sd3() -> nn.Module:
    """Stable Diffusion 3's layout: no norms of the heads; the last block has no text of its own."""
    return diffusers.SD3Transformer2DModel(**COMMON)


def sd35() -> nn.Module:
    """3.5 Medium's: RMSNorm of the heads, a second attention in the first block."""
    return diffusers.SD3Transformer2DModel(**COMMON, dual_attention_layers=(0,), qk_norm="rms_norm")


MODELS = {"sd3": sd3, "sd35": sd35}


def condition(rows: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    make = torch.Generator().manual_seed(7)
    return {
        "encoder_hidden_states": torch.randn(rows, 5, 12, generator=make).to(dtype),
        "pooled_projections": torch.randn(rows, 20, generator=make).to(dtype),
    }


def image(dtype: torch.dtype = torch.float32, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(3)).to(dtype)


def call(model: nn.Module, dtype: torch.dtype = torch.float32, size: tuple[int, int] = (8, 8), **extra: Any):
    return model(image(dtype, size), timestep=torch.tensor([500.0, 3.0]), **condition(dtype=dtype), **extra).sample


@pytest.fixture(params=MODELS)
def make(request: pytest.FixtureRequest):
    return MODELS[request.param]


def test_close(make) -> None:
    checks.assert_close_in_float32(make, call)


@pytest.mark.parametrize("size", [(4, 8), (6, 2)])
def test_other_sizes(make, size: tuple[int, int]) -> None:
    checks.assert_close_in_float32(make, lambda model: call(model, size=size))


def test_low_precision(make) -> None:
    checks.assert_low_precision_error(make, call)


def test_restored(make) -> None:
    checks.assert_restored(make, call)


def test_copies(make) -> None:
    checks.assert_copies(make, call)


def test_compiles(make) -> None:
    checks.assert_compiles(make, call)


def test_follows_weights() -> None:
    names = [
        f"transformer_blocks.0.{layer}.weight"
        for layer in (
            "attn.to_q",
            "attn.to_v",
            "attn.add_k_proj",
            "attn.to_add_out",
            "attn.norm_q",
            "attn.norm_added_k",
            "attn2.to_k",
            "norm1.linear",
            "norm1_context.linear",
            "ff.net.0.proj",
            "ff_context.net.2",
        )
    ]
    checks.assert_follows_weights(sd35, call, [*names, "norm_out.linear.bias", "context_embedder.weight"])
    checks.assert_follows_weights(
        sd3, call, ["transformer_blocks.1.attn.to_q.bias", "transformer_blocks.1.attn.add_v_proj.bias"]
    )


def test_hooks_fire(make) -> None:
    kinds = (nn.LayerNorm, nn.Conv2d, nn.Linear, nn.SiLU, normalization.RMSNorm, nn.Dropout)
    checks.assert_hooks_fire(make, call, kinds)


@pytest.mark.parametrize("hooked", [(), ("attn.to_k",), ("norm_q",), ("norm1", "norm2"), ("attn",)])
def test_pre_hooks_fire(make, hooked: tuple[str, ...]) -> None:
    """Hooks on all modules, or on some that makes their neighbours' fused form run beside them."""
    seen: list[list[str]] = [[], []]
    for k, model in enumerate((checks.seeded(make), pydiff.optimize(checks.seeded(make)))):
        for name, module in model.named_modules():
            if not hooked or name.endswith(hooked):
                module.register_forward_pre_hook(lambda m, args, name=name, k=k: seen[k].append(name))
        seen[k].append(str(call(model).shape))
    assert seen[0] == seen[1]


def test_training_and_gradients(make) -> None:
    checks.assert_reference_path(make, call)


@pytest.mark.parametrize("rows", [1, 2])
def test_hoisting(make, rows: int) -> None:
    model, times = pydiff.optimize(checks.seeded(make)), torch.tensor([900.0, 400.0, 20.0])
    hoisted, x = HoistedModel(model, times, condition(rows), batch=rows), image()[:rows]
    expected = model(x, timestep=times[1:2].expand(rows), **condition(rows)).sample
    for module in [model.time_text_embed, model.context_embedder, *(b.norm1.linear for b in model.transformer_blocks)]:
        module.forward = None  # nothing of these may run in the loop
    for stages in ([1], [1] * rows):
        assert checks.relative(hoisted(x, torch.tensor(stages, dtype=torch.int32)), expected) < 2e-5
    assert checks.relative(hoisted(x, torch.tensor([2], dtype=torch.int32)), expected) > 1e-4


def test_hoisting_with_a_time_for_each_row() -> None:
    model, times = pydiff.optimize(checks.seeded(sd3)), torch.tensor([900.0, 400.0, 20.0])
    result = HoistedModel(model, times, condition(), batch=2)(image(), torch.tensor([2, 0], dtype=torch.int32))
    assert checks.relative(result, model(image(), timestep=times[[2, 0]], **condition()).sample) < 2e-5


def test_hoisting_bad_input() -> None:
    model, times = pydiff.optimize(checks.seeded(sd3)), torch.tensor([400.0])
    with pytest.raises(ValueError, match="no pooled_projections"):
        HoistedModel(model, times, {"encoder_hidden_states": torch.zeros(2, 5, 12)}, batch=2)
    with pytest.raises(ValueError, match="and not skip_layers"):
        HoistedModel(model, times, condition() | {"skip_layers": [1]}, batch=2)


def test_arguments_of_the_original(make) -> None:
    """What the model's forward takes besides: layers left out, a control network's residuals, LoRA's scale."""
    plain, fused = checks.seeded(make), pydiff.optimize(checks.seeded(make))
    expected = call(plain)
    for extra in ({"skip_layers": [1]}, {"block_controlnet_hidden_states": [image().reshape(2, 16, 16)]}):
        result = call(fused, **extra)
        assert checks.relative(result, call(plain, **extra)) < 2e-5 < checks.relative(result, expected)
    for extra in ({"joint_attention_kwargs": {"scale": 0.5}}, {"joint_attention_kwargs": {"unknown": 1}}):
        assert checks.relative(call(fused, **extra), expected) < 2e-5
    assert len(fused(image(), timestep=torch.tensor([1.0, 2.0]), **condition(), return_dict=False)) == 1
    fused.enable_forward_chunking(1, 1)
    assert checks.relative(call(fused), expected) < 2e-5


class Counting(processors.JointAttnProcessor2_0):
    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        Counting.calls += 1
        return super().__call__(*args, **kwargs)


def test_a_processor_set_later_is_used(make) -> None:
    model = pydiff.optimize(checks.seeded(make))
    expected, Counting.calls = call(model), 0
    model.set_attn_processor(Counting())
    assert checks.relative(call(model), expected) < 2e-5
    assert Counting.calls == len(model.attn_processors)


def test_projections_fused_by_diffusers() -> None:
    model = pydiff.optimize(checks.seeded(sd3))
    expected = call(model)
    model.fuse_qkv_projections()
    with torch.no_grad():
        assert checks.relative(call(model), expected) < 2e-5
    model.unfuse_qkv_projections()
    assert checks.relative(call(model), expected) < 2e-5


def test_adapters(make) -> None:
    checks.assert_close_in_float32(lambda: with_adapters(make()), call)
    hoisted = pydiff.optimize(checks.seeded(lambda: with_adapters(make())))
    expected = hoisted(image(), timestep=torch.tensor([400.0, 400.0]), **condition()).sample
    result = HoistedModel(hoisted, torch.tensor([400.0]), condition(), batch=2)(image(), torch.tensor([0]))
    assert checks.relative(result, expected) < 2e-5


def test_report(make) -> None:
    model = checks.seeded(make)
    assert all(isinstance(block.attn, Fused) for block in pydiff.optimize(model).transformer_blocks)
    pydiff.restore(model)
    model.transformer_blocks[0].attn.set_processor(Counting())
    model.transformer_blocks[1].set_chunk_feed_forward(1)
    _, report = pydiff.optimize(model, report=True)
    assert not any(isinstance(block.attn, Fused) for block in model.transformer_blocks)
    assert {entry.cls for entry in report.replaced} >= {
        "SD3Transformer2DModel",
        "JointTransformerBlock",
        "GELU",
        "AdaLayerNormZero",
        "AdaLayerNormContinuous",
    }
    left = {entry.name: entry.what for entry in report.left}
    assert "chunked" in left["transformer_blocks.1"] and "Counting" in left["transformer_blocks.0.attn"]


def test_fewer_operations(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q, K and V are one product a stream; adaptive norms, gates and residuals are four operations a stream."""
    counts = {"layer_norm": 0, "residual_add": 0, "qk_norm_rotary": 0, "linear": 0}

    def count(owner: Any, op: str) -> None:
        original = getattr(owner, op)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[op] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, op, counted)

    for op in ("layer_norm", "residual_add", "qk_norm_rotary"):
        count(parts, op)
    count(F, "linear")
    model = pydiff.optimize(checks.seeded(make))
    call(model)
    dual = sum(block.use_dual_attention for block in model.transformer_blocks)
    whole = len(model.transformer_blocks) - 1  # the last block has no text after its attention
    embeddings = 4 + 1 + 2  # time and pooled text; context; norm_out and proj_out
    assert counts["linear"] == embeddings + 10 * whole + 7 + 2 * dual
    assert counts["layer_norm"] == 4 * whole + 3 + dual + 1
    assert counts["residual_add"] == 2 * whole + 1 + dual
    assert counts["qk_norm_rotary"] == (0 if make is sd3 else 2 * whole + 2 + dual)
