"""What the compiled stage keeps bound between two calls, and when it lets go."""

from __future__ import annotations

import copy
import gc
import pickle
from dataclasses import replace

import pytest
import torch

from pydiff.ops import native
from pydiff.ops.stage import stage
from tests.ops.stage_cases import Options, check, lay_out, make_case, move


@pytest.mark.skipif(not native.available("stage", torch.device("cpu"))[0], reason="no compiled code")
class TestBinding:
    """What the fast path keeps between stages, and when it lets go."""

    def case(self, **options):
        t, m = make_case(6, Options(**options), poison=False)
        t.cursor.zero_()
        t.stop.fill_(7)
        return t, m

    def step_checked(self, t, m):
        before = move(t, "cpu")
        stage(t, m)
        check(before, m, t)

    def test_it_is_kept_while_nothing_moves(self):
        t, m = self.case()
        stage(t, m)
        bound = t.bound
        stage(t, m.clone())
        assert bound is not None and t.bound is bound

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.double(),
            lambda m: m.bfloat16(),
            lambda m: lay_out(m, "transposed"),
            lambda m: lay_out(m, "sliced"),
            lambda m: m.clone().requires_grad_(),
            lambda m: torch.nn.Parameter(m),
            lambda m: m.as_subclass(Labelled),
            lambda m: torch.complex(torch.zeros_like(m), -m).conj().imag,
        ],
    )
    def test_another_kind_of_model_output(self, change):
        t, m = self.case()
        stage(t, m)
        self.step_checked(t, change(m))
        self.step_checked(t, m)

    def test_a_negated_view_with_the_strides_of_a_plain_one(self):
        t, m = self.case()
        pair = torch.complex(m, m)
        for part in (pair.imag, pair.conj().imag, pair.imag):
            self.step_checked(t, part)

    @pytest.mark.parametrize("name", ["registers", "model_input", "cursor", "seeds", "coefficients", "nonfinite"])
    def test_a_replaced_tensor(self, name):
        t, m = self.case()
        stage(t, m)
        setattr(t, name, getattr(t, name).clone())
        gc.collect()
        assert t.bound is None
        self.step_checked(t, m)

    @pytest.mark.parametrize("name", ["registers", "model_input", "cursor", "coefficients"])
    def test_a_tensor_given_new_memory_behind_our_back(self, name):
        t, m = self.case(sample=(1000,))
        stage(t, m)
        tensor = getattr(t, name)
        tensor.set_(tensor.clone())
        self.step_checked(t, m)

    def test_removed_and_added_operands(self):
        t, m = self.case(present=("constant", "mask"))
        self.step_checked(t, m)
        t.constant = t.mask = None
        self.step_checked(t, m)
        t.extra = torch.randn(4, 1, 1, 1).expand(4, 3, 5, 7)
        self.step_checked(t, m)

    def test_copies_share_nothing(self):
        t, m = self.case()
        stage(t, m)
        for other in (copy.deepcopy(t), pickle.loads(pickle.dumps(t)), replace(t, registers=t.registers.clone())):
            held = t.registers.clone()
            other.cursor = other.cursor.clone()
            other.registers = other.registers.clone()
            self.step_checked(other, m)
            assert torch.equal(held, t.registers)

    def test_more_dimensions_than_the_loops_take(self, monkeypatch):
        monkeypatch.setattr(native, "warned", set())
        t, m = self.case(sample=(2,) * 8)
        m = torch.zeros(4, *(3,) * 8)[(slice(None), *(slice(0, 3, 2),) * 8)].copy_(m)
        with pytest.warns(UserWarning, match="too many dimensions"):
            self.step_checked(t, m)


class Labelled(torch.Tensor):
    """A subclass as image libraries have them."""
