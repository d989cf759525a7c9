"""Uses of an optimised model that are easily forgotten: each was wrong once."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydiff
from pydiff.models import UNet
from pydiff.optimize.diffusers.transformers import linear_gelu
from pydiff.optimize.hoisting import CannotHoist, Hoistable, HoistedModel
from tests.optimize import checks
from tests.optimize.models_guided_diffusion import ResBlock

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 8, 8)


def make(**config: Any) -> nn.Module:
    return checks.seeded(
        lambda: diffusers.UNet2DConditionModel(
            **dict(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                norm_num_groups=8,
                layers_per_block=1,
                cross_attention_dim=24,
                block_out_channels=(16, 32),
                attention_head_dim=8,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            )
            | config
        )
    )


def ddpm() -> nn.Module:
    return checks.seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            norm_num_groups=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(model: nn.Module, x: Tensor | None = None, *more: Any, **options: Any) -> Tensor:
    return model(random(*SHAPE) if x is None else x, torch.tensor([500, 3]), random(2, 5, 24), *more, **options)[0]


def pair(**config: Any) -> tuple[nn.Module, nn.Module]:
    """A model and the same optimised, called once."""
    plain = make(**config)
    fused = pydiff.optimize(copy.deepcopy(plain))
    if not config:
        call(fused)
    return plain, fused


def sampled(model: nn.Module, **options: Any) -> Tensor:
    cond = {"encoder_hidden_states": random(2, 5, 24)}
    return pydiff.Sampler(model, "ddim", steps=2, schedule=pydiff.VPLinear())(SHAPE, cond=cond, seed=0, **options)


# ---------------------------------------------------------------------------- calls


def test_arguments_by_place() -> None:
    plain, fused = pair(num_class_embeds=5)
    labels = torch.tensor([1, 3])
    assert checks.relative(call(fused, None, labels), call(plain, None, labels)) < 2e-5
    nothing = (None,) * 8
    result = fused(random(*SHAPE), 3, random(2, 5, 24), labels, *nothing, False)
    assert isinstance(result, tuple)


@pytest.mark.parametrize("time", [7.6, 7, True, torch.tensor(7.6), torch.tensor([7.0], dtype=torch.float64)])
def test_times_of_every_kind(time: Any) -> None:
    plain, x = ddpm(), random(2, 3, 8, 8)
    expected = plain(x, time).sample
    assert checks.relative(pydiff.optimize(plain)(x, time).sample, expected) < 2e-5


def test_autocast_is_followed_by_the_whole_model() -> None:
    plain, fused = pair()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast"):
        pydiff.optimize.swap._warned.clear()
        assert torch.equal(call(fused), call(plain))


def test_dropout_left_on() -> None:
    plain = make(dropout=0.5)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.train().p = 0.5
    fused = pydiff.optimize(copy.deepcopy(plain))
    results = []
    for model in (plain, fused):
        torch.manual_seed(0)
        results.append(call(model))
    assert checks.relative(results[1], results[0]) < 2e-5


def test_wrapped_transformer_gets_the_text() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    plain, fused = pair()
    for model in (plain, fused):
        block: Any = model.up_blocks[1]
        block.attentions[0] = Wrapper(block.attentions[0]).eval()
    assert checks.relative(call(fused), call(plain)) < 2e-5


def test_old_processor_ignores_norms_of_heads() -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor

    attn = checks.seeded(lambda: Attention(16, heads=2, dim_head=8, qk_norm="layer_norm", processor=AttnProcessor()))
    x = random(2, 5, 16)
    expected = attn(x)
    assert checks.relative(pydiff.optimize(attn)(x), expected) < 2e-5


def test_unbatched_attention_with_a_mask() -> None:
    attn = checks.seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    x, mask = random(5, 8), torch.tensor([False, True, False, False, True])
    expected = attn(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    assert torch.equal(pydiff.optimize(attn)(x, x, x, key_padding_mask=mask, need_weights=False)[0], expected)


# ---------------------------------------------------------------------------- transforms and gradients


def test_transforms_of_torch_func() -> None:
    plain, fused = pair()
    x, v = random(*SHAPE), random(*SHAPE, seed=1)
    tangents = []
    for model in (plain, fused):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            tangents.append(torch.func.jvp(lambda z, model=model: call(model, z), (x,), (v,))[1])
    assert torch.equal(tangents[1], tangents[0])
    several, text = torch.stack([x, v]), random(2, 5, 24)
    assert torch.equal(*(torch.func.vmap(lambda z, m=m: m(z, 3, text)[0])(several) for m in (fused, plain)))
    weights = {k: torch.stack([p, 1.1 * p]) for k, p in plain.named_parameters()}
    results = [
        torch.func.vmap(lambda w, m=m: torch.func.functional_call(m, w, (x, 3, text))[0])(weights)
        for m in (fused, plain)
    ]
    assert torch.equal(*results)


def test_stand_ins_for_parameters_keep_their_memory() -> None:
    plain, fused = pair()
    weights = {k: 1.1 * p for k, p in plain.named_parameters()}
    memory = {k: p.data_ptr() for k, p in weights.items()}
    before, x, text = call(fused), random(*SHAPE), random(2, 5, 24)
    result, expected = (torch.func.functional_call(m, weights, (x, 3, text))[0] for m in (fused, plain))
    assert checks.relative(result, expected) < 2e-5
    assert {k: p.data_ptr() for k, p in weights.items()} == memory
    assert torch.equal(call(fused), before)


def test_gelu_of_what_needs_a_gradient() -> None:
    x = random(2, 4).requires_grad_()
    with torch.no_grad():
        proj = nn.Linear(4, 4).requires_grad_(False)
    linear_gelu(proj, x).sum().backward()
    assert x.grad is not None


# ---------------------------------------------------------------------------- memory and restoring


def strides(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: p.stride() for name, p in model.named_parameters()}


@pytest.mark.parametrize("wanted", [torch.channels_last, torch.contiguous_format])
def test_layouts_are_restored(wanted: torch.memory_format) -> None:
    model = make()
    if wanted is torch.contiguous_format:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
    before, expected = strides(model), call(model)
    call(pydiff.optimize(model, memory_format=wanted))
    assert strides(model) != before
    pydiff.restore(model)
    assert strides(model) == before and torch.equal(call(model), expected)


def test_a_part_first_and_then_the_whole() -> None:
    model: Any = make()
    before, expected = strides(model), call(model)
    for part in (model.mid_block, model.up_blocks[0], model):
        pydiff.optimize(part, memory_format=torch.channels_last)
    assert checks.relative(call(model), expected) < 2e-5
    pydiff.restore(model.down_blocks)
    assert checks.relative(call(model), expected) < 2e-5
    pydiff.restore(pydiff.restore(model))
    assert strides(model) == before and torch.equal(call(model), expected)
    assert not [k for m in model.modules() for k in vars(m) if k.startswith("_pydiff")]


def test_moved_weights_leave_nothing_behind() -> None:
    _, fused = pair()

    def packs() -> list[Any]:
        return [v for m in fused.modules() for k, v in vars(m).items() if k.startswith("_pydiff_packed")]

    assert any(p is not None for p in packs())
    fused.to(torch.bfloat16)
    assert not any(p is not None for p in packs())


def test_parametrized_after_it_was_optimised() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = checks.seeded(lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()))
    pydiff.optimize(model)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Double().eval())
    x = random(2, 8, 3)
    result = model(x)
    pydiff.restore(model)
    assert checks.relative(model(x), result) < 2e-5
    assert not any(pydiff.optimize.swap.is_fused(m) for m in model.modules())


def test_classes_that_register_their_subclasses() -> None:
    registered: list[type] = []

    class Base(nn.Module):
        def __init_subclass__(cls, *, tag: int):
            registered.append(cls)

    class Net(Base, tag=1):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.GroupNorm(2, 8), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(x))

    pydiff.optimize(Net().eval())
    assert registered == [Net]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle(protocol: int) -> None:
    model = pydiff.optimize(checks.seeded(lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())))
    twin = pickle.loads(pickle.dumps(model, protocol))
    assert torch.equal(twin(random(2, 8, 3)), model(random(2, 8, 3)))


# ---------------------------------------------------------------------------- looking at unknown modules


class Observed(nn.Module):
    """Draws random numbers, counts its calls in a buffer and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.seen = nn.GroupNorm(2, 8), nn.SiLU(), []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.calls.add_(1)
        return self.act(self.norm(x + torch.randn(1)))


def test_tracing_has_no_effects() -> None:
    model = Observed().eval().requires_grad_(False)
    state = torch.get_rng_state()
    _, report = pydiff.optimize(model, report=True)
    assert any("while its forward runs" in entry.what for entry in report.replaced)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0 and not model.seen
    model(random(2, 8, 3))
    assert model.calls == 1 and len(model.seen) == 1


def test_instances_of_one_class_that_differ_in_an_attribute() -> None:
    class Scaled(ResBlock):
        factor: float

        def forward(self, *args: Any) -> Tensor:
            return self.factor * super().forward(*args)

    Scaled.__name__ = Scaled.__qualname__ = "ResBlock"
    blocks = [checks.seeded(lambda: Scaled(8, 16, 8, scale_shift=False)) for _ in range(2)]
    blocks[0].factor, blocks[1].factor = 1.0, 2.0
    x, emb = random(2, 8, 4, 4), random(2, 16)
    for block in blocks:
        expected = block(x, emb)
        assert checks.relative(pydiff.optimize(block)(x, emb), expected) < 2e-5


# ---------------------------------------------------------------------------- hoisting


def assert_not_hoisted(model: nn.Module, reason: str) -> None:
    with pytest.warns(UserWarning, match=reason):
        result = sampled(model)
    assert torch.equal(result, sampled(model, hoist=False))


def test_hooks_on_the_model_fire_while_sampling() -> None:
    _, fused = pair()
    seen: list[int] = []
    fused.register_forward_hook(lambda *_: seen.append(1))
    assert_not_hoisted(fused, "hooks")
    assert len(seen) == 4


def test_a_compiled_model_is_what_samples() -> None:
    _, fused = pair()
    runs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph(*args)

        return run

    torch._dynamo.reset()
    compiled: Any = torch.compile(fused, backend=backend)
    assert not isinstance(compiled, Hoistable)
    with pytest.warns(UserWarning, match="none of the models"):
        sampled(compiled)
    assert len(runs) == 2
    fused.compile(backend=backend)
    assert_not_hoisted(fused, "compiled")
    assert len(runs) == 6


def test_a_part_in_training_mode() -> None:
    _, fused = pair()
    fused.down_blocks[0].resnets[0].train()
    assert_not_hoisted(fused, "a part of it is in training mode")


def test_exchanged_blocks() -> None:
    _, fused = pair()
    resnets = fused.up_blocks[0].resnets
    resnets[0] = copy.deepcopy(resnets[0])
    with torch.no_grad():
        resnets[0].time_emb_proj.weight.mul_(3)
    assert_not_hoisted(fused, "exchanged")
    pydiff.optimize(pydiff.restore(fused))
    assert checks.relative(sampled(fused), sampled(fused, hoist=False)) < 2e-5


def test_widths_that_mean_something_else() -> None:
    """The embedding of time and class side by side is as wide as all projections together."""
    model: Any = make(
        num_class_embeds=5, class_embeddings_concat=True, block_out_channels=(24, 40), mid_block_type=None
    )
    resnets: Any = [m for m in model.modules() if type(m).__name__ == "ResnetBlock2D"]
    assert sum(m.out_channels for m in resnets) == resnets[0].time_emb_proj.in_features
    labels = torch.tensor([1, 3])
    expected = call(model, class_labels=labels)
    assert checks.relative(call(pydiff.optimize(model), class_labels=labels), expected) < 2e-5


def test_tables_of_unreasonable_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pydiff.optimize(
        checks.seeded(
            lambda: diffusers.UNet2DModel(
                sample_size=8,
                norm_num_groups=8,
                layers_per_block=1,
                block_out_channels=(16, 32),
                num_class_embeds=5,
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
            )
        )
    )
    times, cond = torch.tensor([5.0, 3.0]), {"class_labels": torch.tensor([1, 2])}
    HoistedModel(model, times, cond, batch=2)
    monkeypatch.setattr(pydiff.optimize.hoisting, "_LARGEST_TABLE", 4096)
    with pytest.raises(CannotHoist, match="GiB"):
        HoistedModel(model, times, cond, batch=2)


def test_conditions_that_are_no_tensors() -> None:
    model = pydiff.optimize(checks.seeded(lambda: UNet((8, 8), (1, 1), (False, False), embedding_dim=16, groups=4)))
    with pytest.raises(CannotHoist, match="tensors"):
        HoistedModel(model, torch.tensor([5.0]), {"labels": [1, 2]}, batch=2)
