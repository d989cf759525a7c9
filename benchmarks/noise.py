"""Standard normals: pydiff's counter-based noise beside torch's own generator, in one run.

    python benchmarks/noise.py [--device cuda] [--quick] [--out FILE]

pydiff fill  writes draw after draw into one tensor, as `Tensor.normal_` does: the pair that is judged.
pydiff       `pydiff.ops.noise.normal`, which returns a new tensor, as `torch.randn` does.

Every size is measured with one thread and with all of them. In a step of a stochastic sampler the noise is
not even written: `stage_update.py` has that.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import graph_timing, harness
from benchmarks.harness import Entries, Entry, NotMeasured, Outcome, Target
from pydiff.ops.noise import can_use_native, fill_native, normal

SHAPES = ((1, 4, 8, 8), (1, 4, 64, 64), (8, 4, 128, 128), (64, 4, 128, 128))
PAST_CACHE = (1024, 4, 128, 128)  # for GPUs
COLUMNS = ("pydiff fill", "normal_", "pydiff", "randn")

Shape = tuple[int, ...]


def entries_for(shape: Shape, device: torch.device) -> Entries:
    seeds = torch.arange(shape[0], device=device)
    generator = torch.Generator(device).manual_seed(0)
    ours, theirs = (torch.empty(shape, device=device).zero_() for _ in range(2))
    draw = itertools.count()
    per = max(1, min(20, 2**20 // ours.numel()))

    def repeated(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            for _ in range(per):
                function()

        return run

    generators = [generator] if device.type == "cuda" else []
    rivals = {
        "normal_": lambda: theirs.normal_(generator=generator),
        "randn": lambda: torch.randn(shape, generator=generator, device=device),
    }
    entries: Entries = {k: Entry(k, repeated(f), per, generators=generators) for k, f in rivals.items()}
    entries["pydiff"] = Entry("pydiff", repeated(lambda: normal(seeds, next(draw), shape[1:])), per)
    fast, reason = can_use_native(device)
    if fast:
        fill = repeated(lambda: fill_native(ours, seeds, next(draw)))
        entries["pydiff fill"] = Entry("pydiff fill", fill, per)
    else:
        entries["pydiff fill"] = NotMeasured(f"plain PyTorch runs, which has no such form: {reason}")
    return {name: entries[name] for name in COLUMNS}


def measure_size(shape: Shape, device: torch.device, rounds: int, turn: float) -> dict[str, Outcome]:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else None
    return harness.measure(entries_for(shape, device), rounds, turn=turn, synchronize=synchronize)


def report(rows: list[dict[str, Any]]) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        found = row["outcomes"]
        times = (harness.microseconds(found[k]) for k in COLUMNS)
        return [
            str(row["shape"]),
            row["where"],
            *times,
            harness.number(harness.ratio(found["normal_"], found["pydiff fill"])),
            harness.number(harness.ratio(found["randn"], found["pydiff"])),
        ]

    header = ["us a tensor: median (min)", "", *COLUMNS, "normal_ / pydiff fill", "randn / pydiff"]
    return harness.markdown(header, map(cells, rows))


def collect(device: torch.device, rounds: int, turn: float) -> list[dict[str, Any]]:
    """Every size, on the CPU with one thread and with all, on CUDA with and without the host."""
    rows: list[dict[str, Any]] = []

    def add(shape: Shape, where: str, found: dict[str, Outcome]) -> None:
        rows.append({"shape": list(shape), "threads": torch.get_num_threads(), "where": where, "outcomes": found})

    if device.type == "cuda":
        for shape in (*SHAPES, PAST_CACHE):
            add(shape, "with the host", measure_size(shape, device, rounds, turn))
            add(shape, "device alone", graph_timing.measure_device(entries_for(shape, device), rounds))
        return rows
    for shape, threads in itertools.product(SHAPES, dict.fromkeys((1, torch.get_num_threads()))):
        with harness.threads(threads):
            add(shape, f"threads: {threads}", measure_size(shape, device, rounds, turn))
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args(argv)
    device = harness.device_of(arguments)
    environment = harness.environment(device)
    harness.warn_if_busy(environment)
    rounds = arguments.rounds or (2 if arguments.quick else 15)
    rows = collect(device, rounds, 0.0 if arguments.quick else 0.01)
    print(report(rows))
    judged = []
    if device.type == "cpu":
        last = rows[-1]["outcomes"]
        judged = [
            Target(
                "normals, 16 MiB, all threads: times faster than Tensor.normal_",
                last["normal_"],
                last["pydiff fill"],
                5,
            )
        ]
        print(f"\n{harness.target_table(judged)}")
    result = {
        "benchmark": "noise",
        "environment": environment,
        "quick": arguments.quick,
        "rounds": rounds,
        "rows": [{**row, "outcomes": harness.to_json(row["outcomes"])} for row in rows],
        "targets": [target.to_dict() for target in judged],
    }
    print(f"\nwritten to {harness.save(result, arguments.out)}")
    return result


if __name__ == "__main__":
    main()
