"""Every test runs with memory that pydiff leaves uninitialised filled with NaN, so that reading it shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pydiff

PACKAGE = str(Path(pydiff.__file__).parent)


def poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function` (torch.empty or like it), whose floating-point results are NaN where the package called it."""

    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = function(*args, **kwargs)
        if sys._getframe(1).f_code.co_filename.startswith(PACKAGE) and out.is_floating_point():
            out.fill_(float("nan"))
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests run on tiny tensors; a second thread costs more than it brings. Those about threads set their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
