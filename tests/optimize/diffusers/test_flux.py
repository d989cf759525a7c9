"""diffusers' Flux transformer under `optimize`, its configurations at reduced width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pydiff
from pydiff.ops import layer_norm, residual, rms_norm
from pydiff.optimize.diffusers import transformers as parts
from pydiff.optimize.hoisting import HoistedModel
from pydiff.optimize.swap import Fused
from tests.optimize import checks
from tests.optimize.diffusers.test_dit import with_adapters

diffusers = pytest.importorskip("diffusers")
flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
dispatch = pytest.importorskip("diffusers.models.attention_dispatch")

COMMON = dict(
    in_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=20,
    axes_dims_rope=(2, 2, 4),
)


def schnell() -> nn.Module:
    return diffusers.FluxTransformer2DModel(**COMMON)


def dev() -> nn.Module:
    """The guidance-distilled one: the guidance scale is embedded with the time."""
    return diffusers.FluxTransformer2DModel(**COMMON, guidance_embeds=True)


def condition(guided: bool, rows: int = 2, dtype: torch.dtype = torch.float32, height: int = 3) -> dict[str, Any]:
    make = torch.Generator().manual_seed(7)
    ids = torch.zeros(height, 4, 3)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(4)
    cond = {
        "encoder_hidden_states": torch.randn(rows, 5, 12, generator=make).to(dtype),
        "pooled_projections": torch.randn(rows, 20, generator=make).to(dtype),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return cond | {"guidance": torch.linspace(2.0, 3.5, rows)} if guided else cond


def tokens(dtype: torch.dtype = torch.float32, height: int = 3) -> torch.Tensor:
    return torch.randn(2, 4 * height, 8, generator=torch.Generator().manual_seed(3)).to(dtype)


def call(model: Any, dtype: torch.dtype = torch.float32, height: int = 3, **extra: Any) -> torch.Tensor:
    cond = condition(model.config.guidance_embeds, dtype=dtype, height=height) | extra
    return model(tokens(dtype, height), timestep=torch.tensor([0.5, 0.03]), **cond).sample


@pytest.fixture(params=[schnell, dev])
def make(request: pytest.FixtureRequest):
    return request.param


def test_close(make) -> None:
    checks.assert_close_in_float32(make, call)


@pytest.mark.parametrize("height", [1, 5])
def test_other_sizes(height: int) -> None:
    checks.assert_close_in_float32(dev, lambda model: call(model, height=height))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    checks.assert_low_precision_error(dev, call, dtype, seeds=6)


def test_restored(make) -> None:
    checks.assert_restored(make, call)


def test_copies(make) -> None:
    checks.assert_copies(make, call)


def test_compiles() -> None:
    small = COMMON | {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    checks.assert_compiles(lambda: diffusers.FluxTransformer2DModel(**small), call)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a device")
def test_kernels_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels themselves, on hoisted columns and on views of packed products."""
    model, times, cond = pydiff.optimize(checks.seeded(dev)), torch.tensor([0.9, 0.4]), condition(True)
    expected = checks.seeded(dev)(tokens(), timestep=times, **cond).sample
    for module, op in ((layer_norm, "layer_norm"), (residual, "residual_add"), (rms_norm, "qk_norm_rotary")):
        monkeypatch.setattr(parts, op, getattr(module, f"{op}_kernel"))
    assert checks.relative(model(tokens(), timestep=times, **cond).sample, expected) < 2e-5
    result = HoistedModel(model, times, cond, batch=2)(tokens(), torch.tensor([0, 1]))
    assert checks.relative(result, expected) < 2e-5


def test_follows_weights() -> None:
    names = [
        f"transformer_blocks.0.{layer}.weight"
        for layer in (
            "attn.to_q",
            "attn.add_k_proj",
            "attn.to_add_out",
            "attn.norm_q",
            "attn.norm_added_k",
            "norm1.linear",
            "norm1_context.linear",
            "ff.net.0.proj",
            "ff_context.net.2",
        )
    ]
    names += [
        f"single_transformer_blocks.1.{layer}.weight"
        for layer in ("attn.to_v", "attn.norm_k", "norm.linear", "proj_mlp", "proj_out")
    ]
    checks.assert_follows_weights(dev, call, [*names, "norm_out.linear.bias", "context_embedder.weight"])


def test_hooks_fire(make) -> None:
    checks.assert_hooks_fire(make, call, (nn.LayerNorm, nn.Linear, nn.SiLU, nn.RMSNorm, nn.GELU, nn.Dropout))


@pytest.mark.parametrize(
    "hooked",
    [
        (),
        ("attn.to_k",),
        ("norm_q",),
        ("norm", "norm2"),
        ("attn",),
        ("single_transformer_blocks.0",),
        ("act_mlp",),
        ("proj_out",),
    ],
)
def test_pre_hooks_fire(hooked: tuple[str, ...]) -> None:
    """Hooks on all modules, or on some that makes their neighbours' fused form run beside them."""
    seen: list[list[str]] = [[], []]
    for k, model in enumerate((checks.seeded(dev), pydiff.optimize(checks.seeded(dev)))):
        for name, module in model.named_modules():
            if not hooked or name.endswith(hooked):
                module.register_forward_pre_hook(lambda m, args, name=name, k=k: seen[k].append(name))
        seen[k].append(str(call(model).shape))
    assert seen[0] == seen[1]


def test_training_and_gradients(make) -> None:
    checks.assert_reference_path(make, call)


@pytest.mark.parametrize("rows", [1, 2])
def test_hoisting(make, rows: int) -> None:
    model, times = pydiff.optimize(checks.seeded(make)), torch.tensor([0.9, 0.4, 0.1])
    cond, x = condition(make is dev, rows), tokens()[:rows]
    hoisted = HoistedModel(model, times, cond, batch=rows)
    expected = model(x, timestep=times[1:2].expand(rows), **cond).sample
    for module in [
        model.time_text_embed,
        model.context_embedder,
        model.pos_embed,
        model.norm_out.linear,
        *(b.norm1.linear for b in model.transformer_blocks),
        *(b.norm.linear for b in model.single_transformer_blocks),
    ]:
        module.forward = None  # nothing of these may run in the loop
    for stages in ([1], [1] * rows):
        assert checks.relative(hoisted(x, torch.tensor(stages, dtype=torch.int32)), expected) < 2e-5
    assert checks.relative(hoisted(x, torch.tensor([2], dtype=torch.int32)), expected) > 1e-4


def test_hoisting_with_a_time_for_each_row_and_ids_of_old() -> None:
    model, times, cond = pydiff.optimize(checks.seeded(dev)), torch.tensor([0.9, 0.4, 0.1]), condition(True)
    old = cond | {name: cond[name][None] for name in ("img_ids", "txt_ids")}
    result = HoistedModel(model, times, old, batch=2)(tokens(), torch.tensor([2, 0], dtype=torch.int32))
    assert checks.relative(result, model(tokens(), timestep=times[[2, 0]], **cond).sample) < 2e-5
    assert checks.relative(result, model(tokens(), timestep=times[[2, 0]], **old).sample) < 2e-5


def test_hoisting_bad_input() -> None:
    model, times = pydiff.optimize(checks.seeded(dev)), torch.tensor([0.4])
    with pytest.raises(ValueError, match="no pooled_projections, no img_ids"):
        HoistedModel(model, times, {"encoder_hidden_states": torch.zeros(2, 5, 12), "txt_ids": torch.zeros(5, 3)})
    with pytest.raises(ValueError, match="and not controlnet_block_samples"):
        HoistedModel(model, times, condition(True) | {"controlnet_block_samples": [tokens()]}, batch=2)


def test_arguments_of_the_original() -> None:
    """What the model's forward takes besides: control networks' residuals, LoRA's scale, other names."""
    plain, fused = checks.seeded(dev), pydiff.optimize(checks.seeded(dev))
    expected, residual = call(plain), torch.randn(2, 12, 16)
    for extra in (
        {"controlnet_block_samples": [residual]},
        {"controlnet_single_block_samples": [residual]},
        {"controlnet_block_samples": [residual, 2 * residual], "controlnet_blocks_repeat": True},
    ):
        result = call(fused, **extra)
        assert checks.relative(result, call(plain, **extra)) < 2e-5 < checks.relative(result, expected)
    for extra in (
        {"joint_attention_kwargs": {"scale": 0.5}},
        {"joint_attention_kwargs": {"unknown": 1}},
        {"joint_attention_kwargs": {}},
        {"controlnet_blocks_repeat": False},
    ):
        assert checks.relative(call(fused, **extra), expected) < 2e-5
    cond, t = condition(True), torch.tensor([0.5, 0.03])
    values = [cond[k] for k in ("encoder_hidden_states", "pooled_projections")]
    rest = [cond[k] for k in ("img_ids", "txt_ids", "guidance")]
    (by_place,) = fused(tokens(), *values, t, *rest, None, None, None, False)
    assert checks.relative(by_place, expected) < 2e-5
    assert checks.relative(fused(tokens(), *values, t, *rest, return_dict=False)[0], expected) < 2e-5


class Counting(flux.FluxAttnProcessor):
    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        Counting.calls += 1
        return super().__call__(*args, **kwargs)


def test_a_processor_set_later_is_used() -> None:
    model = pydiff.optimize(checks.seeded(dev))
    expected, Counting.calls = call(model), 0
    model.set_attn_processor(Counting())
    assert checks.relative(call(model), expected) < 2e-5
    assert Counting.calls == len(model.attn_processors)


def test_image_prompts() -> None:
    """An IP-adapter's processors and arguments reach diffusers' own attention."""
    models = checks.seeded(dev), pydiff.optimize(checks.seeded(dev))
    results = []
    for model in models:
        for block in model.transformer_blocks:
            torch.manual_seed(5)
            block.attn.set_processor(flux.FluxIPAdapterAttnProcessor(16, 16).requires_grad_(False))
        prompt = [torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1))]
        results.append(call(model, joint_attention_kwargs={"ip_hidden_states": prompt}))
    assert checks.relative(results[1], results[0]) < 2e-5 < checks.relative(results[0], call(checks.seeded(dev)))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """diffusers' attention backends, of which the one in use is put back afterwards."""
    kept = dispatch._AttentionBackendRegistry
    monkeypatch.setattr(kept, "_active_backend", kept._active_backend)
    return kept


def test_a_chosen_attention_backend_is_respected(registry: Any) -> None:
    model = pydiff.optimize(checks.seeded(dev))
    expected = call(model)
    model.set_attention_backend("_native_math")
    reasons = {entry.what for entry in pydiff.optimize(pydiff.restore(model), report=True)[1].left}
    assert reasons == {"an attention backend or a parallel configuration was chosen for it"}
    assert checks.relative(call(model), expected) < 2e-5


def test_an_attention_backend_chosen_for_all_is_respected(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = pydiff.optimize(checks.seeded(dev)), []
    expected = call(model)
    name = dispatch.AttentionBackendName._NATIVE_MATH
    original = registry._backends[name]

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(1)
        return original(*args, **kwargs)

    monkeypatch.setitem(registry._backends, name, counted)
    with dispatch.attention_backend(name):
        assert checks.relative(call(model), expected) < 2e-5
    assert len(seen) == len(model.attn_processors)
    assert checks.relative(call(model), expected) < 2e-5 and len(seen) == len(model.attn_processors)


def test_projections_fused_by_diffusers() -> None:
    model = pydiff.optimize(checks.seeded(dev))
    expected = call(model)
    model.fuse_qkv_projections()
    with torch.no_grad():
        assert checks.relative(call(model), expected) < 2e-5
    model.unfuse_qkv_projections()
    assert checks.relative(call(model), expected) < 2e-5


def test_adapters() -> None:
    checks.assert_close_in_float32(lambda: with_adapters(dev()), call)
    model, t = pydiff.optimize(checks.seeded(lambda: with_adapters(dev()))), torch.tensor([0.4])
    result = HoistedModel(model, t, condition(True), batch=2)(tokens(), torch.tensor([0]))
    assert checks.relative(result, model(tokens(), timestep=t.expand(2), **condition(True)).sample) < 2e-5


def test_values_beyond_float16_are_clipped() -> None:
    model, original = (checks.seeded(dev).half() for _ in range(2))
    for m in (model, original):
        m.single_transformer_blocks[0].proj_out.bias.data.fill_(6e4)
        m.single_transformer_blocks[0].norm.linear.bias.data[32:] = 100.0
    pydiff.optimize(model)
    result, expected = (
        m.single_transformer_blocks[0](
            torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)).half(),
            torch.zeros(2, 5, 16).half(),
            torch.zeros(2, 16).half(),
        )
        for m in (model, original)
    )
    for r, e in zip(result, expected):
        assert r.isfinite().all() and torch.equal(r, e) and e.max() == 65504


def test_report() -> None:
    model, report = pydiff.optimize(checks.seeded(dev), report=True)
    assert not report.left
    assert {entry.cls for entry in report.replaced} >= {
        "FluxTransformer2DModel",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
        "FluxAttention",
        "GELU",
        "AdaLayerNormZero",
        "AdaLayerNormZeroSingle",
        "AdaLayerNormContinuous",
    }
    assert isinstance(model, Fused)


def test_fewer_operations(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q, K and V are one product a stream; norms, rotation, gates and residuals are a few operations a block."""
    counts = {"layer_norm": 0, "residual_add": 0, "qk_norm_rotary": 0, "linear": 0, "cat": 0, "rms_norm": 0}

    def count(owner: Any, op: str) -> None:
        original = getattr(owner, op)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[op] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, op, counted)

    model, cond = pydiff.optimize(checks.seeded(make)), condition(make is dev)
    call(model)  # packs the weights
    hoisted = HoistedModel(model, torch.tensor([0.4]), cond, batch=2)
    for op in ("layer_norm", "residual_add", "qk_norm_rotary"):
        count(parts, op)
    count(F, "linear")
    count(F, "rms_norm")
    count(torch, "cat")
    hoisted(tokens(), torch.tensor([0]))
    double, single = len(model.transformer_blocks), len(model.single_transformer_blocks)
    assert counts["linear"] == 1 + 8 * double + 3 * single + 1  # and the second half of each single block's last one
    assert counts["layer_norm"] == 4 * double + single + 1
    assert counts["residual_add"] == 2 * double + single
    assert counts["qk_norm_rotary"] == 2 * double + single
    assert counts["cat"] == 3 * double + 1 and counts["rms_norm"] == 0
