"""Random sequences of calls of one sampler: with a graph each gives the bits that it gives without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pydiff
from pydiff.graph import buffers
from pydiff.graph.captured import CapturedLoop
from tests.graph.models import Net
from tests.graph.recorded import RecordedGraphs
from tests.graph.test_captured import MODES, eager

SHAPES = [(1,), (2, 3), (3, 2, 4), (4, 2, 2)]
SOLVERS = [s.name for s in pydiff.list_solvers()]
SCHEDULES = [pydiff.VPLinear(), pydiff.EDM(), pydiff.VPCosine()]


def poisoned(write: Any) -> Any:
    """A buffer's `write` that leaves nothing of the run before."""

    def wrapper(self: buffers.Buffers, request: Any) -> None:
        t = self.tensors
        for tensor in (t.registers, t.model_input, t.model_time, t.noise, t.mask, t.known):
            if tensor is not None:
                tensor.fill_(float("nan"))
        self.tables._bytes.fill_(0x7F)
        write(self, request)

    return wrapper


def a_plan(draw: Any, sampler: pydiff.Sampler, **options: Any) -> pydiff.Plan:
    name, steps = draw(st.sampled_from(SOLVERS)), draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16]))
    try:
        return sampler.make_plan(name, steps, guidance_scale=draw(st.sampled_from([0.0, 1.0, 2.0])), **options)
    except ValueError:  # a solver that takes more steps than these
        return sampler.make_plan("ddim", steps, **options)


def a_call(draw: Any, sampler: pydiff.Sampler) -> tuple[Any, dict[str, Any]]:
    """What a sampler is called with."""
    shape = draw(st.sampled_from(SHAPES))
    rows, first = shape[0], shape
    kind = draw(st.sampled_from(["plain", "plan", "rows", "known", "noise", "function", "trajectory"]))
    options: dict[str, Any] = {"seed": [draw(st.integers(0, 99)) for _ in range(rows)], "check_finite": False}
    if kind == "rows":
        options["plan"] = [a_plan(draw, sampler) for _ in range(rows)]
    elif kind in ("plan", "known"):
        options["plan"] = a_plan(draw, sampler, known=kind == "known")
    if kind == "known" and "known" in options["plan"].operands:
        options |= {"mask": torch.rand(shape).round(), "known": torch.randn(1, *shape[1:])}
    if kind in ("noise", "function"):
        plan = options["plan"] = a_plan(draw, sampler)
        noise = torch.randn(plan.num_draws + draw(st.integers(0, 2)) + 1, *shape)
        options["noise"] = noise if kind == "noise" else noise.__getitem__
        if kind == "noise":
            first = torch.randn(shape)
            options.pop("seed")
    options["return_trajectory"] = kind == "trajectory"
    labelled = draw(st.booleans())
    for name in ("cond", "uncond"):
        options[name] = {"labels": torch.randint(0, 5, (rows,))} if labelled else {}
    return first, options


@pytest.fixture(autouse=True, scope="module")
def poison() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers.Buffers, "write", poisoned(buffers.Buffers.write))
        yield


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sequence_of_calls(data: st.DataObject) -> None:
    draw, model = data.draw, Net()
    sampler = pydiff.Sampler(
        model,
        "dpmpp_2m",
        4,
        schedule=draw(st.sampled_from(SCHEDULES)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        model_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        guidance_scale=draw(st.sampled_from([1.0, 2.5])),
    )
    sampler.graphs = CapturedLoop(draw(st.sampled_from(MODES)), draw(st.sampled_from([1, 2, 4])), RecordedGraphs())
    torch.manual_seed(draw(st.integers(0, 99)))
    for _ in range(draw(st.integers(1, 6))):
        first, options = a_call(draw, sampler)
        if draw(st.booleans()):
            with torch.no_grad():
                model.gain.mul_(0.9)
        got, expected = sampler(first, **options), eager(sampler, first, **options)
        pairs = zip(got, expected) if options["return_trajectory"] else [(got, expected)]
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
