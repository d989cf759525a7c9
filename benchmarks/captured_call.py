"""What the host does for a captured loop: the Python between a call of a sampler and the launch of its graph.

    python benchmarks/captured_call.py

Graphs are stand-ins that do nothing, so that no GPU is needed: what CUDA itself takes to copy the tables and to launch
is not in these times (`benchmarks/loop.py --device cuda` measures the whole). call: `sampler(shape, seed=..., cond=...,
check_finite=False)`, 20 steps, all stages in one graph. guard: the part of it that compares the model with what it was
when captured, which grows with the number of modules. SD1.5 is on the meta device, for its guard alone.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pydiff
from benchmarks import harness
from benchmarks.harness import Entry
from benchmarks.loop_models import MODELS
from pydiff.graph.captured import CapturedLoop
from pydiff.graph.guards import Guard

CALLED = ("tabular", "policy", "bundled")


class NoGraphs:
    """A backend of captured loops whose graphs do nothing when they are replayed."""

    def __getattr__(self, name: str) -> Any:
        answers = {
            "available": (True, ""),
            "capturing": False,
            "memory": 0,
            "random_offset": 0,
            "wait": None,
            "new_pool": None,
            "ordered": contextlib.nullcontext(),
        }
        return lambda *arguments: answers[name]

    def warm_up(self, function: Any, device: torch.device) -> None:
        function()

    def watch(self) -> Any:
        return contextlib.nullcontext(SimpleNamespace(problems=(), model=lambda call: call))

    def capture(self, function: Any, *arguments: Any) -> Any:
        function()
        return SimpleNamespace(replay=lambda: None, release=lambda: None)


def call(key: str, smoke: bool) -> Entry:
    case = MODELS[key].build(torch.device("cpu"), torch.float32, smoke=smoke)
    sampler = pydiff.Sampler(case.model, steps=20, prediction=case.prediction)
    sampler.graphs = CapturedLoop("loop", backend=NoGraphs())
    run = partial(sampler, tuple(case.x.shape), seed=0, cond=case.cond, check_finite=False)
    run()
    return Entry(f"call, {key}", run)


def guard(key: str, smoke: bool) -> Entry:
    device = torch.device("meta" if key == "sd15" else "cpu")
    kept = Guard(MODELS[key].build(device, torch.float32, smoke=smoke).model)
    return Entry(f"guard, {key}", kept.holds)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(1)
    environment = harness.environment(torch.device("cpu"))
    harness.warn_if_busy(environment)
    entries = {f"call, {key}": harness.attempt(call, key, arguments.quick) for key in CALLED}
    entries |= {f"guard, {key}": harness.attempt(guard, key, arguments.quick) for key in (*CALLED, "sd15")}
    outcomes = harness.measure(entries, arguments.rounds or (2 if arguments.quick else 50))
    print(
        harness.markdown(
            ["host time", "median (minimum), us"],
            [[name, harness.microseconds(outcome)] for name, outcome in outcomes.items()],
        )
    )
    result = {
        "benchmark": "captured_call",
        "environment": environment,
        "quick": arguments.quick,
        "rows": harness.to_json(outcomes),
    }
    print(f"\nwritten to {harness.save(result, arguments.out)}")
    return result


if __name__ == "__main__":
    main()
