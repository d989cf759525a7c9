"""`pydiff plan`: prints what a solver compiles to, and saves it."""

from __future__ import annotations

import argparse
from pathlib import Path

from pydiff.cli.common import UsageError, add_plan_options, check_output, grid_options, positive_integer, solver_options
from pydiff.schedules.base import NoiseSchedule
from pydiff.schedules.closed_form import EDM, VE, DiscreteBetas, RectifiedFlow, VPCosine, VPLinear
from pydiff.solvers.compiler import make_plan

PREDICTIONS = ("epsilon", "sample", "v_prediction", "score", "flow_prediction")
SCHEDULES = ("vp_linear", "vp_cosine", "edm", "ve", "flow", "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments of `pydiff plan`."""
    add = p.add_argument
    add("solver", metavar="NAME", help="see `pydiff solvers`")
    add("--steps", type=positive_integer, default=10, metavar="N", help="steps (default: 10)")
    add(
        "--schedule",
        choices=SCHEDULES,
        default="vp_linear",
        help="noise schedule (default: vp_linear); the last four have 1000 discrete times, scaled_linear "
        "with the betas of Stable Diffusion",
    )
    add(
        "--prediction",
        choices=PREDICTIONS,
        help="what the model returns (default: epsilon, and flow_prediction where the schedule is flow)",
    )
    add_plan_options(p)
    add("--json", type=Path, metavar="PATH", help="save the plan, for `pydiff.Plan.load`")


def make_schedule(name: str) -> NoiseSchedule:
    """The noise schedule that `--schedule` names."""
    continuous = {"vp_linear": VPLinear, "vp_cosine": VPCosine, "edm": EDM, "ve": VE, "flow": RectifiedFlow}
    if name in continuous:
        return continuous[name]()
    if name == "scaled_linear":
        return DiscreteBetas.named(name, beta_start=0.00085, beta_end=0.012)
    return DiscreteBetas.named(name)


def run(args: argparse.Namespace) -> None:
    """The command."""
    if args.json:
        check_output(args.json, "--json")
    options, schedule = solver_options(args), make_schedule(args.schedule)
    prediction = args.prediction or ("flow_prediction" if args.schedule == "flow" else "epsilon")
    try:
        plan = make_plan(
            args.solver,
            schedule,
            args.steps,
            grid=args.grid,
            prediction=prediction,
            grid_options=grid_options(args, schedule),
            **options,
        )
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
    print(plan)
    if args.json:
        try:
            plan.save(args.json)
        except OSError as error:
            raise UsageError(f"--json {args.json}: writing failed ({error.strerror}), nothing is left") from None
        print(f"saved to {args.json}")
