"""`check_capturable` finds nothing in the loop of any solver, nor in models that can be captured."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pydiff
from pydiff import check_capturable
from pydiff.check.capturable import check_plan
from pydiff.ops.stage import stage_reference

STOCHASTIC = {
    "ddim": {"eta": 0.7},
    "euler": {"s_churn": 4.0},
    "heun": {"s_churn": 4.0},
    "euler_maruyama": {"last_noise": True},
    "dpmpp_2m_sde": {"solver_type": "heun"},
}
SOLVERS = [(entry.name, {}) for entry in pydiff.list_solvers()] + list(STOCHASTIC.items())
IDS = [name + "".join(f"-{key}" for key in options) for name, options in SOLVERS]


class Block(nn.Module):
    """Two convolutions with a scale and a shift by the condition between them."""

    def __init__(self, inputs: int, outputs: int, condition: int):
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(inputs, outputs, 5, padding=2), nn.GroupNorm(2, outputs), nn.Mish())
        self.second = nn.Sequential(nn.Conv1d(outputs, outputs, 5, padding=2), nn.GroupNorm(2, outputs), nn.Mish())
        self.film = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * outputs))
        self.skip = nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[..., None].chunk(2, 1)
        return self.second(scale * self.first(x) + shift) + self.skip(x)


class PolicyNet(nn.Module):
    """A diffusion policy's U-Net in small: actions [B, 2, steps], conditioned on what the robot sees [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 8), nn.Mish(), nn.Linear(8, 8))
        self.down, self.middle, self.up = Block(2, 8, 11), Block(8, 8, 11), Block(16, 8, 11)
        self.shrink, self.grow = nn.Conv1d(8, 8, 3, 2, 1), nn.ConvTranspose1d(8, 8, 4, 2, 1)
        self.last = nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor, t: Tensor, seen: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(4, device=x.device, dtype=x.dtype))
        angles = t[:, None].to(x.dtype) * frequencies
        condition = torch.cat([self.time(torch.cat([angles.sin(), angles.cos()], -1)), seen], -1)
        h = self.down(x, condition)
        h = torch.cat([h, self.grow(self.middle(self.shrink(h), condition))], 1)
        return self.last(self.up(h, condition))


class Tokens(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x) + t[:, None]


def diffusers_unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return (
        diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        .eval()
        .requires_grad_(False)
    )


@functools.cache
def workload(name: str) -> tuple[nn.Module, tuple[int, ...], dict[str, Any], dict[str, Any]]:
    """A model, the shape of x, a condition and an empty one."""
    if name.startswith("mnist"):
        model, shape = pydiff.load_model("mnist"), (2, 1, 28, 28)
        cond, uncond = {"labels": torch.tensor([3, 4])}, {"labels": torch.tensor([10])}
    elif name.startswith("diffusers"):
        model, shape = diffusers_unet(), (2, 4, 8, 8)
        cond, uncond = ({"encoder_hidden_states": f(2, 5, 12)} for f in (torch.ones, torch.zeros))
    else:
        model, shape = PolicyNet(), (2, 2, 16)
        cond, uncond = {"seen": torch.ones(2, 3)}, {"seen": torch.zeros(1, 3)}
    return (pydiff.optimize(model) if name.endswith("optimized") else model), shape, cond, uncond


def assert_capturable(name: str, solver: str, *, steps: int = 3, guided: bool = True, **options: Any) -> None:
    """The plan runs with guidance, inpainting and, on the host, nothing that waits, copies or allocates."""
    model, shape, cond, uncond = workload(name)
    plan = pydiff.make_plan(
        solver, pydiff.VPLinear(), steps, known=True, guidance_scale=3.0 if guided else 1.0, **options
    )
    report = check_plan(
        plan,
        model,
        torch.zeros(shape),
        cond=cond,
        uncond=uncond if guided else None,
        mask=torch.ones(shape[1:]),
        known=torch.zeros(shape),
        allocations=True,
    )
    assert report.ok, str(report)
    assert report.calls == len(plan) and report.operators > 5 * report.calls


@pytest.mark.parametrize("solver, options", SOLVERS, ids=IDS)
def test_every_solver_on_a_policy_net(solver, options):
    assert_capturable("policy", solver, **options)


@pytest.mark.parametrize("solver, options", SOLVERS, ids=IDS)
def test_every_solver_on_the_bundled_model(solver, options):
    assert_capturable("mnist", solver, guided=False, **options)


@pytest.mark.parametrize("solver, options", SOLVERS, ids=IDS)
def test_every_solver_on_a_diffusers_unet(solver, options):
    calls = len(pydiff.make_plan(solver, pydiff.VPLinear(), 3))
    assert_capturable("diffusers", solver, steps=3 if calls == 3 else 2, **options)  # three calls at least are compared


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("name", ["diffusers optimized", "mnist optimized"])
def test_optimized_models(name, solver):
    assert_capturable(name, solver)


def test_an_optimized_model_is_watched_in_its_hoisted_form():
    def operators(name: str) -> int:
        model, shape, cond, _ = workload(name)
        return check_capturable(model, shape, cond=cond).operators

    model, shape, cond, _ = workload("diffusers optimized")
    unhoisted = check_capturable(lambda x, t, **cond: model(x, t, **cond), shape, cond=cond).operators
    assert operators("diffusers optimized") < unhoisted < operators("diffusers")


def test_a_sampler_a_tensor_and_plain_functions():
    model = workload("mnist")[0]
    x = torch.zeros(2, 1, 28, 28, dtype=torch.float64)
    for sampler in (pydiff.Sampler(model, "heun", 4), pydiff.Sampler(model, "ddim", 3, model_dtype=torch.float32)):
        report = check_capturable(sampler, x)
        assert report and report.calls == len(sampler.plan)
    assert check_capturable(lambda x, t: model(x, t), x.shape, solver="euler", model_dtype=torch.float32)
    assert check_capturable(functools.partial(lambda net, x, t: net(x, t), model), x.shape)
    assert check_capturable(model.forward, x.shape)


def test_a_model_without_memory_and_one_in_low_precision():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2**15, 2**15) for _ in range(4)))  # 16 GiB
    assert check_capturable(lambda x, t: model(x), (2, 2**15), model_dtype=torch.float32)
    low = nn.Linear(4, 4).bfloat16()
    assert check_capturable(lambda x, t: low(x), (2, 4), model_dtype=torch.bfloat16)
    assert low.weight.device.type == "cpu" and type(low.weight) is nn.Parameter


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_is_watched_as_it_was_written(fullgraph):
    model, options = nn.Linear(4, 4), {"backend": "eager", "fullgraph": fullgraph}

    def waits(x: Tensor, t: Tensor) -> Tensor:
        return model(x) if x.sum() > 0 else x

    plain = torch.compile(lambda x, t: model(x), **options)
    assert plain(torch.zeros(2, 4), torch.zeros(2)).shape == (2, 4)
    assert check_capturable(plain, (2, 4)) and check_capturable(lambda x, t: plain(x, t), (2, 4))
    (problem,) = check_capturable(torch.compile(waits, **options), (2, 4)).problems
    assert problem.code == "return model(x) if x.sum() > 0 else x"
    compiled = torch.compile(Tokens(), **options)
    assert check_capturable(compiled, (2, 4)) and check_capturable(pydiff.Sampler(compiled, "euler", 3), (2, 4))


def test_layers_that_torch_writes_in_python():
    layer = nn.TransformerDecoderLayer(8, 2, batch_first=True).eval()
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    assert check_capturable(lambda x, t: layer(x, attention(x, x, x)[0]), (2, 5, 8))
    causal = torch.ones(5, 5).triu(1).bool()

    def model(x: Tensor, t: Tensor) -> Tensor:
        y = F.pad(x, (0, 0, 1, 0))[:, :-1]
        y[:, 0] = 1.0
        y[..., 0] += y[..., 1]
        scores = (y @ y.mT).masked_fill(causal, -1e9)
        y[y > 0] = 0.0  # a number: no operator asks which elements these are
        return F.interpolate(scores.softmax(-1) @ y, scale_factor=1.0) + F.one_hot(t.long().clamp(0, 7), 8)[:, None]

    report = check_capturable(model, (2, 5, 8))
    assert report, str(report)


@pytest.mark.parametrize("guided", [False, True])
def test_the_stage_in_plain_pytorch_allocates_and_does_no_more(monkeypatch, guided):
    monkeypatch.setattr("pydiff.run.state.stage", stage_reference)
    model, shape, cond, uncond = workload("policy")
    plan = pydiff.make_plan("dpmpp_2m_sde", pydiff.VPLinear(), 3, guidance_scale=3.0 if guided else 1.0)
    inputs = {"cond": cond, "uncond": uncond if guided else None}
    assert check_plan(plan, model, torch.zeros(shape), **inputs)
    problems = check_plan(plan, model, torch.zeros(shape), **inputs, allocations=True).problems
    assert {p.kind for p in problems} == {"allocation"} and len(problems) > 10
    assert {Path(p.file).stem for p in problems} == {"reference", "noise"}


def test_threads_may_check_at_the_same_time():
    model, found = workload("policy")[0], []

    def check() -> None:
        found.append(check_capturable(lambda x, t: model(x, t, x[:, 0, :3]), (2, 2, 16)).ok)

    threads = [threading.Thread(target=check) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((3, (2, 4)), {}, "model must be callable"),
        ((lambda x, t: x, 4), {}, r"x \(a tensor, or its shape\) must be \[batch, \*sample\], .* got 4"),
        ((lambda x, t: x, (2, 1.5)), {}, r"x \(a tensor, or its shape\) must be"),
        ((lambda x, t: x, torch.zeros(2, 4, dtype=torch.int32)), {}, "x must be a floating-point tensor"),
        ((lambda x, t: x, (2, 4)), {"cond": [1]}, "cond must be a mapping"),
        ((lambda x, t: x, (2, 4)), {"solver": "no_such"}, "no_such"),
        ((lambda x, t: x, (2, 4)), {"nonsense": 1}, "nonsense"),
        ((lambda x, t: x, (2, 4)), {"guidance_scale": 3.0}, "give uncond="),
        (
            (pydiff.Sampler(lambda x, t: x, "euler", 3), (2, 4)),
            {"solver": "euler"},
            "a Sampler has its options already",
        ),
    ],
)
def test_bad_input_is_named_before_anything_runs(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        check_capturable(*arguments, **options)
