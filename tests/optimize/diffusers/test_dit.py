"""diffusers' DiT and PixArt under `optimize`, built from their real configurations at reduced width."""

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

diffusers = pytest.importorskip("diffusers")
attention = pytest.importorskip("diffusers.models.attention")
activations = pytest.importorskip("diffusers.models.activations")

SCHEDULE = dict(schedule=pydiff.DiscreteBetas([1e-4 + 2e-5 * k for k in range(1000)]), prediction="epsilon")


def dit() -> nn.Module:
    """DiT-XL/2's layout, without its output of variances."""
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        attention_bias=True,
        num_embeds_ada_norm=10,
    )


def pixart() -> nn.Module:
    """PixArt's: one modulation for all blocks plus a table in each, cross-attention without a norm."""
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )


MODELS = {"dit": dit, "pixart": pixart}


def condition(name: str, rows: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    if name == "dit":
        return {"class_labels": torch.arange(rows) * 4 + 1}
    text = torch.randn(rows, 5, 12, generator=torch.Generator().manual_seed(7)).to(dtype)
    return {
        "encoder_hidden_states": text,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])[:rows],
    }


def call(name: str, model: nn.Module, dtype: torch.dtype = torch.float32, side: int = 8) -> torch.Tensor:
    x = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(3)).to(dtype)
    return model(x, timestep=torch.tensor([500.0, 3.0]), **condition(name, dtype=dtype)).sample


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def calling(name: str):
    return lambda model: call(name, model)


def test_close(name: str) -> None:
    checks.assert_close_in_float32(MODELS[name], calling(name))


@pytest.mark.parametrize("side", [4, 12])
def test_other_sizes(side: int) -> None:
    checks.assert_close_in_float32(dit, lambda model: call("dit", model, side=side))


def test_low_precision(name: str) -> None:
    checks.assert_low_precision_error(MODELS[name], lambda model, dtype: call(name, model, dtype))


def test_restored(name: str) -> None:
    checks.assert_restored(MODELS[name], calling(name))


def test_copies(name: str) -> None:
    checks.assert_copies(MODELS[name], calling(name))


def test_compiles(name: str) -> None:
    checks.assert_compiles(MODELS[name], calling(name))


def test_follows_weights() -> None:
    names = [
        f"transformer_blocks.1.{layer}"
        for layer in (
            "attn1.to_q.weight",
            "attn1.to_v.bias",
            "attn1.to_out.0.weight",
            "norm1.linear.weight",
            "ff.net.0.proj.weight",
            "norm1.emb.timestep_embedder.linear_1.weight",
        )
    ]
    checks.assert_follows_weights(dit, calling("dit"), [*names, "proj_out_1.bias", "proj_out_2.weight"])


def test_hooks_fire(name: str) -> None:
    kinds = (
        nn.LayerNorm,
        nn.Conv2d,
        nn.Linear,
        nn.SiLU,
        nn.Embedding,
        attention.FeedForward,
        attention.Attention,
        attention.BasicTransformerBlock,
    )
    checks.assert_hooks_fire(MODELS[name], calling(name), kinds)


def test_pre_hooks_fire(name: str) -> None:
    model, seen = pydiff.optimize(checks.seeded(MODELS[name])), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, args: seen.append(m))
    plain, original = checks.seeded(MODELS[name]), []
    for module in plain.modules():
        module.register_forward_pre_hook(lambda m, args: original.append(m))
    call(name, model), call(name, plain)
    known, kept = ({id(m): n for n, m in root.named_modules()} for root in (model, plain))
    assert [known[id(m)] for m in seen] == [kept[id(m)] for m in original]


def test_training_and_gradients(name: str) -> None:
    checks.assert_reference_path(MODELS[name], calling(name))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_hoisting(rows: int) -> None:
    checks.assert_hoisting(dit, (rows, 4, 8, 8), condition("dit", rows), **SCHEDULE)


def test_hoisting_computes_no_embedding_in_the_loop() -> None:
    model = pydiff.optimize(checks.seeded(dit))
    times = torch.tensor([900.0, 400.0, 20.0])
    hoisted = HoistedModel(model, times, condition("dit"), batch=2)
    x = torch.randn(2, 4, 8, 8)
    expected = model(x, torch.tensor([400.0, 400.0]), **condition("dit")).sample

    def forbidden(*args: Any) -> None:
        raise AssertionError("an embedding was computed")

    for block in model.transformer_blocks:
        block.norm1.emb.register_forward_pre_hook(forbidden)
        block.norm1.linear.register_forward_pre_hook(forbidden)
    model.proj_out_1.register_forward_pre_hook(forbidden)
    assert checks.relative(hoisted(x, torch.tensor([1], dtype=torch.int32)), expected) < 2e-5
    assert checks.relative(hoisted(x, torch.tensor([2], dtype=torch.int32)), expected) > 1e-4


@pytest.mark.filterwarnings("ignore:pydiff.optimize")
def test_hoisted_with_gradients_of_x() -> None:
    """The hoisted rows are used where the fused forward is not: gradients go to x through the references."""
    model = pydiff.optimize(checks.seeded(dit))
    hoisted = HoistedModel(model, torch.tensor([400.0]), condition("dit"), batch=2)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    stage = torch.tensor([0], dtype=torch.int32)
    hoisted(x, stage).square().sum().backward()
    y = x.detach().requires_grad_()
    model(y, torch.tensor([400.0, 400.0]), **condition("dit")).sample.square().sum().backward()
    assert checks.relative(x.grad, y.grad) < 2e-5


def test_hoisting_bad_input() -> None:
    model = pydiff.optimize(checks.seeded(dit))
    with pytest.raises(ValueError, match="class_labels"):
        HoistedModel(model, torch.tensor([400.0]), {}, batch=2)
    with pytest.raises(ValueError, match="and not cross_attention_kwargs"):
        HoistedModel(model, torch.tensor([400.0]), condition("dit") | {"cross_attention_kwargs": {"scale": 2}}, batch=2)
    model = checks.seeded(dit)
    norm = model.transformer_blocks[0].norm1
    norm.forward = type(norm).forward.__get__(norm)
    with pytest.raises(ValueError, match="adaptive norms of DiT.* were not optimised"):
        HoistedModel(pydiff.optimize(model), torch.tensor([400.0]), condition("dit"), batch=2)
    assert checks.relative(call("dit", model), call("dit", checks.seeded(dit))) < 2e-5


def test_report(name: str) -> None:
    model, report = pydiff.optimize(checks.seeded(MODELS[name]), report=True)
    assert not report.left
    classes = {entry.cls for entry in report.replaced}
    assert {"BasicTransformerBlock", "Attention", "GELU"} <= classes
    assert ("DiTTransformer2DModel" in classes) == (name == "dit")
    model = checks.seeded(MODELS[name])
    model.transformer_blocks[0].set_chunk_feed_forward(1)
    _, report = pydiff.optimize(model, report=True)
    assert ["chunked" in entry.what for entry in report.left] == [True]
    assert torch.equal(call(name, model), call(name, pydiff.restore(model)))


def test_fewer_operations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block's adaptive norms, gates and residuals are three or four operations."""
    counts = {"layer_norm": 0, "residual_add": 0}
    for op in counts:
        original = getattr(parts, op)

        def counted(*args: Any, op: str = op, original: Any = original, **kwargs: Any) -> Any:
            counts[op] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(parts, op, counted)
    model = pydiff.optimize(checks.seeded(MODELS[name]))
    call(name, model)
    blocks = len(model.transformer_blocks)
    assert counts == {"layer_norm": 2 * blocks, "residual_add": blocks if name == "dit" else 2 * blocks}


def test_cross_attention_in_an_adaptive_block() -> None:
    for options in ({"cross_attention_dim": 12}, {"cross_attention_dim": 16, "only_cross_attention": True}):

        def make(options: dict[str, Any] = options) -> nn.Module:
            return attention.BasicTransformerBlock(
                16, 2, 8, norm_type="ada_norm_zero", num_embeds_ada_norm=10, activation_fn="gelu-approximate", **options
            )

        x, text = torch.randn(2, 6, 16), torch.randn(2, 5, options["cross_attention_dim"])
        checks.assert_close_in_float32(
            make,
            lambda model, x=x, text=text: model(
                x, encoder_hidden_states=text, timestep=torch.tensor([3, 7]), class_labels=torch.tensor([1, 2])
            ),
        )


class Adapter(nn.Module):
    """A LoRA layer around a linear one, as peft makes them."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer
        self.a, self.b = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def with_adapters(model: nn.Module) -> nn.Module:
    """Every third linear layer wrapped."""
    layers = [(m, n) for m in model.modules() for n, c in m.named_children() if isinstance(c, nn.Linear)]
    for owner, child in layers[::3]:
        setattr(owner, child, Adapter(getattr(owner, child)))
    return model.eval().requires_grad_(False)


def test_adapters(name: str) -> None:
    checks.assert_close_in_float32(lambda: with_adapters(MODELS[name]()), calling(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_is_the_approximation_on_every_device(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(6, 9).to(dtype).requires_grad_(False), (3 * torch.randn(2, 5, 6)).to(dtype)
    assert torch.equal(parts.linear_gelu(layer, x), F.gelu(layer(x), approximate="tanh"))
    assert not torch.equal(parts.linear_gelu(layer, x), F.gelu(layer(x)))


def test_gelu_is_one_operation_on_cuda() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    layer = nn.Linear(6, 8)
    with FakeTensorMode():
        layer.weight, layer.bias = (
            nn.Parameter(torch.empty(shape, device="cuda"), requires_grad=False) for shape in ((8, 6), (8,))
        )
        x = torch.empty(2, 5, 6, device="cuda")
        with Recorded():
            y = parts.linear_gelu(layer, x)
    assert y.shape == (2, 5, 8) and y.is_contiguous()
    assert [n for n in names if n not in ("t", "view", "device")] == ["_addmm_activation"]


def test_exact_gelu_is_left() -> None:
    model = nn.Sequential(activations.GELU(6, 8), activations.GELU(8, 8, "tanh"))
    _, report = pydiff.optimize(model, report=True)
    assert [isinstance(m, Fused) for m in model] == [False, True]
    assert "exact" in report.left[0].what
