"""What a whole sample costs: the loop of small models as diffusers runs it, and as pydiff does in each mode.

    python benchmarks/loop.py [--device cuda] [--models policy,...] [--ways NAMES] [--dtype DTYPE] [--batch N]
    python benchmarks/loop.py --quick          tiny models: shows that it runs, measures nothing

diffusers           DPMSolverMultistepScheduler between eager calls of the model, `set_timesteps` included.
diffusers compiled  the same loop around torch.compile(model, mode="reduce-overhead"). On a CPU with --compile alone.
diffusers graph     the same loop around a hand-made CUDA graph of the model.
pydiff              `Sampler(..., graph=False)`, from x_T to the sample, without a look for NaN at its end.
pydiff stage, loop, device, auto    graph="stage" and so on; optimized: `pydiff.optimize`d, with graph="loop".

A sample is one run of the loop over a batch: 20 steps of DPM-Solver++(2M) on scaled-linear betas from the same x_T,
float32 between the calls, the model in --dtype (on CUDA bfloat16 for the U-Nets, float32 for the others; on a CPU
float32). host: until the call returned. warm-up: from before a way was made to the end of its first run, where a later
one finds libraries loaded. peak, reserved: the memory it took for that and a second run, beside the model and inputs.
idle: the share of a run without a kernel on the device; between stages: the part that follows the stage's own kernel.

Nothing is reported of a model unless diffusers and pydiff make the same calls and the same sample in float32, and
nothing of a way whose sample is another one. Every model's ways are timed in turn, and once more when its compiled
one is there, which comes last.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import harness, loop_rivals
from benchmarks.harness import Entry, NotMeasured, Outcome, Target, Timing
from benchmarks.limits import Budget, at_most
from benchmarks.loop_gaps import profiled_idle_time
from benchmarks.loop_models import MODELS, Case
from benchmarks.loop_rivals import Run
from benchmarks.loop_ways import BOUNDS, WAYS, check_samples, compare, held, refusal
from benchmarks.unet import synchronize

LAUNCH_BOUND = ("policy", "tabular")  # models that the targets are about; they come first
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in BOUNDS}


# ------------------------------------------------------------------------------------ measuring


@dataclass
class Prepared:
    """A way that has made a right sample, and what is known of it so far."""

    run: Run
    found: dict[str, Any]


@dataclass
class Row:
    """A model and the ways of running it."""

    key: str
    case: Case | None
    gate: dict[str, Any]
    refused: NotMeasured | None = None  # why nothing of it can be measured
    first: str = ""  # the way whose sample the others are compared with: the first that made one
    wanted: Tensor | None = None
    ways: dict[str, Prepared | NotMeasured] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)


def open_row(key: str, device: torch.device, arguments: argparse.Namespace, seconds: float) -> Row:
    """The model with its inputs, if diffusers' loop and pydiff's agree on it."""
    model, smoke = MODELS[key], arguments.quick
    dtype = DTYPES.get(arguments.dtype) or (model.cuda_dtype if device.type == "cuda" else torch.float32)
    if device.type == "cpu" and not (model.on_cpu or smoke or arguments.models):
        refused = NotMeasured(f"too large for a CPU; --models {key} runs it all the same")
        return Row(key, None, refused.to_dict(), refused)
    try:
        with at_most(seconds):
            case = model.build(device, dtype, batch=arguments.batch, smoke=smoke)
            try:
                gate = check_samples(model, device, arguments.batch, smoke)
            except ModuleNotFoundError as error:  # no diffusers: there is no speed-up to report either
                gate = harness.failure(error).to_dict()
        return Row(key, case, gate)
    except Exception as error:
        refused = harness.failure(error)
        return Row(key, None, refused.to_dict(), refused)


def prepare(row: Row, name: str, device: torch.device, seconds: float) -> Prepared | NotMeasured:
    """Make a way and run it twice; the reason, where it cannot be made, falls back or makes another sample."""
    way, case = WAYS[name], row.case
    assert case is not None
    try:
        with at_most(seconds), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if way.changes_model:
                case = replace(case, model=copy.deepcopy(case.model))
            before = memory(device)
            began = time.perf_counter()
            run = way.make(case)
            sample = run()
            synchronize(device)
            warm_up = time.perf_counter() - began
            sample = sample.float().cpu()  # the next run may write where this one did
            run()
            synchronize(device)
        said = list(dict.fromkeys(str(w.message) for w in caught if str(w.message).startswith("pydiff")))
        if way.graph and any(word in text for text in said for word in ("graph", "captured", "replayed")):
            return NotMeasured(f"another way was taken: {' '.join(said)[:300]}")
        if row.wanted is None:
            row.first, row.wanted = name, sample
        apart = compare(sample, row.wanted, BOUNDS[case.dtype], f"its sample is not that of {row.first}")
    except Exception as error:
        return harness.failure(error)
    return Prepared(
        run, {"warm_up_s": warm_up, **memory_since(before), "difference": apart, "graphs": held(run), "warnings": said}
    )


def memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes allocated and reserved, with what nobody uses given back; the peak begins anew."""
    gc.collect()
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def memory_since(before: tuple[int, int] | None) -> dict[str, int | None]:
    if before is None:
        return {"peak_bytes": None, "reserved_bytes": None}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() - before[0],
        "reserved_bytes": torch.cuda.memory_reserved() - before[1],
    }


def measure(row: Row, rounds: int, device: torch.device, seconds: float) -> None:
    """Time all ways of a row in turn."""
    if seconds <= 0:
        late = NotMeasured("no time was left for it")
        row.outcomes = {name: row.outcomes.get(name, late) for name in row.ways}
        return
    entries: harness.Entries = {
        name: Entry(name, way.run) if isinstance(way, Prepared) else way for name, way in row.ways.items()
    }
    wait = torch.cuda.synchronize if device.type == "cuda" else None
    row.outcomes = harness.measure(entries, rounds, synchronize=wait)
    for name, way in row.ways.items():
        if isinstance(way, Prepared) and isinstance(row.outcomes[name], Timing) and "device" not in way.found:
            way.found["device"] = device_time(way.run, device)


def device_time(run: Run, device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return NotMeasured("kernels are seen on CUDA alone").to_dict()
    try:
        return profiled_idle_time(run)
    except Exception as error:
        return harness.failure(error).to_dict()


def measure_all(
    keys: list[str], names: list[str], device: torch.device, arguments: argparse.Namespace, rounds: int, budget: Budget
) -> list[Row]:
    """Launch-bound models first, and of each group what is compiled last, since it may use up the time."""
    rows = {}
    for group in ([k for k in keys if k in LAUNCH_BOUND], [k for k in keys if k not in LAUNCH_BOUND]):
        for late in (False, True):
            for key in group:
                if key not in rows:
                    rows[key] = open_row(key, device, arguments, budget.left)
                row, due = rows[key], [name for name in names if WAYS[name].late is late]
                for name in due:
                    row.ways[name] = (
                        row.refused
                        or refusal(WAYS[name], device, arguments.compile)
                        or prepare(row, name, device, budget.left)
                    )
                if not late or any(isinstance(row.ways[name], Prepared) for name in due):
                    measure(row, rounds, device, budget.left)
                row.outcomes |= {name: way for name in due if isinstance(way := row.ways[name], NotMeasured)}
    return [rows[key] for key in keys]


# ------------------------------------------------------------------------------------ the report


def to_dict(row: Row, names: list[str]) -> dict[str, Any]:
    ways: dict[str, Any] = {}
    for name in names:
        way, outcome = row.ways[name], row.outcomes[name]
        ways[name] = outcome.to_dict()
        if isinstance(way, Prepared) and isinstance(outcome, Timing):
            speed_up = harness.ratio(row.outcomes.get("diffusers"), outcome)
            ways[name] = {"sample": outcome.to_dict(), "times_as_fast_as_diffusers": speed_up, **way.found}
    found = {"workload": row.key, "title": MODELS[row.key].title, "gate": row.gate, "ways": ways}
    if row.case is None:
        return found
    case = row.case
    return found | {
        "shape": list(case.x.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in case.model.parameters()),
        "steps": loop_rivals.STEPS,
        "guidance_scale": case.guidance,
        "threads": torch.get_num_threads(),
    }


def overview(rows: list[dict[str, Any]], names: list[str]) -> str:
    def cell(found: dict[str, Any]) -> str:
        if "sample" not in found:
            return harness.NOT_MEASURED
        ratio = found["times_as_fast_as_diffusers"]
        return milliseconds(found["sample"]["median_us"]) + (f" ({harness.number(ratio)} x)" if ratio else "")

    return table(
        ["ms a sample (times as fast as diffusers)", *names],
        [[row["workload"], *(cell(row["ways"][name]) for name in names)] for row in rows],
    )


def details(row: dict[str, Any]) -> list[str]:
    def cells(name: str, found: dict[str, Any]) -> list[str]:
        sample, device = found["sample"], found["device"]
        shares = [device.get(key) for key in ("gap_share", "stage_gap_share")]
        sizes = [found[key] for key in ("peak_bytes", "reserved_bytes")]
        return [
            name,
            milliseconds(sample["median_us"]),
            " to ".join(map(milliseconds, sample["quartiles_us"])),
            harness.number(sample.get("host_median_us")),
            *(harness.number(None if s is None else 100 * s) for s in shares),
            *(harness.number(None if b is None else b / 2**20) for b in sizes),
            harness.number(found["warm_up_s"]),
            harness.number(found["difference"]),
        ]

    header = [
        "way",
        "ms a sample",
        "quartiles",
        "host us",
        "idle %",
        "between stages %",
        "peak MiB",
        "reserved MiB",
        "warm-up s",
        "difference",
    ]
    rows = [cells(*pair) for pair in row["ways"].items() if "sample" in pair[1]]
    return [table(header, rows), ""] if rows else []


def table(header: list[str], rows: list[list[str]]) -> str:
    """Without the columns that nothing was measured for."""
    kept = [k for k in range(len(header)) if any(row[k] != harness.NOT_MEASURED for row in rows)]
    return harness.markdown([header[k] for k in kept], [[row[k] for k in kept] for row in rows])


def milliseconds(microseconds: float) -> str:
    return harness.number(microseconds / 1e3)


def reasons(row: dict[str, Any]) -> list[str]:
    """Why something was not measured: each reason once, with what it concerns."""
    parts = [("the comparison in float32", row["gate"]), *row["ways"].items()]
    parts += [(f"{name}: idle time", found["device"]) for name, found in row["ways"].items() if "device" in found]
    names: dict[str, list[str]] = {}
    for name, found in parts:
        if "reason" in found:
            names.setdefault(found["reason"], []).append(name)
    return [f"{harness.NOT_MEASURED}: {', '.join(concerned)}: {reason}" for reason, concerned in names.items()]


def targets(rows: list[Row]) -> list[Target]:
    found = []
    for key in LAUNCH_BOUND:
        row = next((row for row in rows if row.key == key), Row(key, None, {}))
        times, way = row.outcomes, row.ways.get("pydiff loop")
        loop, device = times.get("pydiff loop"), way.found.get("device", {}) if isinstance(way, Prepared) else {}
        host = Timing(loop.host, min(loop.host), loop.runs) if isinstance(loop, Timing) and loop.host else None
        found += [
            Target(f"{key}: diffusers / pydiff loop", times.get("diffusers"), loop, 5),
            Target(f"{key}: diffusers compiled / pydiff loop", times.get("diffusers compiled"), loop, 1.5),
            Target(f"{key}: host time of pydiff loop / 50 us", host, fixed(50.0), 1, at_least=False),
            Target(
                f"{key}: idle between stages / the whole of pydiff loop",
                fixed(device.get("stage_gaps_us")),
                fixed(device.get("span_us")),
                0.01,
                at_least=False,
            ),
        ]
    return found


def fixed(microseconds: float | None) -> Timing | None:
    return None if microseconds is None else Timing([microseconds / 1e6], microseconds / 1e6, 1)


# ------------------------------------------------------------------------------------ the run


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--models", help=f"some of {', '.join(MODELS)}, with commas between")
    parser.add_argument("--ways", help=f"some of {', '.join(WAYS)}, with commas between")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the models")
    parser.add_argument("--batch", type=int, help="rows of x_T, in place of each model's own number")
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU too, which takes minutes")
    parser.add_argument("--seconds", type=float, help="stop measuring after this long")
    arguments = parser.parse_args(argv)
    if arguments.batch is not None and arguments.batch < 1:
        raise SystemExit(f"--batch: at least 1, got {arguments.batch}")
    return arguments


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    device = harness.device_of(arguments)
    keys = harness.chosen(arguments.models, list(MODELS), "--models")
    names = harness.chosen(arguments.ways, list(WAYS), "--ways")
    budget, environment = Budget(arguments.seconds), harness.environment(device)
    harness.warn_if_busy(environment)
    measured = measure_all(keys, names, device, arguments, arguments.rounds or (2 if arguments.quick else 5), budget)
    rows, judged = [to_dict(row, names) for row in measured], targets(measured)
    for row in rows:
        print("", row["title"], "", *details(row), *reasons(row), sep="\n")
    print(f"\n{overview(rows, names)}\n\n{harness.target_table(judged)}")
    result = {
        "benchmark": "loop",
        "environment": environment | {"triton": harness._version("triton")},
        "quick": arguments.quick,
        "rows": rows,
        "targets": [target.to_dict() for target in judged],
    }
    print(f"\nwritten to {harness.save(result, arguments.out)}")
    return result


if __name__ == "__main__":
    main()
