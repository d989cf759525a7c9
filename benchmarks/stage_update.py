"""What a sampler costs between two model calls, beside diffusers' and k-diffusion's own, in one run.

    python benchmarks/stage_update.py [--device cuda] [--shapes tiny,mid,big] [--quick] [--out FILE]

The model is a constant tensor, so that nothing but the sampler is timed: loops of 20 steps, divided by 20.

pydiff      `pydiff.step` over a whole plan, on a new state each time: its first step, which looks at every
            tensor, counts. Not counted: making the plan, and `init`.
  alone     the same loop on a state that has been through it before: a step once everything is in place.
  all       a whole run whose plan is used again: `init`, and for each step the model's input and time, and
            `step`.
diffusers   `scheduler.step(m, t, x, return_dict=False)` for t in scheduler.timesteps, with a generator where
            the class takes one, as pipelines call it, and `set_begin_index(0)`, which spares it a search.
            `scale_model_input` counts for the Euler classes alone: the others return their argument, and
            pydiff's step scales the model's input itself. Not counted: `set_timesteps`.
k-diffusion the sampler function, which scales no input. Stochastic ones get plain `randn_like` noise in place
            of their Brownian tree, which takes far longer.
copy_       one `copy_` of a tensor of the sample's shape into another.

Everything runs with one thread on the smallest shape, where more bring nothing, with all threads elsewhere.
On CUDA every loop ends with a synchronisation; `host` is when the call returned, `device` a graph's replay.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pydiff
from benchmarks import graph_timing, harness, noise
from benchmarks.harness import Entries, Entry, NotMeasured, Outcome, Target
from pydiff.plans import table

STEPS = 20
SHAPES = {"tiny": (1, 4, 8, 8), "mid": (8, 4, 128, 128), "big": (64, 4, 128, 128)}
PAST_CACHE = {"past_cache": (1024, 4, 128, 128)}  # 256 MiB a tensor: GPUs keep the big one in their cache
Shape = tuple[int, ...]
Row = dict[str, Any]  # one sampler on one shape
ROUNDS = {"tiny": 25, "mid": 15}
OTHER_ROUNDS = 9


@dataclass(frozen=True)
class Sampler:
    """One sampler in three packages."""

    solver: str
    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)  # arguments of the scheduler's step
    scales_input: bool = False
    function: str = ""  # of k_diffusion.sampling
    noisy: bool = False  # that function takes a noise sampler


SDE = {"algorithm_type": "sde-dpmsolver++"}
SAMPLERS = {
    "ddim": Sampler("ddim", "DDIMScheduler", {"clip_sample": False}, {"eta": 0.0}),
    "dpmpp_2m": Sampler("dpmpp_2m", "DPMSolverMultistepScheduler", function="sample_dpmpp_2m"),
    "dpmpp_3m": Sampler("dpmpp_3m", "DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc": Sampler("unipc", "UniPCMultistepScheduler"),
    "euler": Sampler("euler", "EulerDiscreteScheduler", scales_input=True, function="sample_euler"),
    "euler_ancestral": Sampler(
        "euler_ancestral",
        "EulerAncestralDiscreteScheduler",
        scales_input=True,
        function="sample_euler_ancestral",
        noisy=True,
    ),
    "dpmpp_2m_sde": Sampler(
        "dpmpp_2m_sde", "DPMSolverMultistepScheduler", SDE, noisy=True, function="sample_dpmpp_2m_sde"
    ),
}


# ------------------------------------------------------------------------------------ what is timed


def make_plan(sampler: Sampler) -> pydiff.Plan:
    """The sampler on the schedule that diffusers' classes have by default."""
    return pydiff.make_plan(sampler.solver, pydiff.DiscreteBetas.named("linear"), STEPS)


def our_entries(sampler: Sampler, x: torch.Tensor, m: torch.Tensor) -> Entries:
    plan = make_plan(sampler)
    fresh, kept = [pydiff.init(plan, x, seed=0)], pydiff.init(plan, x, seed=0)
    start = kept.tensors.cursor.clone()

    def renew() -> None:
        fresh[0] = pydiff.init(plan, x, seed=0)

    def rewind() -> None:
        kept.tensors.registers[0].copy_(x)
        kept.tensors.cursor.copy_(start)
        kept.stages_done = 0

    def run(state: pydiff.State) -> pydiff.State:
        while not state.finished:
            pydiff.step(state, m)
        return state

    def whole() -> pydiff.State:
        state = pydiff.init(plan, x, seed=0)
        while not state.finished:
            _ = state.model_input, state.model_time
            pydiff.step(state, m)
        return state

    per = len(plan)
    return {
        "pydiff": Entry("pydiff", lambda: run(fresh[0]), per, renew),
        "pydiff alone": Entry("pydiff alone", lambda: run(kept), per, rewind),
        "pydiff all": Entry("pydiff all", whole, per),
    }


def diffusers_entry(sampler: Sampler, x: torch.Tensor, m: torch.Tensor) -> Entry:
    import diffusers

    scheduler = getattr(diffusers, sampler.scheduler)(**sampler.config)
    generator = torch.Generator(x.device).manual_seed(0)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    arguments = {**sampler.step, "return_dict": False, **({"generator": generator} if draws else {})}

    def before() -> None:
        scheduler.set_timesteps(STEPS, device=x.device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    def run() -> torch.Tensor:
        sample = x
        for t in scheduler.timesteps:
            if sampler.scales_input:
                scheduler.scale_model_input(sample, t)
            sample = scheduler.step(m, t, sample, **arguments)[0]
        return sample

    before()
    generators = [generator] if draws and x.is_cuda else []
    return Entry("diffusers", run, len(scheduler.timesteps), before, generators)


@functools.cache
def k_diffusion_sampling() -> Any:
    from tests.oracles.peers import load_k_diffusion

    return load_k_diffusion()


def k_diffusion_entry(sampler: Sampler, x: torch.Tensor, m: torch.Tensor) -> Entry | NotMeasured:
    if not sampler.function:
        return NotMeasured("k-diffusion has no such sampler")
    sampling = k_diffusion_sampling()
    if sampling is None:
        return NotMeasured("k-diffusion is not installed, or lacks a package it needs")
    function = getattr(sampling, sampler.function)
    options: dict[str, Any] = {}
    if sampler.noisy:
        options["noise_sampler"] = lambda sigma, sigma_next: torch.randn_like(x)
    sigmas = sampling.get_sigmas_karras(STEPS, 0.03, 14.6, device=x.device)

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return m

    return Entry("k-diffusion", lambda: function(model, x, sigmas, disable=True, **options), STEPS)


def copy_entry(x: torch.Tensor) -> Entry:
    y = torch.empty_like(x).copy_(x)

    def run() -> None:
        for _ in range(STEPS):
            y.copy_(x)

    return Entry("copy_", run, STEPS)


def entries_for(sampler: Sampler, x: torch.Tensor, m: torch.Tensor) -> Entries:
    """Everything that is compared with one another, rivals that cannot run among it."""
    entries: Entries = {"copy_": copy_entry(x)}
    try:
        entries |= our_entries(sampler, x, m)
    except torch.OutOfMemoryError as error:
        entries |= {name: harness.failure(error) for name in ("pydiff", "pydiff alone", "pydiff all")}
    entries["diffusers"] = harness.attempt(diffusers_entry, sampler, x, m)
    entries["k-diffusion"] = harness.attempt(k_diffusion_entry, sampler, x, m)
    return entries


def tensors_moved(plan: pydiff.Plan) -> float:
    """Sample-sized tensors that a step has to read and to write, the mean over the plan."""
    total = 0
    for c, slots, weights in zip(plan.coefficients, plan.indices[:, : table.WRITE_B + 1], plan.weights):
        written = [0, *(k + 1 for k in range(2) if slots[k] >= 0)]
        used = (weights[written] != 0).any(axis=0)
        if used[table.D]:
            used[table.X] |= c[table.OUTPUT] != 0
            used[table.M] |= c[table.OUTPUT + 1] != 0
        used[[table.D, table.Z0, table.Z1]] = False  # made in registers
        total += int(used.sum()) + len(written)
    return total / len(plan)


# ------------------------------------------------------------------------------------ the run


def run_sampler(name: str, shape: Shape, device: torch.device, rounds: int, turn: float) -> Row:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device)
    m = torch.randn(shape, generator=generator).mul_(0.1).to(device)
    synchronize: Callable[[], Any] | None = torch.cuda.synchronize if device.type == "cuda" else None
    entries = entries_for(SAMPLERS[name], x, m)
    found = harness.measure(entries, rounds, turn=turn, synchronize=synchronize)
    # A graph is captured of what is bound already; the loop on a new state would be the same kernels.
    on_device = {k: e for k, e in entries.items() if k not in ("pydiff", "pydiff all")} if device.type == "cuda" else {}
    replayed = graph_timing.measure_device(on_device, rounds) if on_device else {}
    return {
        "sampler": name,
        "shape": list(shape),
        "threads": torch.get_num_threads(),
        "tensors_moved": tensors_moved(make_plan(SAMPLERS[name])),
        "outcomes": found,
        "device": replayed,
    }


def threads_for(shape: Shape) -> int:
    return 1 if shape == SHAPES["tiny"] else torch.get_num_threads()


def run_shape(shape: Shape, device: torch.device, rounds: int, turn: float) -> list[Row]:
    """All samplers on one shape. On the CPU a tiny tensor is served by one thread, for everyone."""
    with harness.threads(threads_for(shape)), torch.no_grad():
        return [run_sampler(name, shape, device, rounds, turn) for name in SAMPLERS]


def targets(rows: list[Row], normals: dict[str, Outcome]) -> list[Target]:
    """What the CPU has to reach. A row that is not there leaves its target unmeasured."""

    def outcomes(name: str, sampler: str) -> dict[str, Outcome]:
        here = (r for r in rows if tuple(r["shape"]) == SHAPES[name] and r["sampler"] == sampler)
        return next(here, {"outcomes": {}})["outcomes"]

    tiny, big = outcomes("tiny", "dpmpp_2m"), outcomes("big", "dpmpp_2m")
    sde, cheaper = outcomes("big", "dpmpp_2m_sde"), "times cheaper than diffusers"
    return [
        Target(f"2M on [1,4,8,8]: {cheaper}", tiny.get("diffusers"), tiny.get("pydiff"), 30),
        Target(f"2M on [64,4,128,128]: {cheaper}", big.get("diffusers"), big.get("pydiff"), 6),
        Target("2M on [64,4,128,128]: in units of one copy_", big.get("pydiff"), big.get("copy_"), 3, at_least=False),
        Target(f"2M-SDE on [64,4,128,128]: {cheaper}", sde.get("diffusers"), sde.get("pydiff"), 10),
        Target(
            "normals, 16 MiB: times faster than Tensor.normal_", normals.get("normal_"), normals.get("pydiff fill"), 5
        ),
    ]


# ------------------------------------------------------------------------------------ the report

COLUMNS = ("copy_", "pydiff", "pydiff alone", "pydiff all", "diffusers", "k-diffusion")


def host_table(rows: list[Row]) -> str:
    """Microseconds a step, median (minimum), and the ratios of the medians."""

    def cells(row: Row) -> list[str]:
        found = row["outcomes"]
        ours = found["pydiff"]
        ratios = [harness.ratio(ours, found["copy_"]), *(harness.ratio(found[k], ours) for k in COLUMNS[-2:])]
        times = (harness.microseconds(found[k]) for k in COLUMNS)
        return [row["sampler"], *times, f"{row['tensors_moved']:.1f}", *map(harness.number, ratios)]

    return harness.markdown(
        [
            "us a step: median (min)",
            *COLUMNS,
            "tensors moved",
            "pydiff / copy_",
            "diffusers / pydiff",
            "k-diffusion / pydiff",
        ],
        map(cells, rows),
    )


def device_table(rows: list[Row]) -> str:
    """CUDA: how long the host is busy with a step, and how long the device is."""
    columns = ("copy_", "pydiff alone", "diffusers", "k-diffusion")

    def cells(row: Row) -> list[str]:
        busy = (harness.number(row["outcomes"][k].to_dict().get("host_median_us")) for k in columns)
        return [
            row["sampler"],
            *busy,
            *(harness.microseconds(row["device"][k]) for k in columns),
            harness.number(harness.ratio(row["device"]["pydiff alone"], row["device"]["copy_"])),
            harness.number(harness.ratio(row["device"]["diffusers"], row["device"]["pydiff alone"])),
        ]

    header = [
        "us a step",
        *(f"host: {k}" for k in columns),
        *(f"device: {k}" for k in columns),
        "device: pydiff / copy_",
        "device: diffusers / pydiff",
    ]
    return harness.markdown(header, map(cells, rows))


def reasons(rows: list[Row]) -> list[str]:
    """Why the numbers that are missing are missing, each reason once."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for where in ("outcomes", "device"):
            for name, outcome in row[where].items():
                if isinstance(outcome, NotMeasured):
                    key = f"{name}{' (device)' if where == 'device' else ''}: {outcome.reason}"
                    found.setdefault(key, []).append(row["sampler"])
    # A dict drops the repetitions of several shapes.
    return [f"{harness.NOT_MEASURED}: {key} [{', '.join(dict.fromkeys(n))}]" for key, n in found.items()]


def to_json(row: Row) -> dict[str, Any]:
    outcomes = harness.to_json(row["outcomes"])
    for name, outcome in row["outcomes"].items():
        outcomes[name]["ratio_to_copy"] = harness.ratio(outcome, row["outcomes"]["copy_"])
        outcomes[name]["ratio_to_pydiff"] = harness.ratio(outcome, row["outcomes"]["pydiff"])
    return {**row, "outcomes": outcomes, "device": harness.to_json(row["device"])}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--shapes", help=f"some of {', '.join((*SHAPES, *PAST_CACHE))}, with commas between")
    arguments = parser.parse_args(argv)
    device = harness.device_of(arguments)
    environment, turn = harness.environment(device), 0.0 if arguments.quick else 0.01
    harness.warn_if_busy(environment)
    rows = []
    known = {**SHAPES, **PAST_CACHE}
    wanted = harness.chosen(arguments.shapes, list(known), "--shapes")
    for name in wanted if arguments.shapes or device.type == "cuda" else SHAPES:
        shape = known[name]
        rounds = arguments.rounds or (2 if arguments.quick else ROUNDS.get(name, OTHER_ROUNDS))
        found = run_shape(shape, device, rounds, turn)
        rows += found
        print(f"\n{list(shape)}, {device.type}, {found[0]['threads']} threads, {rounds} rounds\n")
        print(host_table(found), flush=True)
        if device.type == "cuda":
            print(f"\n{device_table(found)}", flush=True)
    normals: dict[str, Outcome] = {}
    if any(tuple(row["shape"]) == SHAPES["big"] for row in rows):
        rounds = arguments.rounds or (2 if arguments.quick else 15)
        normals = noise.measure_size(SHAPES["big"], device, rounds, turn)
    judged = targets(rows, normals) if device.type == "cpu" else []
    print("", *reasons(rows), sep="\n")
    if judged:
        print(f"\n{harness.target_table(judged)}")
    result = {
        "benchmark": "stage_update",
        "environment": environment,
        "quick": arguments.quick,
        "steps": STEPS,
        "rows": [to_json(row) for row in rows],
        "normals": harness.to_json(normals),
        "targets": [target.to_dict() for target in judged],
    }
    print(f"\nwritten to {harness.save(result, arguments.out)}")
    return result


if __name__ == "__main__":
    main()
