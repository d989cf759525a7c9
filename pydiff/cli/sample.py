"""`pydiff sample`: draws samples of an image model and writes them.

What can be checked is checked before the first model call, and what needs no torch before torch is loaded, which takes
seconds. Where samples go, and what is kept of a command that is interrupted, is in `pydiff.cli.output`.
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pydiff import __version__
from pydiff.cli.common import (
    UsageError,
    add_plan_options,
    finite_number,
    grid_options,
    positive_integer,
    solver_options,
)
from pydiff.cli.output import KINDS, Job, Target, make_target
from pydiff.schedules.base import NoiseSchedule

if TYPE_CHECKING:
    from pydiff.sampler import Sampler

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEFAULT_GUIDANCE = 2.0


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments of `pydiff sample`."""
    add = p.add_argument
    add(
        "--out",
        required=True,
        metavar="PATH",
        help=f"a folder (a name that ends in /: one PNG a sample), arrays or tensors, or a picture of all: "
        f"{', '.join(KINDS)}",
    )
    add("--overwrite", action="store_true", help="replace what another command has left there")
    add("--n", type=positive_integer, default=64, metavar="N", help="number of samples (default: 64)")
    add("--seed", type=int, metavar="S", help="sample k uses seed S + k (default: a random one, printed)")
    add("--solver", default="dpmpp_2m", metavar="NAME", help="see `pydiff solvers` (default: dpmpp_2m)")
    add("--steps", type=positive_integer, default=20, metavar="N", help="steps (default: 20)")
    add_plan_options(p)
    add("--model", default="mnist", metavar="NAME", help="`mnist` (the default), or a .safetensors file")
    add(
        "--class",
        dest="classes",
        default="all",
        metavar="K",
        help="a class, or several such as 3,1,4 used in turn; `all` (the default) goes through every class, "
        "`none` samples without one",
    )
    add(
        "--guidance",
        type=finite_number,
        metavar="W",
        help=f"scale of classifier-free guidance (default: {DEFAULT_GUIDANCE:g}; 1: none, half the cost)",
    )
    add("--batch", type=positive_integer, default=64, metavar="N", help="samples at a time (default: 64)")
    add("--device", default="cpu", metavar="NAME", help="cpu (the default), cuda, cuda:1, ...")
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the model (default: float32); what the solver works in is float32, or float64 if this is",
    )
    add("--threads", type=positive_integer, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--columns", type=positive_integer, metavar="N", help="samples in a row of a picture (default: a square)")
    add("--scale", type=positive_integer, default=1, metavar="N", help="draw pixels as N x N (default: 1)")
    add("--quiet", action="store_true", help="no progress bar and no report, only a line `seed S`")


def run(args: argparse.Namespace) -> None:
    """The command."""
    target = make_target(args.out, args.columns, args.scale, args.overwrite)
    options = solver_options(args)
    if args.seed is not None and not -(2**63) <= args.seed <= 2**63 - args.n:
        raise UsageError(f"--seed {args.seed}: seed + n must fit 64 bits; give a smaller number")
    model = load(args)
    target.check(model.sample_shape, args.n)
    classes, guidance = choose_classes(args, model)
    sampler = make_sampler(args, model, guidance, options)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    job = Job(args.n, args.batch, seed, classes, settings(args, sampler, guidance, options))
    job = target.begin(job, any_seed=args.seed is None)
    if args.quiet:
        print(f"seed {job.seed}", flush=True)
    try:
        work = draw(sampler, job, target, args.quiet)
        target.finish(job)
    except KeyboardInterrupt:
        done = sum(len(batch) for batch in job.batches() if target.has(job, batch))
        what = (
            f"{done} of {job.n} samples are kept; give the same command again to go on" if done else "nothing is kept"
        )
        raise KeyboardInterrupt(f"{what} (seed {job.seed})") from None
    if not args.quiet:
        print(f"{args.out}: {target.content(job.n)}, class {job.settings['class']}, seed {job.seed}")
        print(report(args, sampler, job, work))


def load(args: argparse.Namespace) -> Any:
    """The model, on the device that was asked for."""
    import torch

    from pydiff import models

    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {args.device}: unknown; use cpu, cuda, or cuda:1 for the second GPU")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise UsageError(
                f"--device {args.device}: torch {torch.__version__} finds {found} CUDA devices here; "
                "use --device cpu, or see `pydiff info`"
            )
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return models.load_model(args.model, device, getattr(torch, args.dtype))
    except (ValueError, OSError) as error:
        raise UsageError(f"--model {args.model}: {error}") from None


def choose_classes(args: argparse.Namespace, model: Any) -> tuple[tuple[int, ...], float]:
    """The classes that the samples are of, in turn, and the guidance scale that goes with them."""
    text = args.classes.strip().lower()
    if text == "none":
        if args.guidance not in (None, 1.0):
            raise UsageError(
                f"--guidance {args.guidance:g}: without a class there is nothing to guide to; "
                "leave out --guidance, or --class none"
            )
        return (model.null_label,), 1.0
    last = model.num_classes - 1
    parts = [str(k) for k in range(last + 1)] if text == "all" else [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isdecimal() and int(part) <= last):
            raise UsageError(
                f"--class {args.classes}: {part!r} is no class of this model; give numbers from "
                f"0 to {last}, `all` or `none`"
            )
    return tuple(int(part) for part in parts), DEFAULT_GUIDANCE if args.guidance is None else args.guidance


def make_sampler(args: argparse.Namespace, model: Any, guidance: float, options: dict[str, Any]) -> Sampler:
    """The model with the plan that the arguments ask for."""
    import torch

    from pydiff.sampler import Sampler

    try:
        schedule = NoiseSchedule.from_dict(model.schedule_config)
        return Sampler(
            model,
            args.solver,
            args.steps,
            schedule=schedule,
            grid=args.grid,
            grid_options=grid_options(args, schedule),
            dtype=torch.float64 if args.dtype == "float64" else torch.float32,
            guidance_scale=guidance,
            **options,
        )
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None


def settings(args: argparse.Namespace, sampler: Sampler, guidance: float, options: dict[str, Any]) -> dict[str, Any]:
    """What decides the samples beside seed, n and batch: two commands that agree in it give the same bits."""
    import torch

    model: Any = sampler.model
    on_cpu = sampler.device.type == "cpu"
    weights = hashlib.blake2b(digest_size=16)  # the same name may stand for another file by now
    for name, tensor in model.state_dict().items():
        weights.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        weights.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "solver": args.solver,
        "options": options,
        "steps": args.steps,
        "grid": args.grid or sampler.schedule.default_grid,
        "grid_options": grid_options(args, sampler.schedule),
        "guidance": guidance,
        "class": "".join(args.classes.lower().split()),
        "model": args.model.encode(errors="backslashreplace").decode(),  # a path may hold what is no text
        "weights": weights.hexdigest(),
        "dtype": args.dtype,
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(sampler.device),
        **({"threads": torch.get_num_threads()} if on_cpu else {}),
        "plan": sampler.plan.digest(),
        "pydiff": __version__,
        "torch": str(torch.__version__),
    }


class Work(NamedTuple):
    """What a command did, apart from what was kept of an earlier one.

    Attributes:
        samples, batches: how many it drew, and in how many batches.
        calls: calls that the model really got.
        seconds: how long it took.
    """

    samples: int
    batches: int
    calls: int
    seconds: float


def draw(sampler: Sampler, job: Job, target: Target, quiet: bool) -> Work:
    """Draw the batches that are missing, and hand each to the target as soon as it is done."""
    from tqdm.auto import tqdm

    model: Any = sampler.model
    missing = sum(not target.has(job, batch) for batch in job.batches())
    samples, calls = 0, 0
    with tqdm(total=len(sampler.plan) * missing, unit="call", disable=quiet or not missing) as bar:

        def on_call(*_: Any) -> None:
            nonlocal calls
            calls += 1
            bar.update()

        hook = model.register_forward_hook(on_call)
        begin = time.perf_counter()
        try:
            for batch in job.batches():
                if not target.has(job, batch):
                    target.add(job, batch, draw_batch(sampler, job, batch))
                    samples += len(batch)
        finally:
            hook.remove()
        return Work(samples, missing, calls, time.perf_counter() - begin)


def draw_batch(sampler: Sampler, job: Job, batch: range) -> np.ndarray:
    """Samples [B, *sample], float32, or float64 where the model is."""
    import torch

    from pydiff.run.loop import NonFiniteError

    model: Any = sampler.model
    try:
        x = sampler(
            (len(batch), *model.sample_shape),
            seed=job.seeds(batch),
            cond={"labels": torch.tensor(job.labels(batch), device=sampler.device)},
            uncond={"labels": model.null_label},
        )
        return x.cpu().numpy()
    except (NonFiniteError, MemoryError) as error:
        raise UsageError(f"sampling failed: {error}") from None
    except RuntimeError as error:  # torch has no one class for "out of memory" on every device
        if "memory" not in str(error):
            raise
        first = str(error).partition("\n")[0]
        raise UsageError(f"--batch {job.batch}: {first}; use a smaller one") from None


def report(args: argparse.Namespace, sampler: Sampler, job: Job, work: Work) -> str:
    """How the samples were drawn and how long it took, as lines."""
    grid, guidance, threads = (job.settings.get(key) for key in ("grid", "guidance", "threads"))
    rows = " (two model rows a sample)" if sampler.plan.guided else ""
    lines = [f"solver       {args.solver}, {args.steps} steps, grid {grid}, guidance {guidance:g}{rows}"]
    if work.samples < job.n:
        lines.append(f"kept         {job.n - work.samples} samples, which were there already")
    if work.samples:
        times = f", times {work.batches} batches" if work.batches > 1 else ""
        where = f"{args.device}, {args.dtype}" + (f", {threads} threads" if threads else "")
        lines.append(f"model calls  {work.calls} ({len(sampler.plan)} in the plan{times})")
        lines.append(f"time         {work.seconds:.2f} s, {work.samples / work.seconds:.1f} samples/s ({where})")
    return "\n".join(lines)
