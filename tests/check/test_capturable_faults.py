"""Everything that a graph would not survive or would freeze is caught, with its kind and its line."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import pydiff
from pydiff import check_capturable
from pydiff.check.capturable import CaptureReport, check_plan
from pydiff.check.watch import Watch
from pydiff.ops import measured
from pydiff.run.loop import step as real_step

WAIT, SHAPE, COPY, CPU = "host synchronisation", "data-dependent shape", "host-to-device copy", "CPU tensor"
CHANGE = "changes from call to call"
SHAPE_X = (2, 4, 6)


def index(x: Tensor) -> Tensor:
    return torch.zeros(3, dtype=torch.int64, device=x.device)


# Each is one line, which has to be found.
FAULTS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "item": (WAIT, lambda x: x.max().item()),
    "bool": (WAIT, lambda x: 1 if (x > 0).all() else 2),
    "int": (WAIT, lambda x: range(int(x.sum()))),
    "float": (WAIT, lambda x: float(x[0, 0, 0])),
    "tolist": (WAIT, lambda x: x[0, 0].tolist()),
    "equal": (WAIT, lambda x: torch.equal(x, x)),
    "allclose": (WAIT, lambda x: torch.allclose(x, x)),
    "cpu": (WAIT, lambda x: x.cpu().numpy()),
    "to cpu": (WAIT, lambda x: x.to("cpu")),
    "format": (WAIT, lambda x: f"{x.sum():.3f}"),
    "repr": (WAIT, lambda x: repr(x)),
    "index with a tensor": (WAIT, lambda x: x[:, x.sum().long()]),
    "slice up to a tensor": (WAIT, lambda x: x[:, : x.sum().long()]),
    "inverse": (WAIT, lambda x: torch.linalg.inv(x[:, :4, :4])),
    "synchronize": (WAIT, lambda x: torch.cuda.synchronize()),
    "accelerator": (WAIT, lambda x: torch.accelerator.synchronize()),
    "empty_cache": (WAIT, lambda x: torch.cuda.empty_cache()),
    "nonzero": (SHAPE, lambda x: x.nonzero()),
    "where": (SHAPE, lambda x: torch.where(x > 0)),
    "mask": (SHAPE, lambda x: x[x > 0]),
    "mask of two dimensions": (SHAPE, lambda x: x[x[..., 0] > 0, 1:]),
    "masked_select": (SHAPE, lambda x: x.masked_select(x > 0)),
    "assignment": (SHAPE, lambda x: x.clone().__setitem__(x > 0, x.new_ones(x.numel()))),
    "unique": (SHAPE, lambda x: x.unique(return_counts=True)),
    "unique_dim": (SHAPE, lambda x: x.unique(dim=1)),
    "repeat_interleave": (SHAPE, lambda x: x[0, 0, :3].repeat_interleave(index(x))),
    "bincount": (SHAPE, lambda x: torch.bincount(index(x))),
    "one_hot": (WAIT, lambda x: nn.functional.one_hot(index(x))),
    "tensor": (COPY, lambda x: torch.tensor([1.0, 2.0], device=x.device)),
    "number": (COPY, lambda x: torch.tensor(1.0, device=x.device)),
    "new_tensor": (COPY, lambda x: x.new_tensor([1.0, 2.0])),
    "arange": (COPY, lambda x: torch.arange(6).to(x.device)),
    "cuda": (COPY, lambda x: torch.ones(6).cuda()),
    "copy_": (COPY, lambda x: x.clone()[0].copy_(torch.ones(4, 6))),
    "list as an index": (COPY, lambda x: x[:, [0, 2]]),
    "cpu tensor": (CPU, lambda x: torch.linspace(0, 1, 5)),
    "cpu list": (CPU, lambda x: torch.tensor([1.0, 2.0])),
}
HARMLESS: dict[str, Callable[[Tensor], Any]] = {
    "integers as an index": lambda x: x[:, index(x)],
    "a number under a mask": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "a number into a slice": lambda x: x.clone().__setitem__((slice(None), 1), 0.0),
    "assignment to integers": lambda x: x.clone().__setitem__((slice(None), index(x)), x.new_zeros(())),
    "repetitions with their sum": lambda x: x.repeat_interleave(index(x)[:2], 0, output_size=4),
    "classes with their number": lambda x: nn.functional.one_hot(index(x), 5),
    "a scalar of the host": lambda x: x * torch.tensor(2.0) + torch.tensor(2.0).item(),
    "tensors made on the device": lambda x: torch.arange(6, device=x.device) + torch.full((), 2.0, device="cuda"),
    "where, with three arguments": lambda x: torch.where(x > 0, x, 0.0).to("cuda").to(x.device).contiguous(),
    "random numbers": lambda x: torch.randn_like(x) + torch.rand(6, device=x.device),
}


def check(fault: Callable[[Tensor], Any], **options: Any) -> CaptureReport:
    def model(x: Tensor, t: Tensor) -> Tensor:
        fault(x)
        return 0.5 * x

    return check_capturable(model, SHAPE_X, **options)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_model_is_found_with_its_line(name):
    kind, fault = FAULTS[name]
    report = check(fault)
    assert not report and report.calls == 3 and report.stopped_by is None
    (problem,) = report.problems
    assert (problem.kind, problem.file, problem.line) == (kind, __file__, fault.__code__.co_firstlineno)
    assert problem.code.startswith(f'"{name}": (') and problem.what and problem.remedy
    for text in (str(report), str(problem)):
        assert all(part in text for part in (kind, f"{__file__}:{problem.line}", problem.code, problem.remedy))
    assert "\n" not in str(problem)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_looks_like_one_and_is_none_is_left_alone(name):
    report = check(HARMLESS[name])
    assert report, str(report)
    assert "nothing was found" in str(report)


def test_one_run_lists_all_faults():
    names = ["item", "mask", "tensor", "cpu tensor", "synchronize"]

    def all_of_them(x: Tensor) -> None:
        for name in names:
            FAULTS[name][1](x)

    assert [p.kind for p in check(all_of_them).problems] == [FAULTS[name][0] for name in names]


def test_lines_of_others_are_named_where_they_are():
    diffusers = pytest.importorskip("diffusers")
    module = diffusers.models.embeddings

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x + module.get_1d_sincos_pos_embed_from_grid(6, torch.arange(4))[None]

    problems = check_capturable(model, SHAPE_X).problems
    assert ("CPU tensor", __file__) == (problems[0].kind, problems[0].file)
    assert any(p.file == module.__file__ for p in problems)


def test_measuring_which_kernel_is_fastest_may_wait():
    def waiting_in(file: str) -> Callable[[Tensor], Any]:
        scope: dict[str, Any] = {}
        exec(compile("def waits(x): return x.max().item()", file, "exec"), scope)
        return scope["waits"]

    assert check(waiting_in(measured.__file__)) and not check(waiting_in("elsewhere.py"))


# ---------------------------------------------------------------------------- from call to call


class Counting(nn.Module):
    """Changes with the number of calls so far, in one of several ways."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.calls, self.kept = way, 0, None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.way == "caches in the first call" and self.kept is None:
            self.kept = x.new_ones(6)
        if self.way == "number":
            return x * self.calls
        if self.way == "number on the host":
            return x * torch.tensor(float(self.calls))
        if self.way == "shape":
            return x[..., : self.calls].mean(-1, keepdim=True) + x
        if self.way == "operator":
            return x.sin() if self.calls % 2 else x.cos()
        if self.way == "one less" and self.calls < 3:
            x = x + 1
        if self.way == "one more" and self.calls > 2:
            x = x + 2
        return x * 0.5


@pytest.mark.parametrize(
    "way, code",
    [
        ("number", "return x * self.calls"),
        ("number on the host", "return x * torch.tensor(float(self.calls))"),
        ("shape", "return x[..., : self.calls].mean(-1, keepdim=True) + x"),
        ("operator", "return x.sin() if self.calls % 2 else x.cos()"),
        ("one less", "return x * 0.5"),
        ("one more", "x = x + 2"),
    ],
)
def test_a_model_that_changes_from_call_to_call(way, code):
    model = Counting(way)
    (problem,) = check_capturable(model, SHAPE_X).problems
    assert (problem.kind, problem.code, problem.file) == (CHANGE, code, __file__) and "call 3" in problem.what
    assert model.calls == 0


@pytest.mark.parametrize("way", ["caches in the first call", "none"])
def test_a_model_that_does_not(way):
    assert check_capturable(Counting(way), SHAPE_X, steps=5)


def test_a_call_that_ends_early_is_found_where_it_left_the_second():
    calls: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(0)
        y = x * 0.5
        if len(calls) < 3:
            x.sin()  # planted
        return y

    (problem,) = check_capturable(model, SHAPE_X).problems
    assert (problem.kind, problem.code) == (CHANGE, "x.sin()  # planted") and not calls


# ---------------------------------------------------------------------------- the loop


LOOP_FAULTS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "sync": (WAIT, lambda x: x.max().item()),
    "copy": (COPY, lambda x: torch.ones(3).to(x.device)),
    "copy back": (WAIT, lambda x: x.cpu()),
    "allocation": ("allocation", lambda x: x + 1),
    "copied by contiguous": ("allocation", lambda x: x.mT.contiguous()),
}


@pytest.mark.parametrize("name", LOOP_FAULTS)
def test_a_fault_in_the_loop_is_found(monkeypatch, name):
    kind, fault = LOOP_FAULTS[name]

    def planted(state: Any, m: Tensor) -> Any:
        fault(state.x)
        return real_step(state, m)

    plan, x = pydiff.make_plan("dpmpp_2m", pydiff.VPLinear(), 3), torch.zeros(SHAPE_X)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return (x + 1).mT.contiguous().mT  # allocates, as models do

    assert check_plan(plan, model, x, allocations=True)
    monkeypatch.setattr("pydiff.run.loop.step", planted)
    problems = check_plan(plan, model, x, allocations=True).problems
    assert kind in {p.kind for p in problems} <= {kind, "allocation"}
    assert {(p.file, p.line) for p in problems} == {(__file__, fault.__code__.co_firstlineno)}
    assert check_plan(plan, model, x).ok == (kind == "allocation")


def test_views_and_writing_in_place_are_no_allocations(monkeypatch):
    def planted(state: Any, m: Tensor) -> Any:
        state.x[:, 1:].mT.reshape(2, 6, 3).mul_(1.0).detach().clamp_(-1, 1)
        torch.add(m, 0.0, out=m)
        return real_step(state, m)

    monkeypatch.setattr("pydiff.run.loop.step", planted)
    plan = pydiff.make_plan("euler", pydiff.VPLinear(), 3)
    report = check_plan(plan, lambda x, t: x * 0.5, torch.zeros(SHAPE_X), allocations=True)
    assert report, str(report)


# ---------------------------------------------------------------------------- errors, and what is left behind


def modes() -> tuple[Any, ...]:
    return (
        _get_current_function_mode_stack(),
        _get_current_dispatch_mode_stack(),
        torch.is_grad_enabled(),
        torch.cuda.synchronize,
        torch.cuda.empty_cache,
        torch.cuda.Event.synchronize,
        torch.cuda.Stream.synchronize,
        torch.accelerator.synchronize,
    )


def test_an_error_of_the_model_is_a_finding_and_leaves_torch_as_it_was():
    before = modes()

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x @ x  # [4, 6] by [4, 6]

    report = check_capturable(model, SHAPE_X)
    (problem,) = report.problems
    assert (problem.kind, problem.code) == ("error", "return x @ x  # [4, 6] by [4, 6]")
    assert "There may be more" in str(report)
    report = check(lambda x: (x.max().item(), x @ x))
    assert [p.kind for p in report.problems] == [WAIT] and report.stopped_by is not None
    assert modes() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_goes_through(error):
    before = modes()

    def interrupted(x: Tensor) -> None:
        raise error

    with pytest.raises(error):
        check(interrupted)
    assert modes() == before and check(lambda x: x)


def test_an_output_of_another_shape_is_an_error():
    (problem,) = check_capturable(lambda x, t: x[:1], SHAPE_X).problems
    assert problem.kind == "error" and "the model returned shape" in problem.what


# ---------------------------------------------------------------------------- what models refer to


NET, LOG, COUNT = nn.Linear(6, 6), logging.getLogger(__name__), 0


@torch.no_grad()
def with_globals(x: Tensor, t: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    LOG.debug("called")
    return helper(x)


def helper(x: Tensor) -> Tensor:
    return NET(x)


class Holder:
    """No module, but holds one, a tensor and a function that holds another."""

    def __init__(self) -> None:
        net = nn.Linear(6, 6)
        self.shift, self.inner, self.calls = torch.ones(6), lambda x: net(x) + NET(x), 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) + self.shift


def test_functions_and_objects_are_copied_with_what_they_hold():
    holder = Holder()
    for model in (with_globals, holder, holder.__call__):
        report = check_capturable(model, SHAPE_X, model_dtype=torch.float32)
        assert report, str(report)
    assert COUNT == 0 and holder.calls == 0
    assert {t.device.type for t in (NET.weight, holder.shift)} == {"cpu"}


def test_what_cannot_be_copied_is_named():
    class Locked(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies of me")

    with pytest.raises(TypeError, match="Locked cannot be copied: no copies of me"):
        check_capturable(Locked(6, 6), SHAPE_X)


# ---------------------------------------------------------------------------- real tensors


def test_real_tensors_are_computed_with_while_they_are_watched():
    x = torch.ones(3)
    with Watch() as watch:
        assert (torch.arange(3) + x).tolist() == [1.0, 2.0, 3.0] and x[x > 0].sum().item() == 3.0
    assert [(p.kind, p.file) for p in watch.problems] == [(CPU, __file__)]  # nothing is waited for on a CPU
    assert watch.operators > 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAULTS)
def test_faults_on_a_real_device(name):
    kind, fault = FAULTS[name]
    x = torch.ones(SHAPE_X, device="cuda") + torch.eye(6, device="cuda")[:4]
    with Watch() as watch, contextlib.suppress(IndexError):  # x[:, 42], where a fake tensor has no such value
        watch.model(fault)(x)
    assert {(p.kind, p.line) for p in watch.problems} == {(kind, fault.__code__.co_firstlineno)}


@pytest.mark.gpu
@pytest.mark.parametrize("name", HARMLESS)
def test_what_looks_like_a_fault_on_a_real_device(name):
    with Watch() as watch:
        watch.model(HARMLESS[name])(torch.ones(SHAPE_X, device="cuda"))
    assert not watch.problems


def test_gradients_inside_a_model_end_in_a_report_and_not_the_process():
    def guided(x, t):
        with torch.enable_grad():
            y = x.detach().requires_grad_(True)
            return x + torch.autograd.grad(y.square().sum(), y)[0]

    report = check_capturable(guided, (2, 3))
    if not torch.backends.cuda.is_built():
        assert not report and report.problems[0].kind == "error" and "could not be followed to its end" in str(report)
        assert "built with CUDA" in report.problems[0].what


def test_marks_for_a_profiler_are_no_change():
    def marked(x, t):
        with torch.profiler.record_function("denoise"):
            return 0.5 * x

    assert check_capturable(marked, (2, 3))


def test_reports_say_what_was_not_seen():
    assert "calls were not compared" in str(check_capturable(lambda x, t: 0.5 * x, (2, 3), steps=2))
    assert "not compared" not in str(check_capturable(lambda x, t: 0.5 * x, (2, 3)))
    with pytest.raises(ValueError, match="x must have a row at least"):
        check_capturable(lambda x, t: 0.5 * x, (0, 3))
    with pytest.raises(ValueError, match="lazy parameters: call it once first"):
        check_capturable(torch.nn.LazyLinear(3), (2, 3))
