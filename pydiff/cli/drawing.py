"""The work of `pydiff sample`: draws samples of an image model and writes them as one picture.

What can be checked is checked before the first model call. The picture appears whole or not at all.
"""

from __future__ import annotations

import argparse
import math
import secrets
import time
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from pydiff import models
from pydiff.cli.common import DEFAULT_GUIDANCE, PICTURES, UsageError, grid_options, write_whole
from pydiff.run.loop import NonFiniteError
from pydiff.sampler import Sampler
from pydiff.schedules.base import NoiseSchedule


def run(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """The command, once `pydiff.cli.sample` has checked the output file and the solver's options."""
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    if not -(2**63) <= seed <= 2**63 - args.n:
        raise UsageError(f"--seed {seed}: seed + n must fit 64 bits; give a smaller number")
    device = check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load(args, device)
    labels, guidance = choose_labels(args, model)
    sampler = make_sampler(args, model, guidance, options)
    images, calls, seconds = draw(sampler, labels.to(device), seed, args.batch, args.quiet)
    columns = min(args.columns or math.isqrt(args.n - 1) + 1, args.n)
    write_whole(args.out, encode(images, columns, args.scale, args.out.suffix.lower()), "--out")
    if not args.quiet:
        print(f"{args.out}: {args.n} samples, {columns} a row, class {args.classes}, seed {seed}")
        report(args, sampler, guidance, calls, seconds)


def check_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: unknown; use cpu, cuda, or cuda:1 for the second GPU")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise UsageError(
                f"--device {name}: torch {torch.__version__} finds {found} CUDA devices here; "
                "use --device cpu, or see `pydiff info`"
            )
    return device


def load(args: argparse.Namespace, device: torch.device) -> Any:
    try:
        model = models.load_model(args.model, device, getattr(torch, args.dtype))
    except (ValueError, OSError) as error:
        raise UsageError(f"--model {args.model}: {error}") from None
    if len(model.sample_shape) != 3 or model.sample_shape[0] not in (1, 3):
        raise UsageError(
            f"--model {args.model}: its samples have shape {list(model.sample_shape)}; "
            "a picture needs [1 or 3, height, width]"
        )
    return model


def choose_labels(args: argparse.Namespace, model: Any) -> tuple[torch.Tensor, float]:
    """The class of each sample, int64 [n], and the guidance scale that goes with them."""
    text = args.classes.strip().lower()
    if text == "none":
        if args.guidance not in (None, 1.0):
            raise UsageError(
                f"--guidance {args.guidance:g}: without a class there is nothing to guide to; "
                "leave out --guidance, or --class none"
            )
        return torch.full((args.n,), model.null_label), 1.0
    last = model.num_classes - 1
    parts = [str(k) for k in range(last + 1)] if text == "all" else [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isdecimal() and int(part) <= last):
            raise UsageError(
                f"--class {args.classes}: {part!r} is no class of this model; give numbers from "
                f"0 to {last}, `all` or `none`"
            )
    guidance = DEFAULT_GUIDANCE if args.guidance is None else args.guidance
    return torch.tensor([int(parts[k % len(parts)]) for k in range(args.n)]), guidance


def make_sampler(args: argparse.Namespace, model: Any, guidance: float, options: dict[str, Any]) -> Sampler:
    dtype = torch.float64 if args.dtype == "float64" else torch.float32
    try:
        schedule = NoiseSchedule.from_dict(model.schedule_config)
        options = {"grid_options": grid_options(args, schedule), **options}
        return Sampler(
            model,
            args.solver,
            args.steps,
            schedule=schedule,
            grid=args.grid,
            dtype=dtype,
            guidance_scale=guidance,
            **options,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(str(error)) from None


def draw(sampler: Sampler, labels: torch.Tensor, seed: int, batch: int, quiet: bool) -> tuple[torch.Tensor, int, float]:
    """The samples as uint8 [N, C, H, W] on the host, the model calls really made, and the seconds."""
    calls, images, count = 0, [], len(labels)
    model: Any = sampler.model
    with tqdm(total=len(sampler.plan) * math.ceil(count / batch), unit="call", disable=quiet) as bar:

        def on_call(*_: Any) -> None:
            nonlocal calls
            calls += 1
            bar.update()

        hook = model.register_forward_hook(on_call)
        begin = time.perf_counter()
        try:
            for start in range(0, count, batch):
                rows = labels[start : start + batch]
                seeds = [seed + start + k for k in range(len(rows))]
                x = sampler(
                    (len(rows), *model.sample_shape),
                    seed=seeds,
                    cond={"labels": rows},
                    uncond={"labels": model.null_label},
                )
                images.append(((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
        except (NonFiniteError, MemoryError) as error:
            raise UsageError(f"sampling failed: {error}") from None
        except RuntimeError as error:  # torch has no one class for "out of memory" on every device
            if "memory" not in str(error):
                raise
            first = str(error).partition("\n")[0]
            raise UsageError(f"--batch {batch}: {first}; use a smaller one") from None
        finally:
            hook.remove()
        return torch.cat(images), calls, time.perf_counter() - begin


def encode(images: torch.Tensor, columns: int, scale: int, suffix: str) -> bytes:
    """uint8 [N, C, H, W] as a picture file of `columns` samples a row, black where the last row ends."""
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    cells = np.zeros((rows * columns, channels, height, width), dtype=np.uint8)
    cells[:count] = images.numpy()
    page = cells.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    page = page.reshape(rows * height, columns * width, channels).repeat(scale, 0).repeat(scale, 1)
    buffer = BytesIO()
    try:
        Image.fromarray(page[:, :, 0] if channels == 1 else page).save(buffer, PICTURES[suffix])
    except (OSError, ValueError) as error:  # a format this Pillow lacks, or a picture too large for it
        raise UsageError(
            f"--out: {page.shape[1]} x {page.shape[0]} pixels cannot be written as {suffix}: {error}; use .png"
        ) from None
    return buffer.getvalue()


def report(args: argparse.Namespace, sampler: Sampler, guidance: float, calls: int, seconds: float) -> None:
    batches = math.ceil(args.n / args.batch)
    planned = f"{len(sampler.plan)} in the plan" + (f", times {batches} batches" if batches > 1 else "")
    grid = args.grid or sampler.schedule.default_grid
    rows = " (two model rows a sample)" if sampler.plan.guided else ""
    threads = f", {torch.get_num_threads()} threads" if sampler.device.type == "cpu" else ""
    print(f"solver       {args.solver}, {args.steps} steps, grid {grid}, guidance {guidance:g}{rows}")
    print(f"model calls  {calls} ({planned})")
    rate = args.n / seconds
    print(f"time         {seconds:.2f} s, {rate:.1f} samples/s ({args.device}, {args.dtype}{threads})")
