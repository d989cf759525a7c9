"""The registry of solvers: what is known of each beside its code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydiff.schedules.suggestion import suggestion

SolverFunction = Callable[..., None]


@dataclass(frozen=True)
class Solver:
    """A registered solver.

    Attributes:
        name: what users type.
        build: writes the stages onto a `PlanBuilder`; its keyword arguments are the solver's options.
        order: order of convergence, start-up included, for the default options; `order_of` answers for others.
        calls: model calls a step (a step is one interval of the time grid), in words.
        stochastic: whether noise is added with the default options.
        paper: title, arXiv number and equation or algorithm.
        exact_mean: a model that always answers with the same x0 ends exactly at alpha * x0 (checked on every plan).
        order_rule: the order as a function of all options, where it depends on them.
    """

    name: str
    build: SolverFunction
    order: int
    calls: str
    stochastic: bool
    paper: str
    exact_mean: bool = True
    order_rule: Callable[..., int] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the options that `make_plan` takes for this solver."""
        parameters = list(inspect.signature(self.build).parameters.values())[1:]
        return {p.name: p.default for p in parameters}

    @property
    def summary(self) -> str:
        """One line on what it is."""
        return (inspect.getdoc(self.build) or "").splitlines()[0]

    def order_of(self, **options: Any) -> int:
        """The order of convergence with these options, the others at their defaults."""
        return self.order_rule(**{**self.options, **options}) if self.order_rule else self.order


_SOLVERS: dict[str, Solver] = {}


def solver(
    name: str,
    *,
    order: int,
    calls: str,
    paper: str,
    stochastic: bool = False,
    exact_mean: bool = True,
    order_rule: Callable[..., int] | None = None,
) -> Callable[[SolverFunction], SolverFunction]:
    """Register a solver function under `name`; the other arguments are the fields of `Solver`.

    The decorator raises ValueError for a name that is taken.
    """

    def register(build: SolverFunction) -> SolverFunction:
        if name in _SOLVERS:
            raise ValueError(f"solver {name!r} is registered twice")
        _SOLVERS[name] = Solver(name, build, order, calls, stochastic, paper, exact_mean, order_rule)
        return build

    return register


def get_solver(name: str) -> Solver:
    """What is known of a solver: its options, order, model calls a step and paper.

    Args:
        name: a registered name.

    Raises: ValueError for an unknown name, with a suggestion.

    Example:
        assert pydiff.get_solver("ddim").options["eta"] == 0.0
        plan = pydiff.make_plan("ddim", steps=10, eta=0.5)
    """
    if name in _SOLVERS:
        return _SOLVERS[name]
    raise ValueError(
        f"solver must be one of the registered names, got {name!r}{suggestion(name, _SOLVERS)}; "
        f"known: {', '.join(_SOLVERS)}"
    )


def list_solvers() -> list[Solver]:
    """All registered solvers, in the order of their names.

    Example:
        for solver in pydiff.list_solvers():
            print(f"{solver.name}: order {solver.order}, {solver.calls} calls a step; {solver.paper}")
    """
    return sorted(_SOLVERS.values(), key=lambda s: s.name)
