"""`optimize` on modules that no rule knows."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydiff
from pydiff.optimize import generic
from pydiff.optimize.swap import is_fused
from tests.optimize import checks
from tests.optimize.models_generic import (
    Attending,
    Branching,
    ByAttribute,
    Everything,
    Functional,
    HiddenBranch,
    InSequential,
    OuterUser,
    SharedActivation,
    Stateful,
    TwoUsers,
    Untraceable,
)


def call(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(3)).to(dtype))


@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each GroupNorm that ran as an operation, whether SiLU was part of it."""
    seen: list[bool] = []
    group_norm = generic.group_norm

    def counting(*args: Any, activation: str | None = None, **extra: Any) -> Any:
        seen.append(activation is not None)
        return group_norm(*args, activation=activation, **extra)

    monkeypatch.setattr(generic, "group_norm", counting)
    return seen


# ---- the contract, on a model with everything in it


def test_close() -> None:
    checks.assert_close_in_float32(Everything, call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    checks.assert_low_precision_error(Everything, call, dtype, seeds=5)


def test_restored() -> None:
    checks.assert_restored(Everything, call)


def test_copies() -> None:
    checks.assert_copies(Everything, call)


def test_compiles() -> None:
    checks.assert_compiles(Everything, call)


def test_follows_weights() -> None:
    names = [
        "parts.0.called.0.weight",
        "parts.1.norm1.bias",
        "parts.1.conv1.weight",
        "parts.8.own.in_proj_weight",
        "parts.8.cross.in_proj_bias",
        "parts.8.cross.out_proj.weight",
        "parts.8.norm.weight",
    ]
    checks.assert_follows_weights(Everything, call, names)


def test_hooks_fire() -> None:
    kinds = (nn.GroupNorm, nn.SiLU, nn.Conv2d, nn.LayerNorm, nn.Sequential, ByAttribute, Attending)
    checks.assert_hooks_fire(Everything, call, kinds)


def test_training_and_gradients() -> None:
    checks.assert_reference_path(Everything, call)


# ---- which pairs are folded


@pytest.mark.parametrize(
    "cls, folded, alone",
    [
        (InSequential, 2, 1),
        (ByAttribute, 2, 1),
        (OuterUser, 2, 2),
        (TwoUsers, 0, 1),
        (SharedActivation, 0, 1),
        (Branching, 0, 1),
        (HiddenBranch, 0, 1),
        (Stateful, 0, 1),
        (Functional, 0, 1),
        (Untraceable, 0, 1),
    ],
)
def test_pairs(cls: type[nn.Module], folded: int, alone: int, activated: list[bool]) -> None:
    plain, fused = checks.seeded(cls), pydiff.optimize(checks.seeded(cls))
    assert checks.relative(call(fused), call(plain)) < 1e-5
    assert (activated.count(True), activated.count(False)) == (folded, alone)


@pytest.mark.parametrize("watched", ["norm1", "act1"])
@pytest.mark.parametrize("pre", [False, True])
def test_a_hook_on_either_side_parts_them(watched: str, pre: bool, activated: list[bool]) -> None:
    plain, fused = checks.seeded(ByAttribute), pydiff.optimize(checks.seeded(ByAttribute))
    seen: list[Tensor] = []
    layer = fused.get_submodule(watched)
    handle = (
        layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        if pre
        else layer.register_forward_hook(lambda m, args, out: seen.append(out))
    )
    assert checks.relative(call(fused), call(plain)) < 1e-5
    assert activated.count(True) == 1 and len(seen) == 1
    handle.remove()
    activated.clear()
    assert checks.relative(call(fused), call(plain)) < 1e-5
    assert activated.count(True) == 2


def test_parts_called_alone_are_what_they_were() -> None:
    model = pydiff.optimize(checks.seeded(ByAttribute))
    x = torch.randn(2, 8, 4, 4)
    expected = nn.functional.group_norm(x, 2, model.norm1.weight, model.norm1.bias)
    assert torch.allclose(model.norm1(x), expected, atol=1e-6)
    assert torch.equal(model.act1(x), nn.functional.silu(x))


@pytest.mark.parametrize("side", ["norm1", "act1"])
def test_a_part_that_is_replaced_later(side: str) -> None:
    plain, fused = checks.seeded(ByAttribute), pydiff.optimize(checks.seeded(ByAttribute))
    for model in (plain, fused):
        setattr(model, side, nn.Identity())
    assert checks.relative(call(fused), call(plain)) < 1e-5


def test_a_part_that_is_compiled_later() -> None:
    plain, fused = checks.seeded(ByAttribute), pydiff.optimize(checks.seeded(ByAttribute))
    torch._dynamo.reset()
    fused.norm1.compile(backend="eager")
    fused.acts[0].compile(backend="eager")
    assert checks.relative(call(fused), call(plain)) < 1e-5


def test_an_activation_in_training_mode_alone() -> None:
    plain, fused = checks.seeded(ByAttribute), pydiff.optimize(checks.seeded(ByAttribute))
    fused.act1.train()
    assert checks.relative(call(fused), call(plain)) < 1e-5
    fused.norm2.train()
    assert checks.relative(call(fused), call(plain)) < 1e-5


def test_an_error_leaves_nothing_folded() -> None:
    model = pydiff.optimize(checks.seeded(ByAttribute))
    with pytest.raises(Exception, match=r".*"):
        model(torch.randn(2, 8, 4, 4), scale="no number")
    assert not getattr(generic._running, "folded", ())
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(model.act1(x), nn.functional.silu(x))


def test_threads_do_not_see_each_other() -> None:
    """While one thread is inside the forward, the norm called by another is a norm."""
    model = pydiff.optimize(checks.seeded(ByAttribute))
    x = torch.randn(2, 8, 4, 4)
    expected = model.norm1(x)
    inside, results = [], []

    def from_elsewhere(*args: Any) -> None:
        inside.append(bool(generic._running.folded))
        with torch.no_grad():
            thread = threading.Thread(target=lambda: results.append(model.norm1(x)))
            thread.start()
            thread.join()

    model.conv1.register_forward_hook(from_elsewhere)
    model(x)
    assert inside == [True] and torch.equal(results[0], expected)


# ---- what is reported


def report_of(model: nn.Module) -> dict[str, str]:
    _, report = pydiff.optimize(model.eval(), report=True)
    return {entry.name: entry.what for entry in report.left}


@pytest.mark.parametrize(
    "cls, why",
    [
        (SharedActivation, "used elsewhere"),
        (Branching, "branches"),
        (HiddenBranch, "branches"),
        (Stateful, "effects"),
        (Untraceable, "cannot be traced"),
    ],
)
def test_what_is_left_and_why(cls: type[nn.Module], why: str) -> None:
    assert why in report_of(cls())[""]


def test_functions_are_reported() -> None:
    _, report = pydiff.optimize(Functional().eval(), report=True)
    reasons = [entry.what for entry in report.left]
    assert any("scaled_dot_product_attention is a function call" in r for r in reasons)
    assert any("the SiLU after its norm is a function call" in r for r in reasons)


def test_what_is_replaced_is_reported() -> None:
    _, report = pydiff.optimize(Everything().eval(), report=True)
    entries = {entry.name: entry for entry in report.replaced}
    assert len(entries) == len(report.replaced)
    assert entries["parts.0.called"].what == "GroupNorm+SiLU as one operation"
    assert entries["parts.1"].cls == "ByAttribute" and entries["parts.1.act1"].what == "applied by the norm before it"
    assert entries["parts.8.own"].cls == "MultiheadAttention" and entries["parts.8.norm"].cls == "LayerNorm"
    assert "parts.3.act" not in entries and "parts.0.taken_apart.1" not in entries


# ---- layers of their own


def test_attention_runs_as_an_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    attention = generic.attention
    monkeypatch.setattr(
        generic,
        "attention",
        lambda *args, mask=None, **extra: calls.append(mask is not None) or attention(*args, mask=mask, **extra),
    )
    for options in ({}, {"bias": False}):
        plain = checks.seeded(lambda options=options: Attending(**options))
        fused = pydiff.optimize(checks.seeded(lambda options=options: Attending(**options)))
        calls.clear()
        assert checks.relative(call(fused), call(plain)) < 2e-5
        assert calls == [False, True, True]  # and the one that is asked for its weights runs as before


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_mask": torch.zeros(16, 16)},
        {"attn_mask": torch.ones(16, 16).triu(1).bool(), "is_causal": True},
        {"need_weights": True},
        {"need_weights": True, "average_attn_weights": False},
    ],
)
def test_attention_as_it_is_not_served(arguments: dict[str, Any]) -> None:
    attention = checks.seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    fused = pydiff.optimize(checks.seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True)))
    x = torch.randn(2, 16, 8)
    arguments = {"need_weights": False, **arguments}
    for expected, result in zip(attention(x, x, x, **arguments), fused(x, x, x, **arguments)):
        assert (expected is None and result is None) or torch.equal(expected, result)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"batch_first": False}, "batch is not first"),
        ({"kdim": 4}, "other widths"),
        ({"add_zero_attn": True}, "of its own"),
        ({"add_bias_kv": True}, "of its own"),
    ],
)
def test_attention_that_is_left(options: dict[str, Any], why: str) -> None:
    assert why in report_of(nn.MultiheadAttention(8, 2, **{"batch_first": True, **options}))[""]


def test_torch_transformer_layers() -> None:
    """Their fast path reads the weights of the layers that were replaced."""

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    x = torch.randn(2, 5, 8)
    expected = checks.seeded(make)(x)
    model, report = pydiff.optimize(checks.seeded(make), report=True)
    assert checks.relative(model(x), expected) < 2e-5
    assert {entry.cls for entry in report.replaced} == {"MultiheadAttention", "LayerNorm"}


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.GroupNorm(2, 8), (3, 8)),
        (nn.GroupNorm(2, 8), (3, 8, 5)),
        (nn.GroupNorm(2, 8, affine=False), (3, 8, 2, 2, 3)),
        (nn.LayerNorm(8), (8,)),
        (nn.LayerNorm(8, bias=False), (3, 5, 8)),
        (nn.LayerNorm(8, elementwise_affine=False), (2, 8)),
        (nn.LayerNorm((2, 8)), (3, 2, 8)),
        (nn.LayerNorm((1, 8)), (3, 1, 8)),
    ],
)
def test_norms_of_any_shape(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with torch.no_grad():
        expected = layer.eval()(x)
        pydiff.optimize(layer)
        assert is_fused(layer) == (not isinstance(layer, nn.LayerNorm) or len(layer.normalized_shape) == 1)
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_what_a_known_module_owns_is_left_to_it() -> None:
    from pydiff.models import UNet

    model = UNet(channels=(8,), blocks=(1,), attention=(True,), embedding_dim=16, head_dim=8, groups=4)
    wrapper = nn.Sequential(model, nn.GroupNorm(1, 1))
    _, report = pydiff.optimize(wrapper.eval(), report=True)
    replaced = {entry.name for entry in report.replaced}
    assert "1" in replaced and not any(name.endswith(("norm1", "norm2", "norm", "norm_out")) for name in replaced)


def test_unknown_parts_of_a_known_model_are_done() -> None:
    from pydiff.models import UNet

    model = UNet(channels=(8,), blocks=(1,), attention=(False,), embedding_dim=16, head_dim=8, groups=4)
    model.extra = nn.ModuleList([OuterUser()])
    _, report = pydiff.optimize(model.eval(), report=True)
    assert "extra.0.block" in {entry.name for entry in report.replaced}


def test_twice_is_once() -> None:
    model = pydiff.optimize(checks.seeded(Everything))
    expected, classes = call(model), [type(m) for m in model.modules()]
    _, report = pydiff.optimize(model, report=True)
    assert not report.replaced and [type(m) for m in model.modules()] == classes
    assert torch.equal(call(model), expected)


def test_slices_of_a_sequential() -> None:
    plain = checks.seeded(lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Identity()))
    fused = pydiff.optimize(checks.seeded(lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Identity())))
    for part in (slice(0, 1), slice(1, 3), slice(0, 2)):
        assert checks.relative(call(fused[part]), call(plain[part])) < 1e-6
