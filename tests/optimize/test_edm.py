"""EDM's U-Nets under `optimize`, by stand-ins with their names and arithmetic."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydiff
from pydiff.optimize import edm
from pydiff.optimize.hoisting import Hoistable
from pydiff.optimize.swap import is_fused
from tests.optimize import checks, models_edm
from tests.optimize.models_edm import DhariwalUNet, Precond, SongUNet, UNetBlock

WIDE_FILTER = (1, 3, 3, 1)
MODELS: dict[str, Any] = {
    "adm": functools.partial(DhariwalUNet, label_dim=5, augment_dim=4),
    "ddpmpp": functools.partial(SongUNet, label_dim=5, augment_dim=4),
    "ncsnpp": functools.partial(SongUNet, encoder="residual", resample_filter=WIDE_FILTER),
    "skips": functools.partial(SongUNet, encoder="skip", decoder="skip"),
}


def condition(name: str, rows: int = 2) -> dict[str, Any]:
    if name not in ("adm", "ddpmpp"):
        return {"class_labels": None}
    return {"class_labels": torch.eye(5)[:rows], "augment_labels": torch.linspace(0, 1, 4 * rows).reshape(rows, 4)}


def call(name: str, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    return model(x, torch.tensor([0.7, -1.3]), **condition(name))


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def calling(name: str) -> Any:
    return lambda model: call(name, model)


def test_close(name: str) -> None:
    checks.assert_close_in_float32(MODELS[name], calling(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """Half-precision images on float32 weights, as the preconditioners call these networks."""
    ours, theirs = 0.0, 0.0
    for seed in range(3):
        model = checks.seeded(MODELS[name], seed)
        exact = call(name, model)
        error = call(name, model, dtype) - exact
        fused = call(name, pydiff.optimize(model, memory_format=torch.channels_last), dtype)
        assert fused.dtype == dtype
        assert (fused - exact).abs().max() <= 2 * error.abs().max()
        ours, theirs = ours + float((fused - exact).square().mean()), theirs + float(error.square().mean())
    assert ours <= 1.3**2 * theirs


def test_low_precision_weights(name: str) -> None:
    checks.assert_low_precision_error(MODELS[name], lambda model, dtype: call(name, model, dtype))


def test_restored(name: str) -> None:
    checks.assert_restored(MODELS[name], calling(name))


def test_copies(name: str) -> None:
    checks.assert_copies(MODELS[name], calling(name))


@pytest.mark.parametrize("name", ["adm", pytest.param("skips", marks=pytest.mark.slow)])
def test_compiles(name: str) -> None:
    checks.assert_compiles(MODELS[name], calling(name))


def test_follows_weights() -> None:
    names = [
        f"dec.4x4_block1.{part}"
        for part in (
            "norm0.weight",
            "conv0.bias",
            "affine.weight",
            "conv1.weight",
            "skip.weight",
            "qkv.weight",
            "qkv.bias",
            "proj.weight",
        )
    ]
    checks.assert_follows_weights(MODELS["adm"], calling("adm"), [*names, "map_label.weight", "out_norm.bias"])


def test_hooks_fire(name: str) -> None:
    kinds = (models_edm.Conv2d, models_edm.GroupNorm, models_edm.Linear, UNetBlock)
    checks.assert_hooks_fire(MODELS[name], calling(name), kinds)


def test_training_and_gradients(name: str) -> None:
    model = checks.seeded(MODELS[name])
    model.train()
    checks.assert_reference_path(MODELS[name], calling(name))


@pytest.mark.parametrize("rows", [1, 3])
def test_hoisting(name: str, rows: int) -> None:
    checks.assert_hoisting(
        MODELS[name], (rows, 3, 8, 8), condition(name, rows), schedule=pydiff.VPLinear(), prediction="epsilon"
    )


def test_everything_is_replaced(name: str) -> None:
    model, report = pydiff.optimize(checks.seeded(MODELS[name]), report=True)
    classes = [entry.cls for entry in report.replaced]
    assert classes.count("UNetBlock") == 10 and len(classes) == 11 and not report.left and isinstance(model, Hoistable)


def test_a_box_filter_is_not_convolved(monkeypatch: pytest.MonkeyPatch) -> None:
    depthwise = []
    original = models_edm.Conv2d.depthwise
    monkeypatch.setattr(
        models_edm.Conv2d, "depthwise", lambda self, *args: depthwise.append(1) or original(self, *args)
    )
    counts = {}
    for name in ("adm", "ncsnpp"):
        model = pydiff.optimize(checks.seeded(MODELS[name]))
        depthwise.clear()
        call(name, model)
        counts[name] = len(depthwise)
    assert counts["adm"] == 0 and counts["ncsnpp"] > 0


def test_preconditioner_stays() -> None:
    model = checks.seeded(lambda: Precond(SongUNet(), torch.bfloat16))
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 0.1])
    expected = model(x, sigma)
    pydiff.optimize(model)
    assert not is_fused(model) and is_fused(model.model)
    assert checks.relative(model(x, sigma), expected) < 0.03


def test_forks_that_compute_something_else_are_left() -> None:
    model = checks.seeded(MODELS["adm"])
    block = model.dec["4x4_in0"]
    negated = {"forward": lambda self, x, emb: -UNetBlock.forward(self, x, emb)}
    block.__class__ = type("UNetBlock", (UNetBlock,), negated)
    expected = call("adm", model)
    _, report = pydiff.optimize(model, report=True)
    assert checks.relative(call("adm", model), expected) < 2e-5
    (left,) = report.left
    assert left.name == "dec.4x4_in0" and "something else" in left.what
    assert not isinstance(model, Hoistable)


def test_on_the_meta_device() -> None:
    """Whether it resamples by a box filter cannot be seen there."""
    with torch.device("meta"):
        model = MODELS["ddpmpp"]().eval()
    _, report = pydiff.optimize(model, report=True)
    assert {(e.name, e.what) for e in report.left} == {
        (name, "its buffers are on the meta device: load them first") for name in ("enc.4x4_down", "dec.8x8_up")
    }


class Unknown(nn.Module):
    pass


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda m: setattr(m, "controller", nn.Linear(1, 1)), "more than EDM's SongUNet: controller"),
        (
            lambda m: setattr(m, "__class__", type("SongUNet", (SongUNet,), {"forward": lambda self, x, t: x})),
            "arguments",
        ),
        (
            lambda m: setattr(m, "__class__", type("SongUNet", (Unknown,), {})) or delattr(m, "enc"),
            "not EDM's SongUNet",
        ),
    ],
)
def test_other_networks_are_left(change: Any, why: str) -> None:
    model = checks.seeded(SongUNet)
    change(model)
    _, report = pydiff.optimize(model, report=True)
    (left,) = [entry for entry in report.left if not entry.name]
    assert why in left.what


def persistent(cls: type[nn.Module]) -> type[nn.Module]:
    """A class that pickles itself as its source: pickle knows no name for it."""

    def reduce(self: nn.Module) -> Any:
        return reconstruct, (cls.__name__, dict(vars(self)))

    return type(
        cls.__name__,
        (cls,),
        {"_orig_module_src": "source", "__reduce__": reduce, "__qualname__": "no.name", "__module__": "nowhere"},
    )


def reconstruct(name: str, state: dict[str, Any]) -> nn.Module:
    cls = globals()[f"Persistent{name}"]
    model = cls.__new__(cls)
    model.__dict__.update(state)
    return model


PersistentUNetBlock = persistent(UNetBlock)
PersistentSongUNet = persistent(SongUNet)


def test_persistent_classes_pickle_as_they_did() -> None:
    model = checks.seeded(SongUNet)
    for module in model.modules():
        if type(module) in (UNetBlock, SongUNet):
            module.__class__ = globals()[f"Persistent{type(module).__name__}"]
    pydiff.optimize(model)
    assert is_fused(model) and is_fused(model.dec["4x4_in0"])
    expected = call("skips", model)
    twin = copy.deepcopy(model)
    assert is_fused(twin) and torch.equal(call("skips", twin), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for loaded in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert type(loaded) is PersistentSongUNet and type(loaded.dec["4x4_in0"]) is PersistentUNetBlock
        assert not [k for m in loaded.modules() for k in vars(m) if k.startswith("_pydiff")]
        assert checks.relative(call("skips", loaded), expected) < 2e-5


def test_norms_read_two_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pydiff.optimize(checks.seeded(MODELS["adm"]), memory_format=torch.channels_last)
    pairs: list[bool] = []
    norm_act = edm.norm_act

    def counting(*args: Any, x2: Tensor | None = None, **extra: Any) -> Tensor:
        pairs.append(x2 is not None)
        return norm_act(*args, x2=x2, **extra)

    monkeypatch.setattr(edm, "norm_act", counting)
    call("adm", model)
    assert sum(pairs) == 4
