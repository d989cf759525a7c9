"""What a compiler sees: whole graphs, fake tensors, and operators that keep torch's rules."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pydiff.ops import noise
from pydiff.ops.stage import StageTensors, stage
from tests.ops.stage_cases import OPTIONAL, Options, check, make_case, move


def case(**options) -> tuple[StageTensors, torch.Tensor]:
    t, m = make_case(3, Options(copies=2, **options), poison=False)
    t.cursor.zero_()
    t.stop.fill_(7)
    return t, m


def arguments(t: StageTensors, m: torch.Tensor) -> tuple:
    return (
        m,
        t.registers,
        t.cursor,
        t.stop,
        t.seeds,
        t.coefficients,
        t.indices,
        t.copies,
        t.model_input,
        t.model_time,
        t.mask,
        t.known,
        t.constant,
        t.extra,
        t.noise,
        t.nonfinite,
    )


@pytest.mark.parametrize("present", [(), OPTIONAL])
def test_the_stage_operator_keeps_the_rules(present):
    t, m = case(present=present)
    torch.library.opcheck(torch.ops.pydiff.stage.default, arguments(t, m))


def test_the_noise_operator_keeps_the_rules():
    torch.library.opcheck(torch.ops.pydiff.normal.default, (torch.tensor([1, 2, 3]), 5, [3, 7]))


def test_the_operator_computes_what_the_function_does():
    t, m = case(present=OPTIONAL)
    other = move(t, "cpu")
    torch.ops.pydiff.stage(*arguments(t, m))
    stage(other, m)
    assert torch.equal(t.registers, other.registers) and torch.equal(t.model_input, other.model_input)


@pytest.mark.parametrize("engine", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_loop_compiles_to_one_graph(engine):
    torch._dynamo.reset()
    t, m = case(present=("constant",))
    network = torch.nn.Conv2d(3, 3, 3, padding=1)

    def loop_body(t: StageTensors, m: torch.Tensor) -> torch.Tensor:
        stage(t, m)
        return network(t.model_input) + noise.normal(t.seeds, 4, t.sample_shape).repeat(2, 1, 1, 1)

    compiled = torch.compile(loop_body, fullgraph=True, backend=engine)
    with torch.no_grad():
        for _ in range(3):
            before = move(t, "cpu")
            result = compiled(t, m)
            check(before, m, t)
            expected = network(t.model_input) + noise.normal(t.seeds, 4, t.sample_shape).repeat(2, 1, 1, 1)
            torch.testing.assert_close(result, expected)
            m = torch.randn_like(m)


def test_fake_tensors_pass_through():
    t, m = case()
    short = m[:2]
    with FakeTensorMode() as mode:
        fake = StageTensors(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in arguments(t, m)[1:]))
        stage(fake, mode.from_tensor(m))
        z = noise.normal(fake.seeds, 0, (3, 5, 7))
        assert z.shape == (4, 3, 5, 7) and z.dtype == torch.float32 and type(z).__name__ == "FakeTensor"
        with pytest.raises(ValueError, match="the model returned shape"):
            stage(fake, mode.from_tensor(short))


def test_meta_tensors_pass_through():
    t, m = case()
    stage(move(t, "meta"), m.to("meta"))
    assert noise.normal(t.seeds.to("meta"), 0, (2,)).shape == (4, 2)


def test_inference_tensors_and_gradients_are_accepted():
    t, m = case()
    before = move(t, "cpu")
    weight = torch.ones((), requires_grad=True)
    stage(t, weight * m)
    check(before, m, t)
    assert not t.registers.requires_grad
    with torch.inference_mode():
        t, m = case()
        before = move(t, "cpu")
        stage(t, m)
        check(before, m, t)
