"""States: explicit, forkable, movable, saveable, and every row on its own."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pydiff
from pydiff.plans import table
from pydiff.run.beginning import row_seeds, seed_values
from pydiff.run.state import State

SHAPE = (3, 5)
PLANS = [
    pydiff.make_plan("dpmpp_2m", steps=7),
    pydiff.make_plan("ddim", steps=3, guidance_scale=2.5),
    pydiff.make_plan("unipc", steps=5, guidance_scale=0.0),
    pydiff.make_plan("dpmpp_2m_sde", steps=4),
    pydiff.make_plan("euler_ancestral", steps=6, guidance_scale=[1, 3, 3, 1, 1, 1]),
    pydiff.make_plan("dpm_solver_3", steps=2),
    pydiff.make_plan("heun", pydiff.EDM(), steps=3, s_churn=2.0, prediction=pydiff.EDMPrecond()),
]


def toy(x, t):
    """A model that keeps rows apart bit for bit: no matrix product, nothing transcendental."""
    t = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return 0.5 * x + 0.25 * t * x.clamp(-1, 1)


def guided(x, t):
    """The same, but different on the conditional half of [unconditional; conditional] rows."""
    rows = x.shape[0] // 2
    shift = torch.cat([torch.zeros(rows), torch.ones(rows)]).reshape(-1, *[1] * (x.ndim - 1))
    return toy(x, t) + 0.1 * shift.to(x.dtype)


def noisy(rows, seed=0):
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


def finish(state, model=toy):
    while not state.finished:
        pydiff.step(state, model(state.model_input, state.model_time))
    return state.x.clone()


def advance(state, steps, model=toy):
    for _ in range(steps):
        pydiff.step(state, model(state.model_input, state.model_time))
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [s.name for s in pydiff.list_solvers()])
def test_the_loop_by_hand_is_run_plan(solver, dtype) -> None:
    plan, x = pydiff.make_plan(solver, steps=5), noisy(2)
    before = x.clone()
    state = pydiff.init(plan, x, seed=3, dtype=dtype)
    assert torch.equal(finish(state), pydiff.run_plan(plan, toy, x, seed=3, dtype=dtype))
    assert torch.equal(x, before) and state.x.dtype == dtype and state.stages_done == len(plan)
    assert not torch.equal(state.x.to(x.dtype), before)


def test_what_a_state_shows() -> None:
    state = pydiff.init(PLANS[0], noisy(2), seed=0)
    assert state.stage.tolist() == [0, 0] and state.total == 7 and not state.finished
    assert torch.equal(state.model_input, state.x) and torch.equal(state.model_time, torch.ones(2))
    assert state.tensors.registers.isfinite().all()  # the history too, though nothing reads it yet: `save` writes it
    assert pydiff.step(state, toy(state.model_input, state.model_time)) is state
    advance(state, 1)
    assert state.stage.tolist() == [2, 2] and state.stages_done == 2
    torch.testing.assert_close(state.model_time, torch.full((2,), PLANS[0].model_times[2], dtype=torch.float32))


def test_forks_go_their_own_ways() -> None:
    state = advance(pydiff.init(PLANS[3], noisy(2), seed=5), 2)
    other = state.clone()
    same = state.clone()
    mine = finish(state)
    theirs = finish(other, lambda x, t: -toy(x, t))
    assert torch.equal(finish(same), mine) and not torch.equal(mine, theirs)
    assert torch.equal(mine, pydiff.run_plan(PLANS[3], toy, noisy(2), seed=5))


def test_a_row_moved_into_a_fork_does_not_touch_the_original() -> None:
    state = advance(pydiff.init([PLANS[3], PLANS[0]], noisy(2), seed=[1, 2]), 1)
    fork, expected = state.clone(), finish(state.clone())
    for row in (0, 1):  # another seed for the one, a shorter plan for the other
        fork.copy_row_from(advance(pydiff.init(PLANS[3], noisy(1, 9), seed=77), 2), 0, row)
    finish(fork)
    assert torch.equal(finish(state), expected)


def test_forking_a_noise_function_is_refused() -> None:
    state = pydiff.init(PLANS[3], noisy(2), noise=lambda k: torch.zeros(2, *SHAPE))
    for use in (state.clone, state.state_dict):
        with pytest.raises(ValueError, match=r"function or generator cannot be .*; use seeds, or a noise tensor"):
            use()


@pytest.mark.parametrize("noise", ["seeds", "tensor"])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_saved_state_goes_on_with_the_same_bits(at, noise) -> None:
    plan, x = PLANS[3], noisy(2)
    given_noise = {"seed": 5} if noise == "seeds" else {"noise": torch.randn(plan.num_draws, *x.shape)}
    state = advance(pydiff.init(plan, x, model_dtype=torch.bfloat16, **given_noise), at)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    expected = finish(state)
    file.seek(0)
    restored = State.from_state_dict(torch.load(file, weights_only=True))
    assert restored.stages_done == at and restored.plans == state.plans
    assert torch.equal(finish(restored), expected)


def test_a_saved_state_holds_no_reference_to_the_run() -> None:
    state = advance(pydiff.init([PLANS[0], PLANS[2]], noisy(2), seed=5), 2)
    saved = state.state_dict()
    expected = finish(state)
    first, second = State.from_state_dict(saved), State.from_state_dict(saved)
    assert torch.equal(finish(first), expected) and torch.equal(finish(second), expected)


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(range(len(PLANS))), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=6
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_row_does_not_know_its_batch(rows) -> None:
    """Plans, lengths, seeds and guidance of its own: the same bits as alone."""
    x = noisy(len(rows))
    plans = [PLANS[k] for k, _ in rows]
    state = pydiff.init(plans, x, seed=[s for _, s in rows], copies=2)
    together = finish(state, guided)
    for i, (k, seed) in enumerate(rows):
        alone = finish(pydiff.init(PLANS[k], x[i : i + 1], seed=[seed], copies=2), guided)
        assert torch.equal(together[i], alone[0])


def test_a_row_that_did_know_its_batch_would_be_seen() -> None:
    x, leaking = noisy(2), lambda x, t: guided(x, t) + 1e-6 * x.mean()
    together = finish(pydiff.init(PLANS[0], x, seed=[1, 2], copies=2), leaking)
    assert not torch.equal(together[:1], finish(pydiff.init(PLANS[0], x[:1], seed=[1], copies=2), leaking))


def test_a_finished_row_is_left_alone() -> None:
    state = pydiff.init([PLANS[5], PLANS[0]], noisy(2), seed=1)
    advance(state, 6)
    assert state.stage.tolist() == [6, 6] and not state.finished
    done = state.x[0].clone()
    m = toy(state.model_input, state.model_time)
    m[0] = torch.nan  # what the model answers for it does not matter
    pydiff.step(state, m)
    assert torch.equal(state.x[0], done) and state.finished and state.stage.tolist() == [6, 7]
    assert state.nonfinite() == {}


@pytest.mark.parametrize("k", range(len(PLANS)))
def test_a_row_moves_between_batches(k) -> None:
    x, plan = noisy(3, seed=k), PLANS[k]
    stays = pydiff.init([PLANS[0], plan, PLANS[2]], x, seed=[1, 2, 3], copies=2)
    expected = finish(stays.clone(), guided)
    advance(stays, 2, guided)
    busy = advance(pydiff.init([PLANS[4], PLANS[3], plan, PLANS[0]], noisy(4, seed=9), seed=4, copies=2), 1, guided)
    other_rows = finish(busy.clone(), guided)
    busy.copy_row_from(stays, 1, 0)
    result = finish(busy, guided)
    assert torch.equal(result[0], expected[1])
    assert torch.equal(result[1:], other_rows[1:])


def test_a_row_joins_where_another_has_finished() -> None:
    state = pydiff.init([PLANS[0], PLANS[0]], noisy(2), seed=[1, 2])
    finish(state)
    state.copy_row_from(pydiff.init(PLANS[0], noisy(1, 8), seed=[6]), 0, 1)
    assert not state.finished and state.stage.tolist() == [7, 0]
    kept = state.x[0].clone()
    finish(state)
    assert torch.equal(state.x[1:], pydiff.run_plan(PLANS[0], toy, noisy(1, 8), seed=[6]))
    assert torch.equal(state.x[0], kept) and state.stages_done == 14


def test_a_row_that_joins_is_not_blamed_for_the_one_before() -> None:
    state = pydiff.init(PLANS[0], noisy(2), seed=[1, 2])
    finish(state, lambda x, t: torch.full_like(x, torch.nan))
    state.copy_row_from(pydiff.init(PLANS[0], noisy(1, 8), seed=[6]), 0, 1)
    assert state.nonfinite() == {0: 0}
    finish(state)
    assert state.nonfinite() == {0: 0}


@pytest.mark.parametrize("order", [1, -1])
def test_rows_whose_input_is_scaled_share_a_batch_with_others(order) -> None:
    """x itself serves as the model's input only where no plan scales it."""
    plans, x = [PLANS[6], PLANS[0]][::order], noisy(2)
    together = finish(pydiff.init(plans, x, seed=[1, 2]))
    for k, plan in enumerate(plans):
        assert torch.equal(together[k : k + 1], finish(pydiff.init(plan, x[k : k + 1], seed=[k + 1])))


@pytest.mark.parametrize("scaled", [0, 2])
def test_one_stage_whose_input_is_scaled_is_enough(scaled) -> None:
    plan = pydiff.make_plan("ddim", steps=3)
    coefficients = plan.coefficients.copy()
    coefficients[scaled, table.INPUT_SCALE] = 0.5
    state = pydiff.init(replace(plan, coefficients=coefficients), noisy(1))
    for k in range(3):
        assert torch.equal(state.model_input, (0.5 if k == scaled else 1.0) * state.x)
        advance(state, 1)


def test_a_row_moves_out_of_a_batch_with_more_slots() -> None:
    """Of which it uses none: its own plan has fewer."""
    plan = pydiff.make_plan("ddim", steps=3)
    wide = advance(pydiff.init([plan, PLANS[5]], noisy(2), seed=[1, 2]), 1)
    narrow = pydiff.init(plan, noisy(2, 8), seed=[3, 4])
    assert wide.tensors.registers.shape[0] > narrow.tensors.registers.shape[0] == 1 + plan.num_slots
    expected = finish(wide.clone())[0]
    narrow.copy_row_from(wide, 0, 1)
    assert torch.equal(finish(narrow)[1], expected)


def test_a_row_moves_into_a_batch_with_more_slots() -> None:
    plan = PLANS[0]
    narrow = advance(pydiff.init(plan, noisy(1), seed=[1]), 3)
    wide = pydiff.init([plan, PLANS[5]], noisy(2, 8), seed=[3, 4])
    assert wide.tensors.registers.shape[0] > narrow.tensors.registers.shape[0] == 1 + plan.num_slots > 1
    expected = finish(narrow.clone())[0]
    wide.copy_row_from(narrow, 0, 0)
    assert torch.equal(finish(wide)[0], expected)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_seeds_are_all_integers_of_64_bits(seed) -> None:
    assert pydiff.init(PLANS[0], noisy(1), seed=seed).tensors.seeds.tolist() == [seed]
    outside = seed + (1 if seed > 0 else -1)
    for rows, seeds in ((1, outside), (2, [seed, outside])):
        with pytest.raises(ValueError, match=f"seed must fit 64 bits, got {outside}"):
            pydiff.init(PLANS[0], noisy(rows), seed=seeds)
    with pytest.raises(ValueError, match=f"64 bits, got {2**63}"):
        pydiff.init(PLANS[0], noisy(3), seed=2**63 - 2)  # whose third row has the seed after the last


def moving(**changes):
    """Arguments of copy_row_from between two states, and what is wrong with them."""
    base = {"plan": PLANS[0], "x": noisy(2), "seed": 1}
    here, there = ({**base, **changes.get(k, {})} for k in ("here", "there"))
    return lambda: pydiff.init(**here).copy_row_from(
        pydiff.init(**there), changes.get("source", 0), changes.get("row", 0)
    )


MOVES = {
    "other plan": (
        moving(there={"plan": PLANS[3]}),
        "this batch holds plans .*dpmpp_2m.* the row follows dpmpp_2m_sde",
    ),
    "other shape": (moving(there={"x": torch.zeros(2, 4)}), r"on samples \[3, 5\].* on \[4\]"),
    "no such source": (moving(source=2), r"source must be a row in 0 \.\. 1, got 2"),
    "no such row": (moving(row=-1), r"row must be a row in 0 \.\. 1, got -1"),
    "caller's noise": (
        moving(there={"plan": PLANS[3], "seed": None, "noise": torch.zeros(4, 2, *SHAPE)}, here={"plan": PLANS[3]}),
        "given noise=",
    ),
    "copies": (moving(there={"plan": PLANS[1], "copies": 2}, here={"plan": PLANS[1], "copies": 1}), "same copies"),
}


@pytest.mark.parametrize("case", MOVES)
def test_a_row_that_cannot_move_says_why(case) -> None:
    move, message = MOVES[case]
    with pytest.raises(ValueError, match=message):
        move()


def test_a_raising_model_can_be_called_again() -> None:
    for plan in PLANS[:6]:
        state, failures = pydiff.init(plan, noisy(2), seed=3, copies=2), 0
        while not state.finished:
            m = guided(state.model_input, state.model_time)
            if state.stages_done % 2 == 0 and failures <= state.stages_done:
                failures += 1
                with pytest.raises(ValueError, match="shape"):
                    pydiff.step(state, m[:1])
                continue
            pydiff.step(state, m)
        assert failures > 0
        assert torch.equal(state.x, finish(pydiff.init(plan, noisy(2), seed=3, copies=2), guided))


def test_a_stage_that_went_wrong_can_be_taken_back() -> None:
    for plan in PLANS[:6]:
        state = advance(pydiff.init(plan, noisy(2), seed=3, copies=2), 1, guided)
        before = state.clone()
        pydiff.step(state, torch.full_like(state.model_input, torch.nan))
        assert state.nonfinite().keys() == {0, 1} and before.nonfinite() == {}
        assert torch.equal(finish(before, guided), finish(pydiff.init(plan, noisy(2), seed=3, copies=2), guided))


def test_guidance_calls_for_two_copies() -> None:
    assert pydiff.init(PLANS[1], noisy(2)).model_input.shape == (4, *SHAPE)
    assert pydiff.init([PLANS[0], PLANS[1]], noisy(2)).model_time.shape == (4,)
    assert pydiff.init(PLANS[0], noisy(2)).model_input.shape == (2, *SHAPE)


def test_nonfinite_outputs_are_remembered_with_row_and_stage() -> None:
    state = advance(pydiff.init([PLANS[0], PLANS[2], PLANS[0]], noisy(3), seed=1), 2)
    m = toy(state.model_input, state.model_time)
    m[1, 0, 0] = torch.inf
    pydiff.step(state, m)
    advance(state, 1)
    assert state.nonfinite() == {1: 2}


def test_seeds() -> None:
    cpu = torch.device("cpu")
    assert row_seeds(7, 3, cpu).tolist() == [7, 8, 9] == row_seeds(torch.tensor([7, 8, 9]), 3, cpu).tolist()
    assert row_seeds([-5, 2**63 - 1], 2, cpu).tolist() == [-5, 2**63 - 1] and row_seeds(3, 0, cpu).shape == (0,)
    assert row_seeds(None, 2, cpu).tolist() != row_seeds(None, 2, cpu).tolist()
    assert max(seed_values(None, 1)[0] for _ in range(4)) > 2**32  # of 62 bits, so that none comes twice
    with pytest.raises(ValueError, match="one for each of the 2 rows, got 3"):
        seed_values(seed_values(5, 3), 2)  # checked seeds, of another batch
    torch.manual_seed(0)
    first = row_seeds(None, 2, cpu)
    torch.manual_seed(0)
    assert torch.equal(first, row_seeds(None, 2, cpu))


def test_a_gradient_does_not_follow() -> None:
    x = noisy(2).requires_grad_()
    state = pydiff.init(PLANS[0], x, seed=1)
    weight = torch.nn.Parameter(torch.ones(()))
    finish(state, lambda x, t: toy(x, t) * weight)
    assert not state.x.requires_grad and torch.equal(state.x, pydiff.run_plan(PLANS[0], toy, noisy(2), seed=1))
