"""What a call of a denoiser costs: PyTorch eager, tuned and compiled, and `pydiff.optimize`, with random weights.

    python benchmarks/unet.py --device cuda [--row sd15_512_b2,...] [--variants NAMES] [--seconds N] [--out FILE]
    python benchmarks/unet.py --smoke              small widths on the CPU: shows that it runs, measures nothing
    python benchmarks/unet.py --count              only counts kernels, of the models at full size; needs no GPU

eager       the model as it is, contiguous, PyTorch's choice of attention.
tuned       channels_last, and cuDNN's attention where it can run.
compile     tuned, compiled: torch.compile(mode="max-autotune-no-cudagraphs", fullgraph=True).
regional    tuned, `compile_repeated_blocks`: the repeated blocks are compiled alone, which takes seconds.
pydiff      `pydiff.optimize(model)`.
pydiff+compile, pydiff hoisted: that compiled as above; and with what does not depend on x computed before the loop.

call: from the call until the device is done, as a loop outside of any graph would have it. replay: the same call
captured in a CUDA graph and replayed, as pydiff's sampler runs it and as mode="max-autotune" would. warm-up: from the
plain model to the end of the first call. peak: the most that was allocated during calls, weights included.
kernels: launched by one call, seen by torch.profiler on CUDA; `counted`: by `pydiff.check.launches` on the model's
shapes alone. difference: of the outputs from eager's, the largest over eager's largest.

bfloat16 on CUDA, float32 elsewhere. Every variant starts from a model of its own with the same weights. Variants are
not interleaved, since two models and their graphs may not fit at once; each is measured `--rounds` times.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import graph_timing, harness
from benchmarks.harness import Entry, NotMeasured, Outcome
from benchmarks.limits import Budget, at_most
from benchmarks.unet_models import WORKLOADS, Inputs, Workload

COMPILE: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs", "fullgraph": True, "dynamic": False}
CALLS = 5  # in a round, between two synchronisations

Call = Callable[[], Any]


# ------------------------------------------------------------------------------------ the variants
# Each takes a model and its inputs and returns a function that calls it once.


def eager(model: Callable[..., Any], inputs: Inputs) -> Call:
    return lambda: model(**inputs)


def tuned(model: nn.Module, inputs: Inputs) -> Call:
    return with_cudnn_attention(lambda: model(**inputs))


def compiled(model: nn.Module, inputs: Inputs) -> Call:
    return with_cudnn_attention(eager(torch.compile(model, **COMPILE), inputs))


def regional(model: Any, inputs: Inputs) -> Call:
    blocks = getattr(model, "_repeated_blocks", None)
    if not blocks:
        raise TypeError(f"{type(model).__name__} names no repeated blocks")
    model.compile_repeated_blocks(**COMPILE)
    return with_cudnn_attention(eager(model, inputs))


def optimized(model: nn.Module, inputs: Inputs) -> Call:
    return eager(pydiff_optimize(model), inputs)


def optimized_compiled(model: nn.Module, inputs: Inputs) -> Call:
    return eager(torch.compile(pydiff_optimize(model), **COMPILE), inputs)


def optimized_hoisted(model: nn.Module, inputs: Inputs) -> Call:
    return hoisted_call(pydiff_optimize(model), inputs)


def hoisted_call(model: Any, inputs: Inputs) -> Call:
    """A call as it is inside of a sampling loop, after the time and the condition have been dealt with."""
    from pydiff.optimize.hoisting import Hoistable, HoistedModel

    if not isinstance(model, Hoistable):
        raise TypeError(f"nothing is hoisted out of {type(model).__name__}")
    cond = {k: v for k, v in inputs.items() if k not in ("sample", "x", "timestep", "t", "return_dict")}
    x, t = inputs.get("sample", inputs.get("x")), inputs.get("timestep", inputs.get("t"))
    assert isinstance(x, Tensor) and isinstance(t, Tensor)
    hoisted = HoistedModel(model, t.reshape(1), cond, batch=x.shape[0])
    stage = torch.zeros(1, dtype=torch.int32, device=x.device)
    return lambda: hoisted(x, stage)


def pydiff_optimize(model: nn.Module) -> nn.Module:
    from pydiff import optimize

    return optimize(model, memory_format=torch.channels_last)


VARIANTS: dict[str, Callable[[Any, Inputs], Call]] = {
    "eager": eager,
    "tuned": tuned,
    "pydiff": optimized,
    "pydiff hoisted": optimized_hoisted,
    "regional": regional,
    "compile": compiled,
    "pydiff+compile": optimized_compiled,
}
CONTIGUOUS = ("eager",)  # every other variant is given channels_last inputs and weights
ON_CUDA = ("regional", "compile", "pydiff+compile")
NOT_COUNTED = "compiled code does not pass the dispatcher"


def with_cudnn_attention(call: Call) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def run() -> Any:
        with sdpa_kernel(order, set_priority=True):
            return call()

    return run


# ------------------------------------------------------------------------------------ measuring one variant


def measure_variant(
    workload: Workload, name: str, device: torch.device, rounds: int, smoke: bool, seconds: float
) -> tuple[dict[str, Any], Tensor | None]:
    """What is to be written down of a variant, and its output; the reason, where something stopped it."""
    if name in ON_CUDA and device.type != "cuda":
        return NotMeasured("compiled only on CUDA").to_dict(), None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kept = clear(device)
    try:
        with at_most(seconds), torch.no_grad():
            model, inputs = workload.build(device, dtype, channels_last=name not in CONTIGUOUS, smoke=smoke)
            synchronize(device)
            began = time.perf_counter()
            call = VARIANTS[name](model, inputs)
            output = call()
            synchronize(device)
            warm_up = time.perf_counter() - began
            found: dict[str, Any] = {"warm_up_s": warm_up, **timed(call, device, rounds)}
            if device.type == "cuda":
                found["peak_bytes"] -= kept
                found["kernels"] = profiled_kernels(call)
            output = first_tensor(output).float().cpu()
    except Exception as error:
        return harness.failure(error).to_dict(), None
    return found, output


def clear(device: torch.device) -> int:
    """Give back what the variant before held; the bytes that stay allocated all the same."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch._dynamo.reset()  # compiled code holds on to its model
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(call: Call, device: torch.device, rounds: int) -> dict[str, Any]:
    calls = CALLS if device.type == "cuda" else 1

    def run() -> None:
        for _ in range(calls):
            call()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    entries: harness.Entries = {"call": Entry("call", run, calls)}
    wait = torch.cuda.synchronize if device.type == "cuda" else None
    outcomes: dict[str, Outcome] = harness.measure(entries, rounds, turn=0.0, synchronize=wait)
    found: dict[str, Any] = {"peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None}
    if device.type == "cuda":
        outcomes["replay"] = graph_timing.measure_device({"replay": Entry("replay", call)}, rounds)["replay"]
    else:
        outcomes["replay"] = NotMeasured("graphs are captured on CUDA alone")
    return found | harness.to_json(outcomes)


def profiled_kernels(call: Call) -> int | None:
    """Kernels, and copies and fills within the device, of one call; None where the profiler sees none."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = [e.name for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return sum(not name.startswith("Memcpy") or "DtoD" in name for name in on_device) or None


def first_tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def counted_kernels(workload: Workload, name: str, smoke: bool) -> dict[str, Any]:
    """Kernels of one call by the rules of `pydiff.check.launches`: at full size, without memory."""
    if name in ON_CUDA:
        return NotMeasured(NOT_COUNTED).to_dict()
    try:
        from pydiff.check.launches import count_launches, fake_cuda

        model, inputs = workload.build(
            torch.device("meta"), torch.bfloat16, channels_last=name not in CONTIGUOUS, smoke=smoke
        )
        if name.startswith("pydiff"):
            model = pydiff_optimize(model)
        model, inputs = fake_cuda((model, inputs))
        if name == "pydiff hoisted":
            return _counted_hoisted(model, inputs)
        count_launches(model, **inputs)  # the first call packs Q, K and V
        return {"total": count_launches(model, **inputs).total}
    except Exception as error:
        return harness.failure(error).to_dict()


def _counted_hoisted(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    from pydiff.check.launches import count_launches

    calls: list[Call] = []
    count_launches(lambda: calls.append(hoisted_call(model, inputs)))
    count_launches(calls[0])
    return {"total": count_launches(calls[0]).total}


# ------------------------------------------------------------------------------------ the report


def difference(output: Tensor | None, wanted: Tensor | None) -> float | None:
    if output is None or wanted is None:
        return None
    return float((output - wanted).abs().max() / wanted.abs().max())


def table(row: dict[str, Any]) -> str:
    def milliseconds(outcome: dict[str, Any] | None) -> str:
        return harness.number(outcome["median_us"] / 1e3 if outcome and "median_us" in outcome else None)

    def cells(name: str, found: dict[str, Any]) -> list[str]:
        peak, total = found.get("peak_bytes"), found["counted"].get("total")
        kernels = [str(n) if n is not None else harness.NOT_MEASURED for n in (found.get("kernels"), total)]
        return [
            name,
            milliseconds(found.get("call")),
            milliseconds(found.get("replay")),
            *kernels,
            harness.number(None if peak is None else peak / 2**30),
            harness.number(found.get("warm_up_s")),
            harness.number(found.get("difference")),
        ]

    header = ["variant", "ms a call", "ms a replay", "kernels", "counted", "peak GiB", "warm-up s", "difference"]
    return harness.markdown(header, [cells(*pair) for pair in row["variants"].items()])


def reasons(row: dict[str, Any]) -> list[str]:
    parts = [(name, f) for name, f in row["variants"].items()]
    parts += [(f"{name} {k}", f[k]) for name, f in row["variants"].items() for k in ("replay", "counted") if k in f]
    return [f"{harness.NOT_MEASURED}: {name}: {f['reason']}" for name, f in parts if "reason" in f]


# ------------------------------------------------------------------------------------ the run


def measure_all(
    keys: list[str], variants: list[str], device: torch.device, rounds: int, smoke: bool, budget: Budget
) -> list[dict[str, Any]]:
    """Every row's variants; what is compiled comes after everything else, since it may use up the time.

    With no rounds kernels are counted and nothing is run.
    """
    wanted: dict[str, Tensor | None] = {}
    output: Tensor | None
    found: dict[str, dict[str, dict[str, Any]]] = {key: {} for key in keys}
    for late in (False, True):
        for key in keys:
            for name in (v for v in variants if (v in ON_CUDA) is late):
                result, output = NotMeasured("only kernels were counted").to_dict(), None
                if rounds:
                    result, output = measure_variant(WORKLOADS[key], name, device, rounds, smoke, budget.left)
                if name == "eager":
                    wanted[key] = output
                result["difference"] = difference(output, wanted.get(key))
                result["counted"] = counted_kernels(WORKLOADS[key], name, smoke)
                found[key][name] = result
    return [{"workload": key, "title": WORKLOADS[key].title, "variants": found[key]} for key in keys]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--row", help=f"some of {', '.join(WORKLOADS)}, with commas between")
    parser.add_argument("--variants", help=f"some of {', '.join(VARIANTS)}, with commas between")
    parser.add_argument("--smoke", action="store_true", help="small widths and sizes")
    parser.add_argument("--count", action="store_true", help="count kernels, run nothing")
    parser.add_argument("--seconds", type=float, help="stop measuring after this long")
    arguments = parser.parse_args(argv)
    device = harness.device_of(arguments)
    if device.type == "cpu" and not arguments.smoke and not arguments.count:
        raise SystemExit("the models are large: give --device cuda, --smoke for small ones, or --count")
    keys = harness.chosen(arguments.row, list(WORKLOADS), "--row")
    variants = harness.chosen(arguments.variants, list(VARIANTS), "--variants")
    budget, environment = Budget(arguments.seconds), harness.environment(device)
    rounds = 0 if arguments.count else arguments.rounds or (2 if arguments.quick or arguments.smoke else 7)
    rows = measure_all(keys, variants, device, rounds, arguments.smoke, budget)
    for row in rows:
        print(f"\n{row['title']}\n\n{table(row)}\n", *reasons(row), sep="\n")
    result = {
        "benchmark": "unet",
        "environment": environment | {"triton": harness._version("triton")},
        "quick": arguments.quick or arguments.smoke,
        "rows": rows,
    }
    print(f"\nwritten to {harness.save(result, arguments.out)}")
    return result


if __name__ == "__main__":
    main()
