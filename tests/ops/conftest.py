"""Fixtures of the operations' tests."""

from __future__ import annotations

from typing import Any

import pytest

from pydiff.ops import triton_ops


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that would have been launched."""
    kernels: list[Any] = []
    monkeypatch.setattr(triton_ops, "launch", lambda kernel, *_, **__: kernels.append(kernel))
    return kernels
