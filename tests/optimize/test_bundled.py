"""The bundled U-Net under `optimize`, at reduced width and with its trained weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydiff
from pydiff.models import UNet, load_model
from pydiff.models.unet import Block, ResBlock, SelfAttention
from pydiff.optimize import bundled
from pydiff.optimize.hoisting import Hoistable, HoistedModel
from tests.optimize import checks


def make() -> UNet:
    return UNet(channels=(8, 16), blocks=(2, 1), attention=(False, True), embedding_dim=16, head_dim=8, groups=4)


def call(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(3)).to(dtype)
    return model(x, torch.tensor([0.9, 0.2]), torch.tensor([3, 10]))


def test_close() -> None:
    checks.assert_close_in_float32(make, call)


@pytest.mark.parametrize("labels", [None, torch.tensor([1, 2])])
def test_time_and_labels(labels: Tensor | None) -> None:
    plain, fused = checks.seeded(make), pydiff.optimize(checks.seeded(make))
    x = torch.randn(2, 1, 28, 28)
    assert checks.relative(fused(x, torch.tensor(0.4), labels), plain(x, torch.tensor(0.4), labels)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    checks.assert_low_precision_error(make, call, dtype)


def test_restored() -> None:
    checks.assert_restored(make, call)


def test_copies() -> None:
    checks.assert_copies(make, call)


def test_compiles() -> None:
    checks.assert_compiles(make, call)


def test_follows_weights() -> None:
    names = [f"up.1.0.0.{part}.weight" for part in ("norm1", "conv1", "embedding", "conv2", "skip")]
    names += [
        "up.1.0.1.qkv.weight",
        "up.1.0.1.out.bias",
        "upsample.0.conv.bias",
        "norm_out.weight",
        "class_embedding.weight",
    ]
    checks.assert_follows_weights(make, call, names)


def test_hooks_fire() -> None:
    kinds = (nn.GroupNorm, nn.Conv2d, nn.Linear, nn.Identity, Block, ResBlock, SelfAttention)
    checks.assert_hooks_fire(make, call, kinds)


def test_training_and_gradients() -> None:
    checks.assert_reference_path(make, call)


@pytest.mark.parametrize("labels", [None, torch.tensor([3, 10, 0])])
def test_hoisting(labels: Tensor | None) -> None:
    cond = {} if labels is None else {"labels": labels}
    checks.assert_hoisting(make, (3, 1, 28, 28), cond, schedule=pydiff.VPCosine(), prediction="v_prediction")


@pytest.mark.parametrize("hoist", [True, False])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}])
def test_samples_of_the_trained_model(hoist: bool, options: dict[str, float]) -> None:
    """The same samples with and without `optimize`, as the sampler calls the model: guided too."""
    arguments: dict[str, Any] = dict(seed=1, cond={"labels": torch.tensor([7, 2])}, hoist=hoist)
    if options:
        arguments["uncond"] = {"labels": torch.tensor([10, 10])}
    samples = []
    for optimized in (False, True):
        model = load_model().eval()
        model = pydiff.optimize(model) if optimized else model
        samples.append(pydiff.Sampler(model, steps=6, **options)((2, 1, 28, 28), **arguments))
    assert checks.relative(samples[1], samples[0]) < 1e-4
    assert samples[0].std() > 0.1


def test_hoisted_tables_are_computed_again_in_place() -> None:
    model = pydiff.optimize(pydiff.load_model("mnist"))
    times, cond = torch.tensor([0.9, 0.5, 0.1]), {"labels": torch.tensor([3, 4])}
    hoisted = HoistedModel(model, times, cond, batch=2)
    before, address = hoisted.table.clone(), hoisted.table.data_ptr()
    times.copy_(torch.tensor([0.8, 0.4, 0.2]))
    cond["labels"].copy_(torch.tensor([7, 8]))
    hoisted.update()
    assert hoisted.table.data_ptr() == address and not torch.equal(hoisted.table, before)
    assert torch.equal(hoisted.table, HoistedModel(model, times, cond, batch=2).table)


def test_everything_is_replaced() -> None:
    model, report = pydiff.optimize(checks.seeded(make), report=True)
    classes = [entry.cls for entry in report.replaced]
    assert {c: classes.count(c) for c in classes} == {"UNet": 1, "ResBlock": 8, "SelfAttention": 4}
    assert [(e.cls, e.what) for e in report.left] == [("Upsample", "on request alone: fold_upsampling=True")]
    assert isinstance(model, Hoistable)


def test_folded_upsampling() -> None:
    model, report = pydiff.optimize(checks.seeded(make), report=True, fold_upsampling=True)
    assert not report.left and "Upsample" in {e.cls for e in report.replaced}
    assert checks.relative(call(model), call(checks.seeded(make))) < 2e-5


def test_a_block_that_is_left_prevents_hoisting() -> None:
    model = checks.seeded(make)
    block = model.middle[0][0]
    block.forward = lambda x, embedding: ResBlock.forward(block, x, embedding)
    expected = call(model)
    model, report = pydiff.optimize(model, report=True, fold_upsampling=True)
    assert [e.name for e in report.left] == ["middle.0.0"] and not isinstance(model, Hoistable)
    assert checks.relative(call(model), expected) < 2e-5


def test_norms_read_two_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pydiff.optimize(checks.seeded(make), memory_format=torch.channels_last)
    seen: list[int] = []
    group_norm = bundled.group_norm

    def counting(x: Tensor, *args: Any, x2: Tensor | None = None, **extra: Any) -> Tensor:
        seen.append(x2 is not None)
        return group_norm(x, *args, x2=x2, **extra)

    monkeypatch.setattr(bundled, "group_norm", counting)
    call(model)
    assert sum(seen) == 3
