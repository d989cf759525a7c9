"""Between two model calls the eager loop on the CPU makes no tensor: every solver, every option that has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pydiff
from pydiff.ops.native import available
from pydiff.run import loop
from pydiff.run.options import RunOptions

pytestmark = pytest.mark.skipif(not available("stage", torch.device("cpu"))[0], reason="needs the compiled stage")
SHAPE = (2, 3, 8, 8)


class Made(TorchDispatchMode):
    """The operators outside the model that return memory of their own, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.inside, self.names = 0, False, []

    def model(self, x: torch.Tensor, t: torch.Tensor, labels: Any = None) -> torch.Tensor:
        self.calls, self.inside = self.calls + 1, True
        try:
            return 0.5 * x
        finally:
            self.inside = False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if not self.inside and not operator.is_view:
            self.names.append((self.calls, str(operator)))
        return result


def after_warm_up(plan: pydiff.Plan, callback: Any = None, **options: Any) -> list[tuple[int, str]]:
    """What the loop made after the first stage, which binds the operation."""
    made = Made()
    state = pydiff.init(plan, torch.randn(SHAPE), seed=1, **options)
    arguments = {"labels": torch.zeros(4)} if plan.guided else {}
    with torch.no_grad(), made:
        loop.run(state, made.model, arguments, RunOptions(callback=callback))
    assert made.calls == len(plan)
    return [name for name in made.names if 1 < name[0] < len(plan)]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("solver", [s.name for s in pydiff.list_solvers()])
def test_no_tensor_is_made_after_the_first_stage(solver: str, scale: float) -> None:
    for schedule in (pydiff.VPLinear(), pydiff.EDM()):
        plan = pydiff.make_plan(solver, schedule, 7, guidance_scale=scale, known=True)
        assert after_warm_up(plan) == []
        assert after_warm_up(plan, mask=torch.ones(8, 8), known=torch.zeros(SHAPE), model_dtype=torch.bfloat16) == []


def test_an_allocation_would_be_seen() -> None:
    kept = []
    plan = pydiff.make_plan("ddim", pydiff.VPLinear(), 4)
    found = after_warm_up(plan, callback=lambda info: kept.append(info.x.clone()))
    assert [stage for stage, name in found if name == "aten.clone.default"] == [2, 3]
