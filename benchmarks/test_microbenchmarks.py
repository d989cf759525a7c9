"""What pydiff's own pieces cost, to compare one commit with another. Rivals are in the other scripts.

    python -m pytest benchmarks [--benchmark-save NAME] [--benchmark-compare]

The plain test run does not collect this. A time is that of a whole round of work, named in `extra_info`.
"""

from __future__ import annotations

import pytest
import torch

import pydiff
from pydiff.ops.noise import normal
from pydiff.ops.stage import stage

pytest.importorskip("pytest_benchmark")

STEPS = 20
TINY, MID = (1, 4, 8, 8), (8, 4, 128, 128)
SHAPES = pytest.mark.parametrize("shape", [TINY, MID], ids=["tiny", "mid"])
SOLVERS = pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "dpmpp_2m_sde"])


class Loop:
    """A state that a loop has been through, and can be put back to the start."""

    def __init__(self, solver: str, shape: tuple[int, ...]):
        self.x, self.m = torch.randn(shape), torch.randn(shape)
        self.state = pydiff.init(pydiff.make_plan(solver, steps=STEPS), self.x, seed=0)
        self.start = self.state.tensors.cursor.clone()
        self.steps()

    def rewind(self) -> None:
        self.state.tensors.registers[0].copy_(self.x)
        self.state.tensors.cursor.copy_(self.start)
        self.state.stages_done = 0

    def steps(self) -> None:
        while not self.state.finished:
            pydiff.step(self.state, self.m)

    def stages(self) -> None:
        for _ in range(STEPS):
            stage(self.state.tensors, self.m)


@SHAPES
@SOLVERS
def test_step(benchmark, solver, shape):
    loop = Loop(solver, shape)
    benchmark.extra_info["work"] = f"{STEPS} steps"
    benchmark.pedantic(loop.steps, setup=loop.rewind, rounds=50 if shape == TINY else 10, warmup_rounds=2)
    assert loop.state.finished


@SHAPES
def test_stage(benchmark, shape):
    """The operation without the state around it."""
    loop = Loop("dpmpp_2m", shape)
    benchmark.extra_info["work"] = f"{STEPS} stages"
    benchmark.pedantic(loop.stages, setup=loop.rewind, rounds=50 if shape == TINY else 10, warmup_rounds=2)
    assert torch.equal(loop.state.tensors.cursor, loop.state.tensors.stop)


@pytest.mark.parametrize("rows", [1, 64])
def test_first_step(benchmark, rows):
    """The step that looks at every tensor and binds the compiled operation to them."""
    plan, x = pydiff.make_plan("dpmpp_2m", steps=STEPS), torch.randn(rows, 4, 8, 8)
    benchmark.extra_info["work"] = "1 step"

    def fresh() -> tuple[tuple, dict]:
        return (pydiff.init(plan, x, seed=0), x), {}

    benchmark.pedantic(pydiff.step, setup=fresh, rounds=50, warmup_rounds=2)


@pytest.mark.parametrize("rows", [1, 64])
def test_init(benchmark, rows):
    plan, x = pydiff.make_plan("dpmpp_2m", steps=STEPS), torch.randn(rows, 4, 8, 8)
    benchmark.extra_info["work"] = "1 state"
    state = benchmark(pydiff.init, plan, x, seed=0)
    assert torch.equal(state.x, x)


@SOLVERS
def test_make_plan(benchmark, solver):
    schedule = pydiff.DiscreteBetas.named("linear")
    benchmark.extra_info["work"] = "1 plan"
    plan = benchmark(pydiff.make_plan, solver, schedule, STEPS)
    assert len(plan) == STEPS


@SHAPES
def test_normal(benchmark, shape):
    seeds = torch.arange(shape[0])
    benchmark.extra_info["work"] = "1 tensor"
    z = benchmark(normal, seeds, 0, shape[1:])
    assert z.shape == shape


@SHAPES
def test_copy(benchmark, shape):
    """The yardstick: one `copy_` of a tensor of the same shape."""
    x, y = torch.randn(shape), torch.empty(shape)
    benchmark.extra_info["work"] = "1 copy"
    benchmark(y.copy_, x)
