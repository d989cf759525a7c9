"""Every test runs with memory that pydiff leaves uninitialised filled with NaN, so that reading it shows.

Where there is no CUDA device, Triton kernels run in Triton's interpreter, which has to be asked for before they are
imported.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pydiff

INTERPRETED = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"

with torch.device("meta"):
    torch.empty(1)  # the mode remembers torch's factories when it is first used: it must not be the poisoned ones

PACKAGE = str(Path(pydiff.__file__).parent)


def poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function` (torch.empty or like it), whose floating-point results are NaN where the package called it."""

    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = function(*args, **kwargs)
        if torch.compiler.is_compiling():  # a graph has no frames to look at
            return out
        if sys._getframe(1).f_code.co_filename.startswith(PACKAGE) and out.is_floating_point():
            out.fill_(float("nan"))
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    yield


@pytest.fixture(autouse=True, scope="session")
def interpret_bfloat16_as_a_gpu_does() -> Iterator[None]:
    """Triton's interpreter truncates float32 to bfloat16, and multiplies bfloat16 matrices by their bit patterns."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def rounding(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(source.data, np.float32)).to(torch.bfloat16).view(torch.int16)
            return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, target)

    def numeric(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = cast(self, a, tl.float32), cast(self, b, tl.float32)
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", rounding)
        patch.setattr(builder, "create_dot", numeric)
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
