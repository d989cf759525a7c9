"""How far a guard looks: every kind of thing that docs/embedding.md says is seen, each changed alone."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pydiff.graph.guards import DEPTH, LONGEST, Guard, settings
from tests.graph.models import Net
from tests.graph.test_captured import SEEDS, check, eager, sampler


class Wrapped(torch.Tensor):
    """A tensor that has its numbers in another one, as quantised weights do: its own address is always 0."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> Wrapped:
        made = torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype)
        made.inside = inside
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inside"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


class Block(nn.Module):
    """A module in a module in a module, and things as models hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.register_buffer("none", None)
        self.plain = torch.zeros(3)
        self.number = torch.zeros(())
        self.sparse, self.wrapped = torch.eye(2).to_sparse(), Wrapped(torch.zeros(3))
        self.sparse_inside = Wrapped(torch.eye(2).to_sparse())
        self.bank = [torch.zeros(3), torch.zeros(())]
        self.nested: Any = {"a": {"b": {"c": {"d": 1.0}}}}
        self.lists = [[[[1.0, 2.0]]]]
        self.far = SimpleNamespace(one=SimpleNamespace(two=SimpleNamespace(three=SimpleNamespace(four=1.0))))
        self.pair = ({"scale": 1.0}, [1.0])
        self.tags, self.frozen = {"a"}, frozenset([Holder(1.0)])
        self.recent, self.ordered = deque([1.0, 2.0], maxlen=2), OrderedDict(a=1.0)
        self.table = [0.0] * LONGEST
        self.names = {k: 0.0 for k in range(LONGEST)}
        self.call = functools.partial(int, "1", base=Holder(10))
        self.holder = Holder(1.0)


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


def set_at(*path: Any, value: Any = 5.0) -> Callable[[Block], None]:
    """Change what lies at `path`, names of attributes and keys of containers."""

    def change(model: Block) -> None:
        *way, last = path
        at: Any = model
        for key in way:
            at = getattr(at, key) if isinstance(key, str) and hasattr(at, key) else at[key]
        if isinstance(last, str) and hasattr(at, last):
            setattr(at, last, value)
        else:
            at[last] = value

    return change


def widen(model: Block) -> None:
    model.inner[0].weight.data = model.inner[0].weight.data.double()


SEEN: dict[str, Callable[[Block], Any]] = {
    "training of a submodule": lambda m: m.inner[1].eval(),
    "training of all": lambda m: m.train(False),
    "a number of a submodule": lambda m: setattr(m.inner[1], "p", 0.5),
    "the padding of a convolution": lambda m: setattr(m.conv, "padding_mode", "circular"),
    "a new attribute of a submodule": lambda m: setattr(m.inner[1], "scale", 0.5),
    "a submodule exchanged": lambda m: m.inner.__setitem__(1, nn.Identity()),
    "the class of a submodule": lambda m: setattr(m.conv, "__class__", nn.Conv1d),
    "a submodule more": lambda m: m.inner.append(nn.Identity()),
    "a submodule less": lambda m: m.inner.__delitem__(1),
    "a child where there was none": lambda m: m.inner[0].add_module("child", nn.Identity()),
    "a hook before": lambda m: m.inner[0].register_forward_pre_hook(lambda *a: None),
    "a hook after": lambda m: m.inner[0].register_forward_hook(lambda *a: None),
    "a buffer where there was none": lambda m: setattr(m, "none", torch.zeros(3)),
    "a buffer more": lambda m: m.inner[1].register_buffer("late", torch.zeros(3)),
    "memory of a weight": lambda m: setattr(m.inner[0].weight, "data", m.inner[0].weight.data.clone()),
    "dtype of a weight": widen,
    "a tensor as attribute": lambda m: setattr(m, "plain", torch.zeros(3)),
    "memory of a tensor as attribute": lambda m: m.plain.set_(torch.zeros(3)),
    "a sparse tensor as attribute": lambda m: setattr(m, "sparse", torch.eye(2).to_sparse()),
    "memory of what a tensor subclass wraps": lambda m: setattr(m.wrapped, "inside", torch.zeros(3)),
    "a sparse tensor that a subclass wraps": lambda m: setattr(m.sparse_inside, "inside", torch.eye(2).to_sparse()),
    "an equal number as tensor": lambda m: setattr(m, "number", torch.zeros(())),
    "a tensor in a list": lambda m: m.bank.__setitem__(0, torch.zeros(3)),
    "an equal tensor of one number in a list": lambda m: m.bank.__setitem__(1, torch.zeros(())),
    "memory of a tensor in a list": lambda m: m.bank[0].set_(torch.zeros(3)),
    "a tensor more in a list": lambda m: m.bank.append(torch.zeros(3)),
    "four dictionaries deep": set_at("nested", "a", "b", "c", "d"),
    "three dictionaries deep": set_at("nested", "a", "b", "c"),
    "an entry more, four deep": lambda m: m.nested["a"]["b"]["c"].update(e=1.0),
    "four lists deep": set_at("lists", 0, 0, 0, 1),
    "a list shortened, four deep": lambda m: m.lists[0][0][0].pop(),
    "four objects deep": set_at("far", "one", "two", "three"),
    "the attribute of the fourth object": set_at("far", "one", "two", "three", value=SimpleNamespace(four=2.0)),
    "a dictionary in a tuple": set_at("pair", 0, "scale"),
    "a list in a tuple": set_at("pair", 1, 0),
    "a set": lambda m: m.tags.add("b"),
    "an object in a frozen set": lambda m: setattr(next(iter(m.frozen)), "value", 2.0),
    "a queue": lambda m: m.recent.append(3.0),
    "an ordered dictionary": set_at("ordered", "a"),
    "the order of a dictionary": lambda m: (m.ordered.update(b=1.0), m.ordered.move_to_end("a")),
    "the last of a thousand": set_at("table", LONGEST - 1),
    "the last of a thousand keys": set_at("names", LONGEST - 1),
    "an object in a partial": lambda m: setattr(m.call.keywords["base"], "value", 2),
    "the class of an object's value": set_at("holder", "value", value=Holder(1.0)),
    "an object exchanged": set_at("holder", value=Holder(1.0)),
}


def guarded(model: Any, arguments: Any = None) -> Guard:
    guard = Guard(model, arguments)
    assert guard.holds() and guard.difference() == ""
    return guard


def test_memory_of_a_scripted_weight() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    guard = guarded(model)
    model[0].weight.data = model[0].weight.data.clone()
    assert not guard.holds() and "model.0.weight" in guard.difference()


@pytest.mark.parametrize("what", SEEN)
def test_a_change_of_the_model_is_seen_and_named(what) -> None:
    model = Block()
    guard = guarded(model)
    SEEN[what](model)
    assert not guard.holds() and guard.difference()


@pytest.mark.parametrize(
    ("what", "words"),
    {
        "the class of a submodule": "the class of a module is Conv1d and was Conv2d",
        "a new attribute of a submodule": "model.inner.1 has ",
        "a tensor as attribute": "an attribute of model.plain changed (a tensor was replaced)",
        "an equal tensor of one number in a list": "an attribute of model.bank changed (a tensor was replaced)",
        "a number of a submodule": "an attribute of model.inner.1 changed (p: 0.1 became 0.5)",
        "dtype of a weight": "model.inner.0.weight was given other memory",
    }.items(),
)
def test_the_words_for_a_change(what, words) -> None:
    model = Block()
    guard = guarded(model)
    SEEN[what](model)
    assert words in guard.difference()


@pytest.mark.parametrize(
    "change",
    [lambda d: d.update(b=5.0), lambda d: d.pop("b"), lambda d: d.update(c=5.0)],
    ids=["replaced", "removed", "added"],
)
def test_of_many_entries_the_one_that_changed_is_named(change) -> None:
    model, scales = Net(), {"a": 1.0, "b": 2.0}
    model.scales = scales
    guard = guarded(model)
    change(scales)
    assert f"model.scales.{'c' if 'c' in scales else 'b'} " in guard.difference()


def test_a_container_whose_entries_cannot_be_compared_is_named() -> None:
    model = Block()
    guard = guarded(model)
    model.bank = [torch.zeros(3), torch.zeros(3)]  # == of two tensors is no answer
    assert "bank" in guard.difference()
    net = Net()
    net.tensors = [torch.zeros(3)]
    guard = guarded(net)
    net.tensors[0] = torch.zeros(3)
    assert "model.tensors" in guard.difference()


def test_what_is_no_change_is_none() -> None:
    model = Block()
    guard = guarded(model)
    with torch.no_grad():
        model.inner[0].weight.add_(1)
        model.plain.add_(1)
        model.bank[1].fill_(3)
    model.nested["a"]["b"]["c"]["d"] = 1.0
    model.tags.add("a")
    assert guard.holds()


def test_the_limits_are_those_that_are_told() -> None:
    """Deeper than four and longer than a thousand nothing is seen: docs/embedding.md says so."""
    assert (DEPTH, LONGEST) == (4, 1000)
    model = Block()
    model.nested["a"]["b"]["c"]["d"] = {"e": 1.0}
    model.table.append(0.0)
    guard = guarded(model)
    model.nested["a"]["b"]["c"]["d"]["e"] = 2.0
    model.table[0] = 1.0
    assert guard.holds()
    function = fresh(with_defaults)
    deep = function.__kwdefaults__["options"]["deep"] = {"a": {"b": {"c": {"d": 1.0}}}}
    guard = guarded(function)
    deep["a"]["b"]["c"]["d"] = 2.0
    assert guard.holds()


def test_the_condition_is_looked_into_as_deep() -> None:
    cond: Any = {"a": {"b": {"c": {"d": [1.0]}}}}
    guard = guarded(Net(), cond)
    cond["a"]["b"]["c"]["d"][0] = 2.0
    assert not guard.holds() and guard.difference().startswith("cond")


def with_defaults(x, t, scale=1.0, *, shift=0.0, table=({"gain": 1.0},), options={"gain": 1.0}):  # noqa: B006
    return scale * x + shift


def other_body(x, t, scale=1.0, *, shift=0.0, table=(), options=None):
    return x


FUNCTION = {
    "defaults": lambda f: setattr(f, "__defaults__", (2.0,)),
    "no defaults": lambda f: setattr(f, "__defaults__", None),
    "keyword defaults": lambda f: setattr(f, "__kwdefaults__", {**f.__kwdefaults__, "shift": 1.0}),
    "one keyword default": lambda f: f.__kwdefaults__.update(shift=1.0),
    "in a keyword default": lambda f: f.__kwdefaults__["options"].update(gain=2.0),
    "deep in a keyword default": lambda f: f.__kwdefaults__["table"][0].update(gain=2.0),
    "the code itself": lambda f: setattr(f, "__code__", other_body.__code__),
}


def fresh(function: Any) -> Any:
    """A function of its own with defaults of its own."""
    made = type(function)(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    made.__kwdefaults__ = {"shift": 0.0, "table": ({"gain": 1.0},), "options": {"gain": 1.0}}
    return made


@pytest.mark.parametrize("change", FUNCTION)
@pytest.mark.parametrize("held", ["alone", "in a partial", "as an object's __call__"])
def test_defaults_of_a_function(change, held) -> None:
    function = fresh(with_defaults)
    model = {
        "alone": lambda: function,
        "in a partial": lambda: functools.partial(function, scale=2.0),
        "as an object's __call__": lambda: type("Callable", (), {"__call__": function})(),
    }[held]()
    guard = guarded(model)
    FUNCTION[change](function)
    assert not guard.holds() and "model" in guard.difference()


FACTOR = 1.0


def with_a_global(x, t):
    return FACTOR * x


def test_a_number_among_the_global_variables(monkeypatch) -> None:
    guard = guarded(with_a_global)
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert not guard.holds() and "FACTOR: 1.0 became 2.0" in guard.difference()


def test_a_number_in_a_closure() -> None:
    scale, factor = 1.0, 1.0
    guard = guarded(lambda x, t: scale * factor * x)
    factor = 2.0
    assert not guard.holds()
    assert "model" in guard.difference() and "factor: 1.0 became 2.0" in guard.difference()


@contextlib.contextmanager
def switched(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    assert before != value
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextlib.contextmanager
def called(function: Callable[[Any], Any], now: Any, afterwards: Any) -> Iterator[None]:
    function(now)
    try:
        yield
    finally:
        function(afterwards)


CUDA, MATMUL, CUDNN = torch.backends.cuda, torch.backends.cuda.matmul, torch.backends.cudnn
SETTINGS: dict[str, Callable[[], Any]] = {
    "default dtype": lambda: called(torch.set_default_dtype, torch.float64, torch.float32),
    "matmul precision": lambda: called(torch.set_float32_matmul_precision, "high", "highest"),
    "TF32 in cuDNN": lambda: switched(CUDNN, "allow_tf32", not CUDNN.allow_tf32),
    "cuDNN": lambda: switched(CUDNN, "enabled", not CUDNN.enabled),
    "cuDNN's benchmark": lambda: switched(CUDNN, "benchmark", not CUDNN.benchmark),
    "cuDNN's determinism": lambda: switched(CUDNN, "deterministic", not CUDNN.deterministic),
    "sums in fp16": lambda: switched(MATMUL, "allow_fp16_reduced_precision_reduction", False),
    "sums in bf16": lambda: switched(MATMUL, "allow_bf16_reduced_precision_reduction", False),
    "flash": lambda: called(CUDA.enable_flash_sdp, False, True),
    "memory-efficient": lambda: called(CUDA.enable_mem_efficient_sdp, False, True),
    "math": lambda: called(CUDA.enable_math_sdp, False, True),
    "cuDNN's attention": lambda: called(CUDA.enable_cudnn_sdp, False, True),
    "deterministic algorithms": lambda: called(torch.use_deterministic_algorithms, True, False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_of_torchs_settings_is_one_of_the_key(name) -> None:
    device = torch.device("cpu")
    before = settings(device)
    with SETTINGS[name]():
        assert settings(device) != before
        assert len(settings(device)) == len(before)
    assert settings(device) == before


def test_autocast_to_another_dtype_is_another_setting() -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found.append(settings(torch.device("cpu")))
    assert found[0] != found[1]


def test_a_setting_and_back_makes_two_graphs() -> None:
    s = sampler("loop", "ddim", 4)
    check(s, seed=SEEDS)
    with SETTINGS["cuDNN's benchmark"]():
        check(s, seed=SEEDS)
    check(s, seed=SEEDS)
    assert s.stats().captures == 2 and s.stats().recaptures == 0


def test_a_submodule_put_to_training_is_captured_anew() -> None:
    s = sampler("loop", "ddim", 4)
    s.model.inner = nn.Dropout(0.0)
    s.model.eval()
    check(s, seed=SEEDS)
    s.model.inner.train()
    with pytest.warns(UserWarning, match="training: False became True.* since the loop was captured"):
        after = s((3, 2, 4, 5), seed=SEEDS)
    assert torch.equal(after, eager(s, (3, 2, 4, 5), seed=SEEDS)) and s.stats().recaptures == 1
