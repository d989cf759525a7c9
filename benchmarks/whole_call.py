"""What a whole call of a sampler costs, its fixed part and its steps, beside diffusers' whole loop, in one run.

    python benchmarks/whole_call.py [--device cuda] [--shapes tiny,big] [--quick] [--out FILE]

From a shape and a seed to the sample, and nothing but the sampler: the model returns a tensor made beforehand.

pydiff      `sampler(shape, seed=0)`: the noise, the state, 20 steps, the check of every output, the sample.
run_plan    `pydiff.run_plan(plan, model, x, seed=0)` on noise that is there.
init        `pydiff.init(plan, x, seed=0)`, with which that begins.
Sampler     making the sampler of a scheduler's config, which no call repeats; diffusers tabulates in `set_timesteps`,
            in every call.
diffusers   `set_timesteps(20)`, noise from a generator times `init_noise_sigma`, and for each time `scale_model_input`,
            the model and `step`, as a pipeline does; `set_begin_index(0)` spares it a search.

Fixed and per step are measured, not derived: both are called with 10, 20, 30 and 40 steps, in turn, and in every round
a line is fitted to the four times. The residual is how far the medians of the four are from their own line, at most;
where it is more than a tenth of the fixed part, the line for README.md leaves both parts out.

Before anything is timed the samples have to be right, for each number of steps, and for 20 with a model that looks at
x and t too: `sampler(shape, seed)` has to be `run_plan` on the same noise, bit for bit, and diffusers' sample has to be
`run_plan` on diffusers' noise, up to 1e-5 of its largest element. Otherwise there are no numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pydiff
from benchmarks import harness
from benchmarks import whole_call_loops as loops
from benchmarks.harness import Entries, Entry, NotMeasured, Outcome, Timing
from benchmarks.stage_update import SHAPES, threads_for
from benchmarks.whole_call_loops import COUNTS, STEPS, Shape

SOLVERS = {"dpmpp_2m": "DPM-Solver++(2M)", "unipc": "UniPC-2", "euler": "Euler"}
SIDES = ("pydiff", "diffusers")
PARTS = ("run_plan", "init", "Sampler")
ROUNDS = {"tiny": 25}
OTHER_ROUNDS = 9
Row = dict[str, Any]  # one solver on one shape


# ------------------------------------------------------------------------------------ the run


def our_entries(solver: str, shape: Shape, device: torch.device) -> Entries:
    names = [*(f"pydiff {n}" for n in COUNTS), *PARTS]
    try:
        model = loops.free(shape, device)
        loops.check_call(solver, shape, device)
        samplers = {n: loops.make_sampler(solver, model, n) for n in COUNTS}
        plan, x = samplers[STEPS].plan, loops.noise(samplers[STEPS], shape, device)
        runs: list[Callable[[], Any]] = [
            *(partial(samplers[n], shape, seed=0, device=device) for n in COUNTS),
            partial(pydiff.run_plan, plan, model, x, seed=0),
            partial(pydiff.init, plan, x, seed=0),
            partial(loops.make_sampler, solver, model, STEPS),
        ]
    except Exception as error:
        return dict.fromkeys(names, harness.failure(error))
    return {name: Entry(name, run) for name, run in zip(names, runs, strict=True)}


def rival_entries(solver: str, shape: Shape, device: torch.device) -> tuple[Entries, float | None]:
    """diffusers' loops, and how far their samples are from pydiff's."""
    names = {n: f"diffusers {n}" for n in COUNTS}
    try:
        model = loops.free(shape, device)
        apart = loops.check_rival(solver, shape, device)
        loop = partial(loops.diffusers_loop, loops.make_scheduler(solver), model, shape=shape, device=device)
    except Exception as error:
        return dict.fromkeys(names.values(), harness.failure(error)), None
    return {name: Entry(name, partial(loop, n)) for n, name in names.items()}, apart


@dataclass
class Split:
    """A call's time as a line in the number of steps; `residual` is in seconds."""

    fixed: Outcome
    step: Outcome
    residual: float | None

    @property
    def is_line(self) -> bool:
        """Whether the fixed part is more than what the times are off their line by: ten times as much."""
        return self.residual is not None and isinstance(self.fixed, Timing) and self.residual < self.fixed.median / 10

    def to_dict(self) -> dict[str, Any]:
        us = None if self.residual is None else 1e6 * self.residual
        return {"fixed": self.fixed.to_dict(), "step": self.step.to_dict(), "residual_us": us}


def split(timings: dict[int, Outcome]) -> Split:
    """Lines through the times of each round and through the minima, and how far the medians are from theirs."""
    known = {n: t for n, t in timings.items() if isinstance(t, Timing)}
    if len(known) < len(timings):
        reason = next(t for t in timings.values() if isinstance(t, NotMeasured))
        return Split(reason, reason, None)
    counts, runs = list(known), sum(t.runs for t in known.values())
    steps, fixed = np.polyfit(counts, [t.rounds for t in known.values()], 1)
    fastest_step, fastest_fixed = np.polyfit(counts, [t.minimum for t in known.values()], 1)
    medians = np.array([t.median for t in known.values()])
    residual = np.abs(np.polyval(np.polyfit(counts, medians, 1), counts) - medians).max()
    return Split(
        Timing(fixed.tolist(), float(fastest_fixed), runs),
        Timing(steps.tolist(), float(fastest_step), runs),
        float(residual),
    )


def run_row(solver: str, shape: Shape, device: torch.device, rounds: int, turn: float) -> Row:
    rivals, apart = rival_entries(solver, shape, device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else None
    entries = our_entries(solver, shape, device) | rivals
    found = harness.measure(entries, rounds, turn=turn, synchronize=synchronize)
    sides = {side: split({n: found[f"{side} {n}"] for n in COUNTS}) for side in SIDES}
    return {
        "solver": solver,
        "shape": list(shape),
        "threads": torch.get_num_threads(),
        "difference": apart,
        "outcomes": found,
        "split": sides,
    }


# ------------------------------------------------------------------------------------ the report


def table(rows: list[Row]) -> str:
    """Microseconds, median (minimum), and the ratio of the medians of 20 steps."""

    def cells(row: Row) -> list[str]:
        found, line = row["outcomes"], [row["solver"]]
        for side in SIDES:
            part = row["split"][side]
            line += [harness.microseconds(o) for o in (found[f"{side} {STEPS}"], part.fixed, part.step)]
            line.append(harness.number(None if part.residual is None else 1e6 * part.residual))
        ratio = harness.ratio(found[f"diffusers {STEPS}"], found[f"pydiff {STEPS}"])
        return [*line, harness.number(ratio), *(harness.microseconds(found[name]) for name in PARTS)]

    sides = (f"{side}: {what}" for side in SIDES for what in (f"{STEPS} steps", "fixed", "a step", "residual"))
    return harness.markdown(["us: median (min)", *sides, "diffusers / pydiff", *PARTS], map(cells, rows))


def duration(seconds: float) -> str:
    """As README.md writes times."""
    us = 1e6 * seconds
    return f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.0f} us" if us >= 100 else f"{us:.1f} us"


def readme_line(row: Row, result: str) -> str:
    """A line of the table in README.md: what, pydiff, compared with, ratio, command, result."""
    found, cells = row["outcomes"], [f"{SOLVERS[row['solver']]}, a whole call of {STEPS} steps, {row['shape']}"]
    for side, name in zip(SIDES, ("", "diffusers' whole loop")):
        whole, part = found[f"{side} {STEPS}"], row["split"][side]
        if isinstance(whole, NotMeasured) or isinstance(part.fixed, NotMeasured):
            cells.append(harness.NOT_MEASURED)
            continue
        parts = [name] if name else []
        if part.is_line:
            parts.append(f"{duration(part.fixed.median)} + {STEPS} x {duration(part.step.median)}")
        cells.append(f"{duration(whole.median)} ({': '.join(parts)})" if parts else duration(whole.median))
    ratio = harness.ratio(found[f"diffusers {STEPS}"], found[f"pydiff {STEPS}"])
    cells.append(harness.NOT_MEASURED if ratio is None else f"{harness.number(ratio)} x")
    return "| " + " | ".join([*cells, f"`{harness.command()}`", f"[json](benchmarks/results/{result})"]) + " |"


def reasons(rows: list[Row]) -> list[str]:
    """Why the numbers that are missing are missing, each reason once."""
    found = (
        f"{harness.NOT_MEASURED}: {row['solver']}, {name.split()[0]}: {outcome.reason}"
        for row in rows
        for name, outcome in row["outcomes"].items()
        if isinstance(outcome, NotMeasured)
    )
    return list(dict.fromkeys(found))


def to_json(row: Row) -> dict[str, Any]:
    return {
        **row,
        "outcomes": harness.to_json(row["outcomes"]),
        "split": {side: part.to_dict() for side, part in row["split"].items()},
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="tiny,big", help=f"some of {', '.join(SHAPES)}, with commas between")
    arguments = parser.parse_args(argv)
    device = harness.device_of(arguments)
    environment, turn = harness.environment(device), 0.0 if arguments.quick else 0.01
    harness.warn_if_busy(environment)
    rows = []
    for name in harness.chosen(arguments.shapes, list(SHAPES), "--shapes"):
        shape, rounds = SHAPES[name], arguments.rounds or (2 if arguments.quick else ROUNDS.get(name, OTHER_ROUNDS))
        with harness.threads(threads_for(shape)):
            found = [run_row(solver, shape, device, rounds, turn) for solver in SOLVERS]
        rows += found
        print(f"\n{list(shape)}, {device.type}, {found[0]['threads']} threads, {rounds} rounds\n\n{table(found)}")
    print("", *reasons(rows), sep="\n")
    result = {
        "benchmark": "whole_call",
        "environment": environment,
        "quick": arguments.quick,
        "steps": STEPS,
        "rows": [to_json(row) for row in rows],
    }
    path = harness.save(result, arguments.out)
    print(*(readme_line(row, path.name) for row in rows), f"\nwritten to {path}", sep="\n")
    return result


if __name__ == "__main__":
    main()
