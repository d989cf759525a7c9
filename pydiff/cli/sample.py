"""`pydiff sample`: its arguments, and what can be checked of them before torch is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from pydiff.cli.common import (
    DEFAULT_GUIDANCE,
    PICTURES,
    UsageError,
    add_plan_options,
    check_output,
    finite_number,
    positive_integer,
    solver_options,
)

DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_arguments(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help=f"picture: {', '.join(PICTURES)}")
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
    add("--columns", type=positive_integer, metavar="N", help="samples in a row (default: a square)")
    add("--scale", type=positive_integer, default=1, metavar="N", help="draw pixels as N x N (default: 1)")
    add("--quiet", action="store_true", help="no progress bar and no report")


def run(args: argparse.Namespace) -> None:
    if args.out.suffix.lower() not in PICTURES:
        raise UsageError(f"--out {args.out}: unknown suffix {args.out.suffix!r}; use {', '.join(PICTURES)}")
    check_output(args.out, "--out")
    options = solver_options(args)
    from pydiff.cli import drawing  # takes seconds, for torch

    drawing.run(args, options)
