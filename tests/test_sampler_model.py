"""The eager loop around models of every kind: layouts, aliasing, ranks, misbehaviour, grad modes, threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import pydiff

SHAPE = (3, 2, 4, 4)


def per_row(value, x):
    return value.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def toy(x, t):
    """Keeps rows apart bit for bit, is not linear in x, knows the time."""
    return 0.5 * x + 0.25 * per_row(t, x) * x.clamp(-1, 1)


def x_of(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS = {
    "channels_last": lambda m: m.contiguous(memory_format=torch.channels_last),
    "transposed": lambda m: m.transpose(-1, -2).contiguous().transpose(-1, -2),
    "slice": lambda m: torch.stack([m, torch.full_like(m, torch.nan)], -1)[..., 0],
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "negative bit": lambda m: torch.complex(m, -m).conj().imag,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_any_layout_and_dtype_of_output(layout, guidance) -> None:
    y = {"y": torch.zeros(3)}
    plan = pydiff.make_plan("unipc", steps=5, guidance_scale=guidance)

    def rounded(x, t, y):
        m = toy(x, t)
        return LAYOUTS[layout](m).to(m.dtype).contiguous()

    def model(x, t, y):
        return LAYOUTS[layout](toy(x, t))

    x = x_of() * 0.1
    result = pydiff.run_plan(plan, model, x, cond=y, uncond=y)
    assert torch.equal(result, pydiff.run_plan(plan, rounded, x, cond=y, uncond=y))


def test_an_expanded_output() -> None:
    plan = pydiff.make_plan("dpmpp_2m", steps=4)
    result = pydiff.run_plan(plan, lambda x, t: per_row(t, x).expand(x.shape), x_of())
    assert torch.equal(result, pydiff.run_plan(plan, lambda x, t: per_row(t, x) * torch.ones_like(x), x_of()))


@pytest.mark.parametrize("solver", [s.name for s in pydiff.list_solvers()])
def test_a_model_that_returns_its_input(solver) -> None:
    """Output and sample share memory: every combination must still read the old values."""
    for options in ({}, {"guidance_scale": 2.0}, {"clip": 0.5} if not solver.startswith("dpm_solver") else {}):
        if solver == "euler_maruyama" and "clip" in options:
            continue
        plan = pydiff.make_plan(solver, steps=5, **options)
        for model_dtype in (torch.float32, torch.bfloat16):
            both = [
                pydiff.run_plan(plan, model, x_of(), seed=1, uncond={}, model_dtype=model_dtype)
                for model in (lambda x, t: x, lambda x, t: x.clone())
            ]
            assert torch.equal(*both)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "heun"])
def test_a_model_that_returns_views_of_its_input(solver) -> None:
    plan = pydiff.make_plan(solver, steps=5)
    for view in (lambda x: x.flip(0), lambda x: x.transpose(-1, -2), lambda x: x[:1].expand(x.shape)):
        aliased = pydiff.run_plan(plan, lambda x, t, view=view: view(x), x_of())
        assert torch.equal(aliased, pydiff.run_plan(plan, lambda x, t, view=view: view(x.clone()), x_of()))


def test_a_model_that_returns_the_same_buffer_every_time() -> None:
    buffer = torch.empty(SHAPE)
    plan = pydiff.make_plan("dpmpp_3m", steps=6)
    assert torch.equal(
        pydiff.run_plan(plan, lambda x, t: buffer.copy_(toy(x, t)), x_of()), pydiff.run_plan(plan, toy, x_of())
    )


def test_an_output_layout_that_changes_between_calls() -> None:
    calls = []

    def model(x, t):
        calls.append(1)
        m = toy(x, t)
        return [m, m.double(), LAYOUTS["transposed"](m), LAYOUTS["channels_last"](m)][len(calls) % 4]

    plan = pydiff.make_plan("dpmpp_2m", steps=9)
    assert torch.equal(pydiff.run_plan(plan, model, x_of()), pydiff.run_plan(plan, toy, x_of()))


SAMPLES = {
    "vectors": (7,),
    "audio": (2, 33),
    "video": (3, 2, 4, 4),
    "points": (17, 3),
    "numbers": (),
    "six": (1, 2, 1, 3, 1, 2),
    "no elements": (0, 4),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler_ancestral"])
def test_samples_of_any_rank(sample, solver) -> None:
    shape = (3, *SAMPLES[sample])
    result = pydiff.sample(toy, shape, solver=solver, steps=4, seed=1)
    flat = pydiff.sample(toy, (3, int(np.prod(SAMPLES[sample]))), solver=solver, steps=4, seed=1)
    assert result.shape == shape and torch.equal(result.reshape(flat.shape), flat)


def test_an_empty_batch_calls_no_model() -> None:
    calls = []
    for guidance in (1.0, 2.0):
        result = pydiff.sample(
            lambda x, t: calls.append(1) or x, (0, 2, 4), steps=3, guidance_scale=guidance, uncond={}
        )
        assert result.shape == (0, 2, 4) and calls == []
    _, path = pydiff.run_plan(pydiff.make_plan("ddim", steps=3), toy, torch.ones(0, 2), return_trajectory=True)
    assert path.shape == (1, 0, 2)


def test_a_strided_start_is_left_as_it_is() -> None:
    x = x_of((2, 4, 4, 3)).permute(0, 3, 1, 2)
    before = x.clone()
    plan = pydiff.make_plan("unipc", steps=4)
    assert torch.equal(pydiff.run_plan(plan, toy, x), pydiff.run_plan(plan, toy, x.contiguous()))
    assert torch.equal(x, before)


def test_rows_of_different_plans() -> None:
    plans = [
        pydiff.make_plan("dpmpp_2m", steps=7),
        pydiff.make_plan("ddpm", steps=3),
        pydiff.make_plan("unipc", steps=5),
    ]
    result = pydiff.run_plan(plans, toy, x_of(), seed=[1, 2, 3])
    for k, plan in enumerate(plans):
        assert torch.equal(result[k : k + 1], pydiff.run_plan(plan, toy, x_of()[k : k + 1], seed=[k + 1]))


# Models that misbehave.


def test_an_input_changed_in_place_is_noticed() -> None:
    plan = pydiff.make_plan("dpmpp_2m", steps=4)
    with pytest.raises(RuntimeError, match="changed its input in place; return a new tensor"):
        pydiff.run_plan(plan, lambda x, t: x.mul_(0.5), x_of())


@pytest.mark.parametrize("options", [{"model_dtype": torch.bfloat16}, {"guidance_scale": 2.0}], ids=str)
def test_an_input_of_its_own_may_be_changed(options) -> None:
    results = [
        pydiff.Sampler(model, steps=4, **options)(SHAPE, seed=0, uncond={})
        for model in (lambda x, t: x.mul_(0.5), lambda x, t: x * 0.5)
    ]
    assert torch.equal(*results)


def test_an_input_changed_in_inference_mode_is_its_own() -> None:
    with torch.inference_mode():
        changed = pydiff.sample(lambda x, t: x.mul_(0.5), SHAPE, steps=4, seed=0)
    assert torch.equal(changed, pydiff.sample(lambda x, t: x * 0.5, SHAPE, steps=4, seed=0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_output_is_named(value) -> None:
    def model(x, t):
        m = toy(x, t)
        if len(calls) == 2:
            m[1, 0, 0, 0] = value
        calls.append(1)
        return m

    plan, calls = pydiff.make_plan("dpmpp_2m", steps=5), []
    time = f"{plan.model_times[2]:.6g}"
    with pytest.raises(pydiff.NonFiniteError, match=f"at stage 2 .time {time}. in row 1; check its weights") as error:
        pydiff.run_plan(plan, model, x_of())
    assert error.value.rows == {1: 2} and len(calls) == 3
    calls.clear()
    result = pydiff.run_plan(plan, model, x_of(), check_finite=False)
    assert len(calls) == 5 and not torch.isfinite(result[1]).all()
    assert torch.equal(result[[0, 2]], pydiff.run_plan(plan, toy, x_of())[[0, 2]])  # other rows are not touched


def test_a_nonfinite_output_is_named_in_the_plan_of_its_row() -> None:
    plans = [
        pydiff.make_plan("dpmpp_2m", steps=9),
        pydiff.make_plan("ddim", pydiff.EDM(), 3),
        pydiff.make_plan("ddim", steps=2),
    ]
    with pytest.raises(pydiff.NonFiniteError, match=r"stage 0 \(time 80\) in row 1"):
        pydiff.run_plan(plans, lambda x, t: torch.where(per_row(t, x) == 80, torch.nan, x), x_of())


def test_where_the_flags_are_read_at_the_end_the_first_nonfinite_output_is_named(monkeypatch) -> None:
    """As on a GPU, where the host would have to wait for them at every stage."""
    monkeypatch.setattr("pydiff.run.loop._host_flags", lambda state: None)

    def model(x, t):
        m = toy(x, t)
        calls.append(1)
        for row, stage in first.items():
            if len(calls) > stage:
                m[row] = torch.nan
        return m

    plan, calls, first = pydiff.make_plan("ddim", steps=5), [], {0: 3, 1: 1, 2: 2}
    time = f"{plan.model_times[1]:.6g}"
    with pytest.raises(pydiff.NonFiniteError, match=rf"stage 1 \(time {time}\) in row 1 and 2 more rows") as error:
        pydiff.run_plan(plan, model, x_of())
    assert error.value.rows == first and len(calls) == 5


def test_nan_that_is_not_used_is_no_error() -> None:
    plan = pydiff.make_plan("ddim", steps=3, guidance_scale=0.0)

    def model(x, t):
        m = toy(x, t)
        m[3:] = torch.nan  # the conditional half, which guidance 0 leaves out
        return m

    expected = pydiff.run_plan(pydiff.make_plan("ddim", steps=3), toy, x_of())
    assert torch.equal(pydiff.run_plan(plan, model, x_of(), uncond={}), expected)


# Modes and threads.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__)
def test_every_grad_mode_gives_the_same(mode) -> None:
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.full((), 0.5))

        def forward(self, x, t):
            return toy(x, t) * self.w

    net, x = Net(), x_of().requires_grad_()
    expected = pydiff.run_plan(pydiff.make_plan("dpmpp_2m_sde", steps=4), lambda x, t: toy(x, t) * 0.5, x_of(), seed=1)
    with mode():
        result = pydiff.run_plan(pydiff.make_plan("dpmpp_2m_sde", steps=4), net, x, seed=1)
        again = pydiff.Sampler(net, "ddim", 3)(SHAPE, seed=0)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert torch.equal(result, expected) and not result.requires_grad and not again.requires_grad
    assert net.w.requires_grad and x.requires_grad and net.w.grad is None


def test_a_result_keeps_no_history_alive() -> None:
    result = pydiff.sample(toy, SHAPE, solver="unipc", steps=4, seed=0)
    assert result.untyped_storage().nbytes() == result.numel() * 4


def test_a_sampler_has_no_memory() -> None:
    sampler = pydiff.Sampler(toy, solver="euler_ancestral", steps=5)
    first = sampler(SHAPE, seed=1)
    kept = first.clone()
    sampler((2, 9), seed=5)
    assert torch.equal(first, kept) and torch.equal(sampler(SHAPE, seed=1), kept)


def test_threads_do_not_meet() -> None:
    sampler = pydiff.Sampler(toy, solver="dpmpp_2m_sde", steps=8)
    other = pydiff.Sampler(toy, solver="unipc", steps=9)
    expected = {(s, k): s(SHAPE, seed=k) for s in (sampler, other) for k in range(4)}
    results = {}

    def work(s, k):
        for _ in range(5):
            results[s, k] = s(SHAPE, seed=k)

    threads = [threading.Thread(target=work, args=key) for key in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(torch.equal(results[key], expected[key]) for key in expected)


def test_an_output_of_diffusers_is_unwrapped():
    """diffusers' models return an object with the tensor as `.sample`."""

    class Output:
        def __init__(self, sample):
            self.sample = sample

    plain = pydiff.sample(lambda x, t: 0.5 * x, (2, 3), steps=3, seed=0)
    assert torch.equal(pydiff.sample(lambda x, t: Output(0.5 * x), (2, 3), steps=3, seed=0), plain)
