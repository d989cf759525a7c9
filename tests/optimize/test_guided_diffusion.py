"""guided-diffusion's U-Net under `optimize`, by a stand-in with its names and arithmetic."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydiff
from pydiff.optimize import guided_diffusion
from pydiff.optimize.hoisting import Hoistable
from tests.optimize import checks, models_guided_diffusion
from tests.optimize.models_guided_diffusion import AttentionBlock, ResBlock, UNetModel

MODELS: dict[str, dict[str, Any]] = {
    "adm": dict(num_classes=5),
    "improved": dict(scale_shift=False, new_order=True, resblock_updown=False, use_conv=True),
}


def make(name: str) -> Any:
    return functools.partial(UNetModel, **MODELS[name])


def call(name: str, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    return model(x, torch.tensor([500.0, 3.0]), **({"y": torch.tensor([4, 1])} if name == "adm" else {}))


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def calling(name: str) -> Any:
    return lambda model: call(name, model)


def test_close(name: str) -> None:
    checks.assert_close_in_float32(make(name), calling(name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_converted_torso(name: str, dtype: torch.dtype) -> None:
    """Convolutions in half precision between norms and embeddings in float32, as convert_to_fp16 leaves them."""
    ours, theirs = 0.0, 0.0
    for seed in range(3):
        exact = call(name, checks.seeded(make(name), seed))
        model = checks.seeded(make(name), seed).convert_torso(dtype)
        error = call(name, model) - exact
        fused = call(name, pydiff.optimize(model, memory_format=torch.channels_last)) - exact
        assert fused.dtype == torch.float32 and fused.abs().max() <= 2 * error.abs().max()
        ours, theirs = ours + float(fused.square().mean()), theirs + float(error.square().mean())
    assert ours <= 1.3**2 * theirs


def test_restored(name: str) -> None:
    checks.assert_restored(make(name), calling(name))


def test_copies(name: str) -> None:
    checks.assert_copies(make(name), calling(name))


@pytest.mark.parametrize("name", ["adm", pytest.param("improved", marks=pytest.mark.slow)])
def test_compiles(name: str) -> None:
    checks.assert_compiles(make(name), calling(name))


def test_follows_weights() -> None:
    names = [
        f"output_blocks.0.0.{part}"
        for part in (
            "in_layers.0.weight",
            "in_layers.2.bias",
            "emb_layers.1.weight",
            "out_layers.3.weight",
            "skip_connection.weight",
        )
    ]
    names += ["middle_block.1.qkv.weight", "middle_block.1.proj_out.bias", "out.0.weight", "label_emb.weight"]
    checks.assert_follows_weights(make("adm"), calling("adm"), names)


def test_hooks_fire(name: str) -> None:
    kinds = (
        nn.GroupNorm,
        nn.Conv2d,
        nn.Conv1d,
        nn.Linear,
        nn.SiLU,
        nn.Sequential,
        nn.Dropout,
        ResBlock,
        AttentionBlock,
    )
    checks.assert_hooks_fire(make(name), calling(name), kinds)


def test_training_and_gradients(name: str) -> None:
    checks.assert_reference_path(make(name), calling(name))


@pytest.mark.parametrize("rows", [1, 3])
def test_hoisting(name: str, rows: int) -> None:
    cond = {"y": torch.arange(rows)} if name == "adm" else {}
    checks.assert_hoisting(make(name), (rows, 3, 8, 8), cond, schedule=pydiff.VPLinear(), prediction="epsilon")


def test_everything_is_replaced(name: str) -> None:
    _, report = pydiff.optimize(checks.seeded(make(name)), report=True)
    classes = [entry.cls for entry in report.replaced]
    assert classes.count("AttentionBlock") == 4 and classes.count("UNetModel") == 1
    assert classes.count("ResBlock") == (10 if name == "adm" else 8)
    left = {(entry.cls, entry.what) for entry in report.left}
    assert left == {("Upsample", "on request alone: fold_upsampling=True")}


def test_folded_upsampling(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On request, in the block that upsamples or in the layer."""
    folded: list[torch.Size] = []
    upsample_conv2d = guided_diffusion.upsample_conv2d
    monkeypatch.setattr(
        guided_diffusion, "upsample_conv2d", lambda x, *args: folded.append(x.shape) or upsample_conv2d(x, *args)
    )
    expected = call(name, checks.seeded(make(name)))
    model, report = pydiff.optimize(checks.seeded(make(name)), report=True, fold_upsampling=True)
    folded.clear()  # of those that were only compared
    assert checks.relative(call(name, model), expected) < 2e-5
    assert folded == [torch.Size([2, 32, 4, 4])] and not report.left
    assert checks.relative(call(name, pydiff.optimize(checks.seeded(make(name)))), expected) < 2e-5
    assert len(folded) == 1


def forked(cls: type[nn.Module], change: Any) -> type[nn.Module]:
    """A class of the same name whose forward computes something else."""
    return type(cls.__name__, (cls,), {"forward": change})


def test_forks_that_compute_something_else_are_left() -> None:
    model = checks.seeded(make("adm"))
    block, attention = model.middle_block[0], model.middle_block[1]
    block.__class__ = forked(ResBlock, lambda self, x, emb: ResBlock.forward(self, x, emb) * 0.5)
    attention.__class__ = forked(AttentionBlock, lambda self, x: AttentionBlock.forward(self, x) - x)
    expected = call("adm", model)
    _, report = pydiff.optimize(model, report=True)
    assert checks.relative(call("adm", model), expected) < 2e-5
    left = {entry.name: entry.what for entry in report.left}
    assert "something else" in left["middle_block.0"] and "something else" in left["middle_block.1"]
    assert not isinstance(model, Hoistable)  # that block needs the embedding itself


def test_modules_that_only_share_a_name_are_left() -> None:
    class Upsample(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(Upsample(), nn.Upsample(scale_factor=2))
    _, report = pydiff.optimize(model, report=True)
    assert not report.replaced
    assert [(e.name, e.what) for e in report.left] == [("0", "it is not guided-diffusion's Upsample, of images")]


def test_another_signature_is_left() -> None:
    class UNetModel(models_guided_diffusion.UNetModel):
        def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
            return super().forward(x, timesteps)

    _, report = pydiff.optimize(UNetModel(), report=True)
    assert [e.what for e in report.left if not e.name] == ["its forward takes other arguments than (x, timesteps, y)"]
    assert "ResBlock" in {e.cls for e in report.replaced}


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = make("adm")().eval()
    _, report = pydiff.optimize(model, report=True)
    assert {entry.cls for entry in report.replaced} == {"ResBlock", "AttentionBlock", "UNetModel"}


def test_wrapped_layers_are_called() -> None:
    """A LoRA wrapper in place of a convolution takes part."""

    class Wrapper(nn.Module):
        def __init__(self, base: nn.Module):
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) * 1.5

    model = checks.seeded(make("adm"))
    block = model.output_blocks[0][0]
    block.in_layers[2], block.skip_connection = Wrapper(block.in_layers[2]), Wrapper(block.skip_connection)
    expected = call("adm", model)
    assert checks.relative(call("adm", pydiff.optimize(model)), expected) < 2e-5


def test_labels_must_fit() -> None:
    model = pydiff.optimize(checks.seeded(make("improved")))
    with pytest.raises(AttributeError, match="label_emb"):
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def test_norms_read_two_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The up path hands its blocks [h; skip] as two tensors, unless a hook wants to see one."""
    model = pydiff.optimize(checks.seeded(make("adm")), memory_format=torch.channels_last)
    pairs: list[bool] = []
    norm_act = guided_diffusion.norm_act

    def counting(*args: Any, x2: Tensor | None = None, **extra: Any) -> Tensor:
        pairs.append(x2 is not None)
        return norm_act(*args, x2=x2, **extra)

    monkeypatch.setattr(guided_diffusion, "norm_act", counting)
    expected = call("adm", model)
    assert sum(pairs) == len(model.output_blocks)
    pairs.clear()
    model.output_blocks[0][0].register_forward_hook(lambda *args: None)
    assert checks.relative(call("adm", model), expected) < 1e-5
    assert sum(pairs) == len(model.output_blocks) - 1


def test_a_fork_with_another_forward_keeps_it() -> None:
    """A class of the known name and layers, whose forward does something more, is left; its blocks are fused."""

    def other(self: Any, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        return UNetModel.forward(self, 2 * x - 1, timesteps, y)

    forward = types.FunctionType(other.__code__, vars(models_guided_diffusion), "forward", (None,))
    fork = type("UNetModel", (UNetModel,), {"forward": forward})

    def forked() -> nn.Module:
        model = make("adm")()
        model.__class__ = fork
        return model

    plain = checks.seeded(forked)
    model, report = pydiff.optimize(checks.seeded(forked), report=True)
    assert type(model) is fork and "ResBlock" in {entry.cls for entry in report.replaced}
    (left,) = [entry for entry in report.left if entry.cls == "UNetModel"]
    assert "forward computes something else" in left.what
    assert checks.relative(call("adm", model), call("adm", plain)) < 2e-5
