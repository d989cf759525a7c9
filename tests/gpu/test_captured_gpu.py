"""Captured loops on a CUDA device against the eager loop there, bit for bit: the same kernels on the same data."""

from __future__ import annotations

import threading
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import pydiff
from pydiff.graph.device_loop import can_use_device_loop
from tests.graph.models import ConvNet, Net

pytestmark = pytest.mark.gpu
MODES = ("stage", "loop", "device")
SHAPE, SEEDS = (3, 4, 16, 16), [7, 8, 9]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet().cuda().eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def deterministic():
    """cuDNN must not choose another algorithm between two runs that are compared."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def pair(model: nn.Module, mode: str, solver: str = "dpmpp_2m", steps: int = 7, **options):
    return tuple(pydiff.Sampler(model, solver, steps, graph=graph, **options) for graph in (mode, False))


def check(captured: pydiff.Sampler, eager: pydiff.Sampler, shape=SHAPE, **options) -> None:
    got, expected = captured(shape, **options), eager(shape, **options)
    assert torch.equal(got, expected), (got - expected).abs().max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", [s.name for s in pydiff.list_solvers()])
def test_replay_equals_eager(model, solver, mode):
    captured, eager = pair(model, mode, solver)
    for seed in (SEEDS, [1, 2, 3]):
        check(captured, eager, seed=seed)
    assert captured.stats().captures == 1 and captured.stats().eager == 0
    wanted = mode if mode != "device" or can_use_device_loop(torch.device("cuda:0"))[0] else "stage"
    assert f", {wanted}, " in captured.stats().held[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_change_of_mind_equals_a_fresh_capture(model, mode):
    captured, eager = pair(model, mode, steps=12, guidance_scale=3.0)
    given = {"cond": {"labels": torch.tensor([1, 2, 3], device="cuda")}, "uncond": {"labels": -1}}
    check(captured, eager, seed=SEEDS, **given)
    for solver, steps, scale in (("ddim", 5, 2.0), ("unipc", 12, 7.5), ("dpmpp_2m_sde", 8, 3.0), ("heun", 3, 0.5)):
        plan = captured.make_plan(solver, steps, guidance_scale=scale)
        check(captured, eager, seed=[4, 5, 6], plan=plan, **given)
        fresh = pair(model, mode, solver, steps, guidance_scale=scale)[0]
        assert torch.equal(fresh(SHAPE, seed=[4, 5, 6], **given), captured(SHAPE, seed=[4, 5, 6], plan=plan, **given))
    check(captured, eager, seed=SEEDS, guidance_scale=1.5, **given)
    check(captured, eager, seed=SEEDS, cond={"labels": torch.tensor([5, 6, 7], device="cuda")}, uncond={"labels": 0})
    assert captured.stats().captures == 1


@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(model_dtype):
    torch.manual_seed(0)
    half = ConvNet().to("cuda", model_dtype).eval().requires_grad_(False)
    check(*pair(half, "loop"), seed=SEEDS)
    full = ConvNet().cuda().eval()  # weights that require gradients: those are what autocast's cache keeps
    captured, eager = pair(full, "loop")
    for _ in range(2):
        with torch.autocast("cuda", dtype=model_dtype):
            check(captured, eager, seed=SEEDS)
    with torch.no_grad():
        full.first.weight.mul_(0.5)
    with torch.autocast("cuda", dtype=model_dtype):
        check(captured, eager, seed=SEEDS)
    assert captured.stats().captures == 1


def test_weights_changed_in_place_are_honoured_and_replaced_ones_noticed(model):
    captured, eager = pair(model, "loop")
    check(captured, eager, seed=SEEDS)
    before = model.first.weight.clone()
    model.first.weight.add_(0.1)
    check(captured, eager, seed=SEEDS)
    assert captured.stats().captures == 1
    model.first.weight = nn.Parameter(before, requires_grad=False)
    with pytest.warns(UserWarning, match="first.weight was replaced since the loop was captured"):
        check(captured, eager, seed=SEEDS)
    assert captured.stats().recaptures == 1


@pytest.mark.parametrize("optimised", [False, True])
def test_the_bundled_model_guided_and_optimised(optimised):
    bundled = pydiff.load_model("mnist").cuda()
    bundled = pydiff.optimize(bundled) if optimised else bundled
    given = {"cond": {"labels": torch.tensor([3, 4], device="cuda")}, "uncond": {"labels": 10}}
    for mode in MODES:
        captured, eager = pair(bundled, mode, guidance_scale=2.0)
        got, expected = (s((2, 1, 28, 28), seed=[1, 2], **given) for s in (captured, eager))
        # A hoisted table is computed for as many stages as there is room for, in products of another shape.
        assert torch.allclose(got, expected, atol=2e-5 if optimised else 0, rtol=0)


def test_a_compiled_model():
    compiled = torch.compile(ConvNet().cuda().eval().requires_grad_(False))
    check(*pair(compiled, "loop"), seed=SEEDS)


def note(seen: list[torch.Tensor], info: pydiff.StageInfo) -> None:
    seen.append(info.x.clone())


def test_callbacks_cut_the_loop(model):
    for mode in MODES:
        captured, eager = pair(model, mode, steps=9)
        seen: list[torch.Tensor] = []
        for sampler in (captured, eager):
            sampler(SHAPE, seed=SEEDS, callback=partial(note, seen), callback_stages=4)
        assert len(seen) == 6 and all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:]))


class Syncing(Net):
    def forward(self, x, t):
        return super().forward(x, t) * (1.0 if t[0].item() > 2 else 0.5)


def test_a_model_that_waits_for_the_device_is_named_and_runs_eagerly():
    captured, eager = pair(Syncing().cuda(), "loop")
    with pytest.warns(UserWarning, match="test_captured_gpu.py"):
        check(captured, eager, seed=SEEDS)
    assert captured.stats().eager == 1
    torch.cuda.synchronize()
    torch.empty(1 << 20, device="cuda").normal_()  # the device and its allocator are in order
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(captured, eager, seed=SEEDS)


def test_a_capture_that_breaks_leaves_everything_in_order(model, monkeypatch):
    """What the watch does not see breaks the capture itself."""
    monkeypatch.setattr("pydiff.graph.warm_up.is_compiled", lambda model: True)
    captured, eager = pair(Syncing().cuda(), "loop")
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="runs without a graph"):
        check(captured, eager, seed=SEEDS)
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    torch.randn(1, device="cuda")  # torch's generator no longer believes in a capture
    check(*pair(model, "loop"), seed=SEEDS)


def test_ten_thousand_replays_take_no_more_memory(model):
    captured = pydiff.Sampler(model, "ddim", 2, graph="stage", max_graphs=3)
    shapes = [(1, 4, 8, 8), (2, 4, 8, 8), (1, 4, 16, 16), (1, 4, 8, 16)]

    def run(count: int) -> None:
        for k in range(count):
            shape = shapes[k % 3 if k % 500 else 3]  # the fourth drives out another every time
            captured(shape, seed=k, check_finite=False)
        torch.cuda.synchronize()

    run(1500)
    before = torch.cuda.memory_reserved()
    run(10_000)
    assert torch.cuda.memory_reserved() <= before + (8 << 20)
    assert len(captured.stats().held) == 3
    captured.release()
    assert captured.stats().graphs == 0


def test_threads_and_streams_share_a_sampler(model):
    captured, eager = pair(model, "loop", "dpmpp_2m_sde")
    expected = {seed: eager(SHAPE, seed=[seed, seed, seed]) for seed in range(4)}
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(seed: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                if not torch.equal(captured(SHAPE, seed=[seed] * 3, check_finite=False), expected[seed]):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and captured.stats().captures == 1


def test_a_call_inside_a_capture_is_refused(model):
    captured, eager = pair(model, "loop")
    check(captured, eager, seed=SEEDS)
    with pytest.raises(RuntimeError, match="another capture is under way"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            captured(SHAPE, seed=SEEDS)
    check(captured, eager, seed=SEEDS)


def test_the_host_never_waits():
    captured = pydiff.Sampler(Net().cuda(), "dpmpp_2m", 20, graph="loop")
    for _ in range(3):
        captured((1, 16, 2), seed=1, check_finite=False)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(50):
            captured((1, 16, 2), seed=k, check_finite=False)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_auto_chooses_a_graph_for_a_small_model_and_measures_once(model):
    captured, eager = pair(Net().cuda(), "auto", steps=20)
    check(captured, eager, seed=SEEDS)
    assert captured.stats().captures == 1 and captured.stats().held[0].split(", ")[-3] != "eager"
