"""The choice of an attention backend: measured once for each key (by a timer of the test's), then remembered."""

from __future__ import annotations

import threading

import pytest
import torch

from pydiff.ops.attention import attention, attention_reference, backends
from pydiff.ops.attention.backends import AttentionBackend, Call, Chooser, attention_choices, likely
from pydiff.ops.attention.reference import sequence_major, without_dead_rows
from pydiff.ops.measured import Measured

NAMES = ("triton", "cudnn", "flash", "efficient", "math")


def call(b=1, h=2, lq=4, lk=4, d=8, dtype=torch.float32, masked=False) -> Call:
    q, k = torch.zeros(b, h, lq, d, dtype=dtype), torch.zeros(b, h, lk, d, dtype=dtype)
    return Call(q, k, k, torch.ones(b, lk, dtype=torch.bool) if masked else None)


class Bench:
    """Fake backends that take given times, count their runs, and a chooser of them."""

    def __init__(self, limit: int = 256, **times: float | Exception | str) -> None:
        self.times, self.runs, self.timed, self.capturing = times, [], [], False
        made = {name: AttentionBackend(self._run(name), self._accepts(name)) for name in times}
        self.measured = Measured(limit, self._time, lambda: not self.capturing)
        self.chooser = Chooser(made, self.measured, lambda call: ("cudnn", "triton"))

    def _run(self, name):
        def run(call):
            if isinstance(self.times[name], Exception):
                raise self.times[name]
            self.runs.append(name)
            return name

        return run

    def _accepts(self, name):
        reason = self.times[name] if isinstance(self.times[name], str) else ""
        return lambda call: (not reason, reason)

    def _time(self, run) -> float:
        self.timed.append(run())
        return self.times[self.timed[-1]]


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv("PYDIFF_ATTENTION", raising=False)


def test_the_fastest_wins_and_is_measured_once():
    bench = Bench(triton=3.0, flash=1.0, math=2.0)
    assert [bench.chooser.run(call()) for _ in range(3)] == ["flash"] * 3
    assert bench.timed == ["triton", "flash", "math"]
    (choice,) = bench.measured.choices().values()
    assert choice.name == "flash" and choice.microseconds == {"triton": 3.0, "flash": 1.0, "math": 2.0}


def test_a_backend_that_raises_or_refuses_is_left_out_with_its_reason():
    bench = Bench(triton=RuntimeError("out of resources"), cudnn="no masks", math=9.0)
    assert bench.chooser.run(call()) == "math"
    (choice,) = bench.measured.choices().values()
    assert choice.refused == {"triton": "RuntimeError: out of resources", "cudnn": "no masks"}


def test_nothing_that_runs_is_an_error_that_says_why():
    with pytest.raises(RuntimeError, match="no attention backend runs .*ValueError: no"):
        Bench(math=ValueError("no")).chooser.run(call())


@pytest.mark.parametrize("change", [dict(lq=5), dict(lk=5), dict(b=2), dict(dtype=torch.float16), dict(masked=True)])
def test_every_kind_of_call_is_measured_for_itself(change):
    bench = Bench(triton=1.0, math=2.0)
    bench.chooser.run(call())
    bench.times.update(triton=5.0)
    assert bench.chooser.run(call(**change)) == "math" and bench.chooser.run(call()) == "triton"


def test_a_choice_holds_for_the_strides_that_it_was_made_for():
    dense = call(lq=4, lk=4)
    rows = Call(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in dense[:3]))
    odd = Call(*(torch.zeros(1, 4, 2 * 8 + 1)[..., :16].unflatten(2, (2, 8)).transpose(1, 2) for _ in range(3)))
    assert len({dense.key(), rows.key(), odd.key(), dense._replace(scale=-1.0).key()}) == 4
    one = dense.q.as_strided(dense.q.shape, (3, *dense.q.stride()[1:]))  # the stride of a batch of 1 says nothing
    assert dense._replace(q=one).key() == dense.key()
    accepts = backends.chooser.backends["efficient"].accepts
    assert accepts(dense)[0] and not accepts(Call(*(t.transpose(2, 3) for t in dense[:3])))[0]
    assert not accepts(call(d=6))[0]


def test_what_is_not_measured_runs_the_next_when_pytorch_refuses():
    bench = Bench(cudnn=RuntimeError("No available kernel"), triton=1.0)
    bench.capturing = True
    assert bench.chooser.run(call()) == "triton" == bench.chooser.run_unmeasured(call())
    alone = Bench(cudnn=RuntimeError("No available kernel"))
    with pytest.raises(RuntimeError, match="No available"):
        alone.chooser.run_unmeasured(call())


def test_nothing_is_measured_while_a_graph_is_captured():
    bench = Bench(triton=1.0, cudnn="no", math=2.0)
    bench.capturing = True
    assert bench.chooser.run(call()) == "triton" and not bench.timed and not bench.measured.choices()
    bench.capturing = False
    bench.times.update(triton=3.0)
    assert bench.chooser.run(call()) == "math"
    bench.capturing = True
    assert bench.chooser.run(call()) == "math"


def test_a_tracer_gets_what_is_remembered_or_likely():
    bench = Bench(triton=3.0, cudnn=2.0, flash=1.0)
    assert bench.chooser.run_unmeasured(call()) == "cudnn" and not bench.timed
    bench.chooser.run(call())
    assert bench.chooser.run_unmeasured(call()) == bench.chooser.name(call()) == "flash"


def test_the_environment_forces_a_backend_that_accepts(monkeypatch):
    bench = Bench(triton=1.0, flash=2.0, cudnn="no masks")
    monkeypatch.setenv("PYDIFF_ATTENTION", "flash")
    assert bench.chooser.run(call()) == bench.chooser.run_unmeasured(call()) == "flash" and not bench.timed
    monkeypatch.setenv("PYDIFF_ATTENTION", "cudnn")
    with pytest.warns(UserWarning, match="PYDIFF_ATTENTION=cudnn does not run .*no masks"):
        assert bench.chooser.run(call()) == "triton"
    monkeypatch.setenv("PYDIFF_ATTENTION", "fastest")
    with pytest.raises(ValueError, match="PYDIFF_ATTENTION is 'fastest'; it can be triton, flash, cudnn"):
        bench.chooser.run(call())


def test_memory_is_bounded_and_the_oldest_goes():
    bench = Bench(limit=3, triton=1.0)
    for lq in range(1, 6):
        bench.chooser.run(call(lq=lq))
    assert [key[0][2] for key in bench.measured.choices()] == [3, 4, 5]
    bench.measured.clear()
    assert not bench.measured.choices()


def test_unfused_attention_with_many_scores_is_a_last_resort(monkeypatch):
    monkeypatch.setattr(backends, "MATH_SCORES", 31)
    bench = Bench(math=1.0, triton=2.0)
    assert bench.chooser.run(call()) == "triton" and bench.timed == ["triton"]
    assert bench.chooser.run(call(lq=3)) == "math"
    assert Bench(math=1.0).chooser.run(call()) == "math"


def test_threads_measure_a_key_once():
    bench = Bench(triton=1.0, math=2.0)
    ready = threading.Barrier(8)
    got = []

    def work():
        ready.wait()
        got.append(bench.chooser.run(call()))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == ["triton"] * 8 and sorted(bench.timed) == ["math", "triton"]


def test_what_is_likely_without_a_measurement(monkeypatch):
    half = torch.bfloat16
    assert likely(call(d=40, lk=300, dtype=half))[0] == "triton"
    assert likely(call(d=64, lk=77, dtype=half))[0] == "triton"
    assert likely(call(d=64, lk=300, dtype=half))[0] == "cudnn"
    assert likely(call(d=64, lk=300, dtype=half, masked=True))[0] == "triton"
    assert likely(call(d=64, lk=300))[0] == "efficient"
    monkeypatch.setattr(backends.triton_ops, "capability", lambda device: (8, 0))
    assert likely(call(d=128, lk=300, dtype=half))[0] == "flash"
    assert set(likely(call(d=64, lk=300, dtype=half))) == set(NAMES)


def test_the_backends_say_what_they_take():
    assert tuple(backends.chooser.backends) == NAMES and attention_choices() == {}
    accepts = {name: backend.accepts for name, backend in backends.chooser.backends.items()}
    assert accepts["flash"](call(dtype=torch.float16))[0] and accepts["math"](call())[0]
    assert "no mask" in accepts["flash"](call(dtype=torch.float16, masked=True))[1]
    assert "float32" in accepts["cudnn"](call())[1] and "256" in accepts["cudnn"](call(d=512, dtype=torch.float16))[1]
    assert "cpu" in accepts["triton"](call())[1]


@pytest.mark.parametrize("masked", [False, True])
def test_the_unfused_backend_keeps_the_promises_of_the_operation(masked):
    q, k, v = torch.randn(3, 3, 2, 5, 8)
    mask = torch.tensor([[True] * 5, [False] * 5, [True, False] * 2 + [True]]) if masked else None
    out = backends.chooser.backends["math"].run(Call(q, k, v, mask))
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, attention_reference(q, k, v, mask))
    torch.testing.assert_close(out, attention(q, k, v, mask=mask))
    assert not masked or (out[1] == 0).all()


def test_memory_of_the_right_order_is_not_copied():
    x = torch.randn(2, 3, 4, 5)
    moved = sequence_major(x)
    assert torch.equal(moved, x) and moved.stride() == (60, 5, 15, 1)
    assert sequence_major(moved).data_ptr() == moved.data_ptr() and without_dead_rows(x, None) is x
