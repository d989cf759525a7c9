"""pydiff's kernels beside PyTorch's, on the shapes of U-Nets and a VAE decoder, weighted by how often each is called.

    python benchmarks/kernels.py --device cuda [--models sd15_512_b2,...] [--seconds N] [--out FILE]
    python benchmarks/kernels.py --smoke              small shapes on the CPU: shows that it runs, measures nothing

pydiff      the public operation (`pydiff kernel`: its Triton kernel, where the operation chooses among several).
eager       PyTorch's separate operations on the same tensors; `eager NCHW` on contiguous ones.
compile     torch.compile of eager (Inductor, max-autotune-no-cudagraphs, static shapes).
cuDNN, flash, efficient: the backends of `scaled_dot_product_attention`; eager takes the one PyTorch chooses.

bfloat16. On CUDA a time is that of a graph's replay, so the host does not count. `cold`: as many sets of inputs in turn
as are larger than the cache together; `hot`: one set again and again. The limit is the larger of two: the bytes that
must move over the bandwidth of a copy measured in this run, and the FLOPs over 790 TFLOP/s, what dense bfloat16
products reach on an H200. Rows are measured by the time that their limit takes in one call of the model, longest
first, and compiled forms after everything else, until `--seconds` are over.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import graph_timing, harness, kernels_rows
from benchmarks.harness import Entries, Entry, NotMeasured, Outcome, Timing
from benchmarks.kernels_rows import Prepared, Row
from benchmarks.limits import Budget, at_most
from pydiff.ops import triton_ops

FLOPS = 790e12  # dense bfloat16 on an H200, measured on square products
ROTATED_BYTES = 256 << 20  # of inputs: several times the cache
MOST_SETS, HOT_CALLS = 64, 20
COPY_BYTES = 1 << 30
COMPILE_SECONDS = 60.0  # the most that one row's compilation may take
TEMPERATURES = ("cold", "hot")
Found = dict[str, dict[str, Outcome]]  # by temperature, then by name


@contextlib.contextmanager
def no_reference() -> Iterator[None]:
    """On a CUDA device an operation that would take its reference raises: the time would not be its kernel's."""

    def refused(op: str, x: torch.Tensor, reason: str) -> None:
        if x.is_cuda:
            raise RuntimeError(f"no kernel for it: {reason}")

    before, triton_ops.refused = triton_ops.refused, refused
    try:
        yield
    finally:
        triton_ops.refused = before


def entries_for(row: Row, runs: dict[str, Callable[..., Any]], sets: list[list[torch.Tensor]]) -> dict[str, Entries]:
    """An entry for each run, over all sets of tensors, and over the first one only."""
    found: dict[str, Entries] = {temperature: {} for temperature in TEMPERATURES}
    for name, run in runs.items():
        prepared = [run.prepare(s) for s in sets] if isinstance(run, Prepared) else sets
        turns = {"cold": prepared, "hot": prepared[:1] * (HOT_CALLS if sets[0][0].is_cuda else 1)}
        for temperature, tensors in turns.items():

            def loop(run: Callable[..., Any] = run, tensors: list[list[torch.Tensor]] = tensors) -> None:
                for t in tensors:
                    run(*t)

            found[temperature][name] = Entry(name, loop, len(tensors))
    return found


def measure_row(
    row: Row, runs: dict[str, Callable[..., Any]], device: torch.device, dtype: torch.dtype, rounds: int
) -> Found:
    size = row.elements * dtype.itemsize
    count = max(1, min(MOST_SETS, -(-ROTATED_BYTES // size))) if device.type == "cuda" else 1
    try:
        entries = entries_for(row, runs, [row.make(device, dtype) for _ in range(count)])
    except torch.OutOfMemoryError as error:
        return {t: {name: harness.failure(error) for name in runs} for t in TEMPERATURES}
    with no_reference(), torch.no_grad():
        if device.type == "cuda":
            found = {t: graph_timing.measure_device(e, rounds) for t, e in entries.items()}
            torch.cuda.empty_cache()
            return found
        return {t: harness.measure(e, rounds, turn=0.0) for t, e in entries.items()}


def measure_compiled(row: Row, device: torch.device, dtype: torch.dtype, rounds: int, seconds: float) -> Found:
    torch._dynamo.reset()  # so that no row meets the limit of recompilations
    compiled = torch.compile(row.runs["eager"], mode="max-autotune-no-cudagraphs", dynamic=False)
    try:
        with at_most(min(COMPILE_SECONDS, seconds)):
            with torch.no_grad():
                compiled(*row.make(device, dtype))
            return measure_row(row, {"compile": compiled}, device, dtype, rounds)
    except Exception as error:
        return unmeasured(["compile"], harness.failure(error).reason)


def unmeasured(names: list[str], reason: str) -> Found:
    return {t: {name: NotMeasured(reason) for name in names} for t in TEMPERATURES}


def copy_bandwidth(device: torch.device, rounds: int, size: int = COPY_BYTES) -> float:
    """Bytes a second that a copy reads and writes."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).zero_() for _ in range(2))
    entries: Entries = {"copy_": Entry("copy_", lambda: target.copy_(source))}
    outcome = (
        graph_timing.measure_device(entries, rounds)
        if device.type == "cuda"
        else harness.measure(entries, rounds, turn=0.0)
    )["copy_"]
    if not isinstance(outcome, Timing):
        raise SystemExit(f"the copy that the limits refer to could not be measured: {outcome.reason}")
    return 2 * size / outcome.median


def limit_seconds(row: Row, bandwidth: float, itemsize: int) -> float:
    """The least that this row can take on the device."""
    return max(row.elements * itemsize / bandwidth, row.flops / FLOPS)


# ------------------------------------------------------------------------------------ the report


def best_other(found: dict[str, Outcome]) -> tuple[str, Timing] | None:
    """The fastest that is not pydiff's."""
    rivals = [(name, o) for name, o in found.items() if not name.startswith("pydiff") and isinstance(o, Timing)]
    return min(rivals, key=lambda rival: rival[1].median, default=None)


def rate(row: Row, seconds: float, itemsize: int) -> str:
    if row.flops:
        return f"{harness.number(row.flops / seconds / 1e12)} TFLOP/s"
    return f"{harness.number(row.elements * itemsize / seconds / 1e9)} GB/s"


def table(measured: list[tuple[Row, Found]], bandwidth: float, itemsize: int) -> str:
    def cells(row: Row, found: Found) -> list[str]:
        cold, hot = found["cold"], found["hot"]
        ours, rival = cold["pydiff"], best_other(cold)
        reached = [harness.NOT_MEASURED] * 2
        if isinstance(ours, Timing):
            share = limit_seconds(row, bandwidth, itemsize) / ours.median
            reached = [rate(row, ours.median, itemsize), f"{share:.0%}"]
        ratio = harness.number(harness.ratio(rival[1], ours)) if rival else harness.NOT_MEASURED
        times = [
            microseconds(found.get(name))
            for found, name in ((cold, "pydiff"), (hot, "pydiff"), (cold, "eager"), (hot, "eager"), (cold, "compile"))
        ]
        named = f"{microseconds(rival[1])} {rival[0]}" if rival else harness.NOT_MEASURED
        return [row.workload, row.family, row.shape, str(row.calls), *times, named, ratio, *reached]

    header = [
        "model",
        "operation",
        "shape",
        "calls",
        "pydiff: us cold",
        "hot",
        "eager: us cold",
        "hot",
        "compile: us cold",
        "best other, cold",
        "best other / pydiff",
        "reached",
        "of the limit",
    ]
    return harness.markdown(header, [cells(*pair) for pair in measured])


def microseconds(outcome: Outcome | None) -> str:
    return harness.number(1e6 * outcome.median) if isinstance(outcome, Timing) else harness.NOT_MEASURED


def totals(measured: list[tuple[Row, Found]], bandwidth: float, itemsize: int) -> list[dict[str, Any]]:
    """Microseconds that each family takes in one call of a model: a sum over its rows where all were measured."""
    groups: dict[tuple[str, str], list[tuple[Row, Found]]] = {}
    for row, found in measured:
        groups.setdefault((row.workload, row.family), []).append((row, found))
    result = []
    for (workload, family), members in groups.items():
        sums: dict[str, float | None] = {}
        for name in ("pydiff", "eager", "compile", "best other"):
            times = []
            for row, found in members:
                other = best_other(found["cold"])
                outcome = (other[1] if other else None) if name == "best other" else found["cold"].get(name)
                times.append(row.calls * outcome.median if isinstance(outcome, Timing) else None)
            sums[name] = None if None in times else 1e6 * sum(t for t in times if t is not None)
        limit = 1e6 * sum(row.calls * limit_seconds(row, bandwidth, itemsize) for row, _ in members)
        result.append(
            {
                "workload": workload,
                "family": family,
                "calls": sum(row.calls for row, _ in members),
                "limit_us": limit,
                "cold_us": sums,
            }
        )
    return result


def totals_table(sums: list[dict[str, Any]]) -> str:
    names = ("pydiff", "eager", "compile", "best other")
    rows = [
        [
            s["workload"],
            s["family"],
            str(s["calls"]),
            harness.number(s["limit_us"]),
            *(harness.number(s["cold_us"][name]) for name in names),
        ]
        for s in sums
    ]
    return harness.markdown(["model", "us in one call of it", "calls", "limit", *names], rows)


def reasons(measured: list[tuple[Row, Found]]) -> list[str]:
    """Why the numbers that are missing are missing, each reason once."""
    found: dict[str, int] = {}
    for row, outcomes in measured:
        for name, outcome in outcomes["cold"].items():
            if isinstance(outcome, NotMeasured):
                key = f"{row.family}, {name}: {outcome.reason}"
                found[key] = found.get(key, 0) + 1
    return [f"{harness.NOT_MEASURED}: {key} ({count} shapes)" for key, count in found.items()]


def to_json(row: Row, found: Found, bandwidth: float, itemsize: int) -> dict[str, Any]:
    limit = limit_seconds(row, bandwidth, itemsize)
    outcomes = {t: harness.to_json(o) for t, o in found.items()}
    for temperature, by_name in found.items():
        for name, outcome in by_name.items():
            if isinstance(outcome, Timing):
                outcomes[temperature][name] |= {
                    "share_of_limit": limit / outcome.median,
                    "ratio_to_pydiff": harness.ratio(outcome, by_name["pydiff"]),
                }
    return {
        "workload": row.workload,
        "family": row.family,
        "shape": row.shape,
        "calls": row.calls,
        "bytes": row.elements * itemsize,
        "flops": row.flops,
        "limit_us": 1e6 * limit,
        "outcomes": outcomes,
    }


# ------------------------------------------------------------------------------------ the run


def run(
    rows: list[Row], device: torch.device, dtype: torch.dtype, rounds: int, budget: Budget, compiling: bool
) -> list[tuple[Row, Found]]:
    """Everything but the compiled forms for every row, then those, while there is time."""
    measured = []
    for row in rows:
        if budget.left > 0:
            found = measure_row(row, row.runs, device, dtype, rounds)
        else:
            found = unmeasured(list(row.runs), "no time was left for it")
        measured.append((row, found))
    for row, found in measured:
        if row.family.startswith("attention"):
            late = unmeasured(["compile"], "compiled code calls the same attention")
        elif compiling:
            late = measure_compiled(row, device, dtype, rounds, budget.left)
        else:
            late = unmeasured(["compile"], "on the CPU nothing is compiled")
        for temperature in TEMPERATURES:
            found[temperature] |= late[temperature]
    return measured


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--models", help="some of the models in unet_shapes.json, with commas between")
    parser.add_argument("--families", help=f"some of {', '.join(kernels_rows.FAMILIES)}, with commas between")
    parser.add_argument("--smoke", action="store_true", help="one small shape of each kind")
    parser.add_argument("--seconds", type=float, help="stop measuring after this long")
    arguments = parser.parse_args(argv)
    device = harness.device_of(arguments)
    if device.type == "cpu" and not arguments.smoke:
        raise SystemExit("the shapes are those of large models: give --device cuda, or --smoke for small ones")
    budget, environment = Budget(arguments.seconds), harness.environment(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rounds = arguments.rounds or (2 if arguments.quick or arguments.smoke else 7)
    bandwidth = copy_bandwidth(device, rounds, COPY_BYTES if device.type == "cuda" else 1 << 20)
    models = harness.chosen(arguments.models, list(kernels_rows.shapes()), "--models")
    rows = kernels_rows.rows(models, smoke=arguments.smoke)
    if arguments.families:
        rows = [row for row in rows if row.family in arguments.families.split(",")]
    rows.sort(key=lambda row: -row.calls * limit_seconds(row, bandwidth, dtype.itemsize))
    measured = run(rows, device, dtype, rounds, budget, compiling=device.type == "cuda")
    sums = totals(measured, bandwidth, dtype.itemsize)
    print(f"a copy moves {bandwidth / 1e9:.0f} GB/s\n\n{table(measured, bandwidth, dtype.itemsize)}\n")
    print(totals_table(sums), "", *reasons(measured), sep="\n")
    result = {
        "benchmark": "kernels",
        "environment": environment | {"triton": harness._version("triton")},
        "quick": arguments.quick or arguments.smoke,
        "dtype": str(dtype),
        "copy_bytes_per_second": bandwidth,
        "flops_per_second": FLOPS,
        "totals": sums,
        "rows": [to_json(row, found, bandwidth, dtype.itemsize) for row, found in measured],
    }
    print(f"\nwritten to {harness.save(result, arguments.out)}")
    return result


if __name__ == "__main__":
    main()
