"""Copied functions refer to copies of what the originals refer to, and share what they share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pydiff.check.copied import Copies

NET, CALLS = nn.Linear(3, 3), 0


def with_globals(x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return NET(x)


def counted() -> int:
    return CALLS + 0 * NET.in_features  # a function that holds no tensor would not be copied


def closure(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x)


def with_defaults(x: Tensor, net: nn.Module = NET, *, more: nn.Module = NET) -> Tensor:
    return net(x) + more(x)


class Holder:
    def __init__(self, *functions: Any) -> None:
        self.first, self.many, self.net = functions[0], [*functions, {"again": functions[0]}], NET


@pytest.mark.parametrize(
    "function, net_of",
    [
        (with_globals, lambda f: f.__globals__["NET"]),
        (closure(NET), lambda f: f.__closure__[0].cell_contents),
        (with_defaults, lambda f: f.__defaults__[0]),
        (with_defaults, lambda f: f.__kwdefaults__["more"]),
    ],
    ids=["globals", "cells", "defaults", "keyword defaults"],
)
def test_a_copied_function_calls_copies(function, net_of) -> None:
    x = torch.randn(2, 3)
    made = Copies().of(function)
    assert made is not function and made.__code__ is function.__code__ and torch.equal(made(x), function(x))
    assert net_of(function) is NET and net_of(made) is not NET
    with torch.no_grad():
        for parameter in net_of(made).parameters():
            parameter.zero_()
    assert not torch.equal(made(x), function(x))


def test_functions_of_a_file_share_its_globals_and_the_original_has_its_own() -> None:
    call, count = Copies().of((with_globals, counted))
    before = CALLS
    call(torch.ones(3))
    call(torch.ones(3))
    assert (count(), CALLS) == (before + 2, before)


@pytest.mark.parametrize("function_first", [True, False])
def test_what_is_shared_stays_shared_in_any_order(function_first) -> None:
    function = closure(NET)
    holder = Holder(function, function)
    if function_first:
        made, held = Copies().of((function, holder))
    else:
        held, made = Copies().of((holder, function))
    assert held.first is made and held.many[0] is held.many[1] is held.many[2]["again"] is made
    assert made.__closure__[0].cell_contents is held.net is not NET
    assert holder.many[0] is holder.first is function


def test_a_function_that_refers_to_itself_and_one_without_a_value_yet() -> None:
    def even(n: int) -> Any:
        return NET if n == 0 else odd(n - 1)

    def odd(n: int) -> Any:
        return None if n == 0 else even(n - 1)

    made = Copies().of(even)
    assert made(4) is made.__globals__["NET"] is not NET and made(3) is None

    def early() -> nn.Module:
        return later

    made = Copies().of(early)
    later = NET
    assert early() is NET
    with pytest.raises(NameError):
        made()


def test_what_holds_no_tensor_need_not_allow_a_copy() -> None:
    guard, limits = SimpleNamespace(lock=threading.Lock()), [1, 2]

    def locked(x: Tensor) -> tuple[Tensor, list[int]]:
        with guard.lock:
            limits.append(3)
            return NET(x), limits

    assert Copies().of(locked)(torch.ones(3))[1] == [1, 2, 3] and limits == [1, 2]
    holder = Holder(locked)
    holder.guard = guard
    with pytest.raises(TypeError, match="Holder cannot be copied: .*lock"):
        Copies().of(holder)
