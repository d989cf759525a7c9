"""A number that is not taken says why; that the benchmark itself is wrong is no reason."""

from __future__ import annotations

import pytest

from benchmarks import graph_timing, harness


@pytest.fixture(autouse=True)
def _faults_of_our_own_are_raised(monkeypatch):
    failure = harness.failure

    def strict(error: BaseException) -> harness.NotMeasured:
        if isinstance(error, (AttributeError, NameError)):
            raise error
        return failure(error)

    for module in (harness, graph_timing):
        monkeypatch.setattr(module, "failure", strict)
