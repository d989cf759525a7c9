"""What a graph would not see of a model, its condition and torch's settings is noticed before a replay."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import pydiff
from pydiff.graph.captured import CapturedLoop
from tests.graph.models import Net
from tests.graph.recorded import RecordedGraphs
from tests.graph.test_captured import SEEDS, SHAPE, check, eager, sampler


def test_weights_changed_in_place_are_honoured() -> None:
    s = sampler("loop", "ddim", 5)
    before = check(s, seed=SEEDS)
    with torch.no_grad():
        s.model.gain.copy_(torch.tensor(0.5))
        s.model.offset.add_(1)
    assert not torch.equal(check(s, seed=SEEDS), before)
    assert s.stats().captures == 1 and s.stats().recaptures == 0


def replace_parameter(net: Net) -> None:
    net.gain = nn.Parameter(torch.tensor(0.5))


def replace_data(net: Net) -> None:
    net.gain.data = torch.tensor(0.5)


def replace_buffer(net: Net) -> None:
    net.offset = torch.tensor(0.5)


def add_hook(net: Net) -> None:
    net.register_forward_hook(lambda module, inputs, output: 2 * output)


def patch_forward(net: Net) -> None:
    net.forward = functools.partial(lambda f, x, t: 2 * f(x, t), net.forward)


def change_number(net: Net) -> None:
    net.scale = 0.25


def other_dtype(net: Net) -> None:
    net.double()


def hook_changes(net: Net) -> None:
    HOOK.factor = 3.0


def other_class(net: Net) -> None:
    net.__class__ = Halved


def less(net: Net) -> None:
    del net.kept


CHANGES = [
    hook_changes,
    other_class,
    less,
    replace_parameter,
    replace_data,
    replace_buffer,
    add_hook,
    patch_forward,
    change_number,
    other_dtype,
]


class Halved(Net):
    def forward(self, x, t):
        return 0.5 * super().forward(x, t)


class Hook:
    factor = 1.0

    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, module, inputs, output):
        return self.factor * output


HOOK = Hook()
SAME_RESULT = ("other_dtype", "less")


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_a_graph_would_not_see_is_captured_anew_with_one_warning(change) -> None:
    s = sampler("loop", "ddim", 5, model_dtype=torch.float32)
    HOOK.factor = 1.0
    s.model.register_forward_hook(HOOK)
    s.model.kept = 1
    before = check(s, seed=SEEDS)
    change(s.model)
    with pytest.warns(UserWarning, match="since the loop was captured: it is captured anew"):
        after = s(SHAPE, seed=SEEDS)
    assert torch.equal(after, eager(s, SHAPE, seed=SEEDS))
    assert torch.equal(after, before) == (change.__name__ in SAME_RESULT)
    assert s.stats().recaptures == 1 and s.stats().captures == 2
    replace_parameter(s.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(s, seed=SEEDS)
    assert s.stats().recaptures == 2


class Counting(Net):
    """Counts its calls, and keeps what it saw last."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, None

    def forward(self, x, t):
        self.calls, self.seen = self.calls + 1, x
        return super().forward(x, t)


def test_a_model_that_its_own_calls_change_is_not_captured() -> None:
    s = pydiff.Sampler(Counting(), "ddim", 5)
    s.graphs = CapturedLoop("loop", 4, RecordedGraphs())
    with pytest.warns(UserWarning, match="every call changes the model.*calls: .* became"):
        check(s, seed=SEEDS)
    calls = s.model.calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(s, seed=SEEDS)
    assert s.model.calls == calls + 2 * 5 and s.stats().eager == 2  # it is not tried again at every call


class Caching(Net):
    """Answers every third call from what it kept of the one before, as caches of features do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x, t):
        self.calls += 1
        return 0.5 * x if self.calls % 3 == 0 else super().forward(x, t)


def test_a_cache_that_skips_calls_is_not_captured() -> None:
    s = pydiff.Sampler(Caching(), "ddim", 6)
    s.graphs = CapturedLoop("loop", 4, RecordedGraphs())
    with pytest.warns(UserWarning, match="every call changes the model"):
        check(s, seed=SEEDS)


def test_a_callback_that_changes_the_model_is_noticed_at_the_next_call() -> None:
    s = sampler("loop", "ddim", 5)

    def halve(info) -> None:
        s.model.scale = 0.5

    s(SHAPE, seed=SEEDS, callback=halve, callback_stages=[4])
    with pytest.warns(UserWarning, match="scale: 1.0 became 0.5"):
        check(s, seed=SEEDS)


class Counter(Net):
    """Writes into a buffer of its own at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x, t):
        self.steps.add_(1)
        return super().forward(x, t) * self.steps * 0.1


def test_a_model_that_writes_its_own_buffers_is_not_captured_and_left_as_it_was() -> None:
    s = pydiff.Sampler(Counter(), "ddim", 4)
    expected = pydiff.Sampler(Counter(), "ddim", 4)(SHAPE, seed=SEEDS)
    s.graphs = CapturedLoop("loop", 4, RecordedGraphs())
    with pytest.warns(UserWarning, match="every call writes into the buffer steps"):
        assert torch.equal(s(SHAPE, seed=SEEDS), expected)
    assert s.model.steps == 4


def test_what_cannot_be_guarded_runs_eagerly(monkeypatch) -> None:
    class Odd:
        def __len__(self) -> int:
            raise ValueError

    s = sampler("loop", "ddim", 4)
    s.model.odd, s.model.number = Odd(), np.array(0.5)
    check(s, seed=SEEDS)
    assert s.stats().captures == 1
    scripted = pydiff.Sampler(torch.jit.script(nn.Linear(5, 5)), "ddim", 4)
    linear = scripted.model
    scripted.model = lambda x, t: linear(x)
    scripted.graphs = CapturedLoop("loop", 4, RecordedGraphs())
    check(scripted, seed=SEEDS)

    def refuse(*arguments) -> None:
        raise TypeError("no attributes")

    monkeypatch.setattr("pydiff.graph.warm_up.Guard", refuse)
    broken = sampler("loop", "ddim", 4)
    with pytest.warns(UserWarning, match="cannot be guarded against changes: .*no attributes"):
        check(broken, seed=SEEDS)


def test_without_its_guard_a_graph_goes_stale(monkeypatch) -> None:
    monkeypatch.setattr("pydiff.graph.guards.Guard.holds", lambda self: True)
    s = sampler("loop", "ddim", 5)
    before = s(SHAPE, seed=SEEDS)
    replace_parameter(s.model)
    assert torch.equal(s(SHAPE, seed=SEEDS), before)
    assert not torch.equal(eager(s, SHAPE, seed=SEEDS), before)


class Adapter(nn.Module):
    """A LoRA layer as peft makes them: scales in a dictionary, weights in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.lora = nn.Linear(5, 5), nn.ModuleDict({"a": nn.Linear(5, 5)})
        self.scaling, self.active = {"a": 0.5}, ["a"]

    def forward(self, x, t):
        return self.base(x) + sum(self.scaling[k] * self.lora[k](x) for k in self.active)


def test_lora_scales_and_adapters_are_seen() -> None:
    model = Adapter().requires_grad_(False)
    s = pydiff.Sampler(model, "ddim", 4)
    s.graphs = CapturedLoop("loop", 4, RecordedGraphs())
    check(s, (2, 5), seed=[1, 2])

    def scale() -> None:
        model.scaling["a"] = 2.0

    def switch_off() -> None:
        model.active.clear()

    def another() -> None:
        model.lora["b"], model.scaling["b"] = nn.Linear(5, 5), 1.0
        model.active.append("b")

    with pytest.warns(UserWarning, match="model.scaling.a was replaced"):
        scale()
        check(s, (2, 5), seed=[1, 2])
    for change in (switch_off, another):
        change()
        before = s.stats().captures
        check(s, (2, 5), seed=[1, 2])
        assert s.stats().captures == before + 1


NET = Net()


def uses_a_global(x, t):
    return sum(net(x, t) for net in [NET])


@pytest.mark.parametrize("make", ["closure", "partial", "method", "object", "default", "global"])
def test_models_that_are_no_modules_are_guarded(make) -> None:
    net, factor = Net(), 1.0
    NET.gain = nn.Parameter(torch.tensor(0.9))

    class Wrapper:
        def __init__(self) -> None:
            self.net, self.factor = net, 1.0

        def __call__(self, x, t):
            return self.factor * self.net(x, t)

    wrapper = Wrapper()
    model = {
        "closure": lambda x, t: factor * net(x, t),
        "partial": functools.partial(net, labels=None),
        "method": net.forward,
        "object": wrapper,
        "default": lambda x, t, net=net: net(x, t),
        "global": uses_a_global,
    }[make]
    s = pydiff.Sampler(model, "ddim", 4)
    s.graphs = CapturedLoop("loop", 4, RecordedGraphs())
    before = check(s, seed=SEEDS)
    factor = wrapper.factor = 0.5
    if make in ("partial", "method", "default", "global"):
        replace_parameter(NET if make == "global" else net)
    with pytest.warns(UserWarning, match="captured anew"):
        assert not torch.equal(check(s, seed=SEEDS), before)


def test_training_flags_are_part_of_the_key() -> None:
    s = sampler("loop", "ddim", 4)
    for training in (False, True, False, True):
        s.model.train(training)
        check(s, seed=SEEDS)
    assert s.stats().captures == 2 and s.stats().recaptures == 0
    inner = nn.Dropout(0.0)
    s.model.add_module("inner", inner)
    s.model.eval()
    with pytest.warns(UserWarning, match="captured anew"):
        check(s, seed=SEEDS)


def test_another_model_in_the_same_sampler() -> None:
    s = sampler("loop", "ddim", 4)
    before = check(s, seed=SEEDS)
    s.model = Net().requires_grad_(False)
    s.model.gain.mul_(0.5)
    assert not torch.equal(check(s, seed=SEEDS), before)


class Knob:
    """Something that a model is given in its condition, beside tensors."""

    def __init__(self) -> None:
        self.factor = 1.0


class Knobbed(Net):
    def forward(self, x, t, knob=None, settings=None):
        return knob.factor * super().forward(x, t) * settings.get("scale", 1.0)


class Settings(dict):
    """A dictionary with attributes, as libraries have them."""


def test_objects_in_the_condition_are_guarded() -> None:
    s = pydiff.Sampler(Knobbed(), "ddim", 5)
    s.graphs = CapturedLoop("loop", 4, RecordedGraphs())
    knob, cond = Knob(), {"settings": Settings(scale=2.0)}
    before = check(s, seed=SEEDS, cond={"knob": knob, **cond})
    knob.factor = 0.5
    with pytest.warns(UserWarning, match="factor: 1.0 became 0.5"):
        assert not torch.equal(check(s, seed=SEEDS, cond={"knob": knob, **cond}), before)
    captures = s.stats().captures
    for _ in range(2):
        s(SHAPE, seed=SEEDS, cond={"knob": knob, "settings": Settings(scale=float("nan"))}, check_finite=False)
    assert s.stats().captures == captures + 1  # NaN is the same number the next time


def test_settings_of_torch_are_part_of_the_key() -> None:
    s = sampler("loop", "ddim", 4)
    check(s, seed=SEEDS)
    torch.set_default_dtype(torch.float64)
    try:
        check(s, seed=SEEDS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert s.stats().captures == 2
