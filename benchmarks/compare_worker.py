"""One of the two sides of `compare.py`: measures the pydiff that comes first on PYTHONPATH, when it is asked to.

    python benchmarks/compare_worker.py DEVICE SECONDS

Writes a line of JSON about itself, then reads the name of a measurement a line and answers with a line of JSON: seconds
an operation, taken from as many runs as fill SECONDS, and a digest of what was computed, so that two sides can be seen
to have done the same. Both sides are timed by the harness of this folder. pydiff is used by its public names alone,
which checkouts of different ages have in common; where the inside is needed, the checkout's own benchmark brings it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import harness
import torch

del sys.path[0]  # this folder, where the harness is; all else is the checkout's
import pydiff  # noqa: E402

STEPS = 20
SHAPES = {"tiny": (1, 4, 8, 8), "big": (64, 4, 128, 128)}


class Measurement(NamedTuple):
    """How to make an entry, whose run returns what it computed; the threads it may use; whether all is digested."""

    make: Callable[[], harness.Entry]
    threads: int
    digested: bool = True


def make_plan(solver: str, steps: int = STEPS) -> Any:
    return pydiff.make_plan(solver, pydiff.DiscreteBetas.named("linear"), steps)


def stages(solver: str, x: torch.Tensor) -> harness.Entry:
    """Steps on a new state, as `stage_update.py` has them."""
    plan, m = make_plan(solver), x.flip(-1) / 10
    kept: list[Any] = []

    def renew() -> None:
        kept[:] = [pydiff.init(plan, x, seed=0)]

    def run() -> Any:
        state = kept[0]
        while not state.finished:
            pydiff.step(state, m)
        return state

    return harness.Entry("step", run, STEPS, renew)


def call(steps: int, x: torch.Tensor) -> harness.Entry:
    """A whole call from shape and seed; with one step, it is nearly its fixed part alone."""
    m = x.flip(-1) / 10
    sampler = pydiff.Sampler(lambda x, t: m, "dpmpp_2m", steps, schedule=pydiff.DiscreteBetas.named("linear"))
    return harness.Entry("call", partial(sampler, tuple(x.shape), seed=0, device=x.device))


def run_plan(x: torch.Tensor) -> harness.Entry:
    m = x.flip(-1) / 10
    return harness.Entry("run_plan", partial(pydiff.run_plan, make_plan("dpmpp_2m"), lambda x, t: m, x, seed=0))


def begin(x: torch.Tensor) -> harness.Entry:
    return harness.Entry("init", partial(pydiff.init, make_plan("dpmpp_2m"), x, seed=0))


def noise(x: torch.Tensor) -> harness.Entry:
    seeds = torch.arange(len(x), device=x.device)
    return harness.Entry("noise", partial(pydiff.initial_noise, tuple(x.shape), seeds))


def captured(key: str) -> harness.Entry:
    """The host's part of the call of a captured loop, as the checkout's own script has it."""
    theirs = importlib.import_module("benchmarks.captured_call").call(key, False)
    return harness.Entry(theirs.name, theirs.run)  # theirs is of the checkout's harness


def measurements(device: torch.device) -> dict[str, Measurement]:
    found: dict[str, Measurement] = {}
    for name, shape in SHAPES.items():
        threads = 1 if name == "tiny" else torch.get_num_threads()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        made = {f"step, {solver}": partial(stages, solver, x) for solver in ("dpmpp_2m", "unipc", "dpmpp_2m_sde")}
        made |= {f"call, {n} step{'s' * (n > 1)}": partial(call, n, x) for n in (1, STEPS)}
        made |= {"run_plan": partial(run_plan, x), "init": partial(begin, x), "noise": partial(noise, x)}
        found |= {f"{what}, {list(shape)}": Measurement(make, threads) for what, make in made.items()}
    for solver in ("dpmpp_2m", "unipc"):
        found[f"make_plan, {solver}"] = Measurement(partial(harness.Entry, "make_plan", partial(make_plan, solver)), 1)
    for key in ("tabular", "bundled"):  # their graphs do nothing: there is nothing to digest
        found[f"captured call, {key}"] = Measurement(partial(captured, key), 1, digested=False)
    return found


def digest(result: Any) -> str:
    """Of a tensor, of the sample of a state, or of a plan's table."""
    if hasattr(result, "weights"):
        data = result.coefficients.tobytes() + result.weights.tobytes()
    else:
        data = getattr(result, "x", result).cpu().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def answer(measurement: Measurement, device: torch.device, seconds: float) -> dict[str, Any]:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else None
    with harness.threads(measurement.threads):
        entry = harness.attempt(measurement.make)
        outcome = harness.measure({"it": entry}, 1, turn=seconds, synchronize=synchronize)["it"]
        if isinstance(outcome, harness.NotMeasured):
            return {"reason": outcome.reason}
        assert isinstance(entry, harness.Entry)
        if entry.before:
            entry.before()
        result = digest(entry.run()) if measurement.digested else None
    return {"seconds": outcome.median, "digest": result}


def compiled() -> dict[str, Any] | None:
    """What is said of the checkout's compiled module; None where there is none."""
    try:
        return dict(importlib.import_module("pydiff._C").build_info())
    except ImportError:
        return None


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything prints is no answer
    device, seconds = torch.device(sys.argv[1]), float(sys.argv[2])
    known = measurements(device)
    about = {"pydiff": pydiff.__file__, "compiled": compiled(), "names": list(known)}
    print(json.dumps(about), file=answers, flush=True)
    with torch.no_grad():
        for line in sys.stdin:
            print(json.dumps(answer(known[line.strip()], device, seconds)), file=answers, flush=True)


if __name__ == "__main__":
    main()
