"""The stage operation: every backend against a float64 oracle with a derived bound, and rows independent bit by bit."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pydiff.ops import native
from pydiff.ops import stage as stage_module
from pydiff.ops.stage import StageTensors, stage, stage_reference
from pydiff.plans import table
from tests.ops.stage_cases import LAYOUTS, OPTIONAL, Options, check, make_case, move

HAVE_NATIVE, _ = native.available("stage", torch.device("cpu"))
compiled_only = pytest.mark.skipif(not HAVE_NATIVE, reason="no compiled code")
ISAS = native.build_info().get("isas", [])
BACKENDS = ["reference", *ISAS]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "reference":
        yield stage_reference
        return
    chosen = native.build_info()["isa"]
    native.module.select_isa(request.param)
    yield stage
    native.module.select_isa(chosen)


def run(function, seed, options, **kwargs):
    t, m = make_case(seed, options, **kwargs)
    before, m_before = move(t, "cpu"), m.clone()
    function(t, m)
    assert torch.equal(m.nan_to_num(1e9), m_before.nan_to_num(1e9)), "the model output was written"
    check(before, m, t, reference_noise=function is stage_reference)
    return t


def bits(t: StageTensors, b: int) -> list[torch.Tensor]:
    """Everything a row owns, comparable bit for bit."""
    parts = [t.registers[:, b], t.cursor[b], t.nonfinite[b]]
    if t.model_input is not None:
        parts += [t.model_input[b :: t.rows], t.model_time[b :: t.rows]]
    return [p.nan_to_num(1e9) if p.is_floating_point() else p for p in parts]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_the_layout_is_the_one_in_csrc():
    if native.module is None:
        pytest.skip("no compiled code")
    for name, value in native.module.layout().items():
        assert getattr(table, name) == value, name


@pytest.mark.parametrize(
    "sample", [(), (1,), (2,), (3, 5, 7), (4, 8, 8), (1023,), (1025,), (3, 37, 41), (2, 3, 2, 3, 2)]
)
def test_shapes(backend, sample):
    for seed in range(3):
        run(backend, seed, Options(sample=sample, present=OPTIONAL[seed:], copies=1 + seed % 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model_dtype", stage_module.MODEL_DTYPES)
def test_dtypes(backend, dtype, model_dtype):
    for seed, input_dtype in enumerate(stage_module.MODEL_DTYPES):
        run(backend, seed, Options(dtype=dtype, model_dtype=model_dtype, input_dtype=input_dtype, copies=2, rows=5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("copies", [1, 2])
def test_strides(backend, layout, copies):
    for seed, model_dtype in enumerate((torch.float32, torch.bfloat16)):
        run(
            backend,
            seed,
            Options(
                sample=(5, 19, 23),
                layout=layout,
                copies=copies,
                present=OPTIONAL,
                slots=4,
                model_dtype=model_dtype,
                input_dtype=model_dtype,
            ),
        )


def test_expanded_operands(backend):
    for seed in range(4):
        run(backend, seed, Options(sample=(4, 9, 31), expanded=True, present=("mask", "known", "constant", "extra")))


@pytest.mark.parametrize(
    "options", [Options(rows=0), Options(sample=(0,)), Options(sample=(3, 0, 2), present=OPTIONAL)]
)
def test_nothing_to_do(backend, options):
    run(backend, 0, options)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    slots=st.integers(0, 5),
    copies=st.sampled_from([1, 2]),
    present=st.sets(st.sampled_from(OPTIONAL)).map(tuple),
    layout=st.sampled_from(LAYOUTS),
    sample=st.lists(st.integers(1, 9), max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    model_dtype=st.sampled_from(stage_module.MODEL_DTYPES),
    input_dtype=st.sampled_from([None, *stage_module.MODEL_DTYPES]),
)
def test_random_programs(backend, **options):
    seed = options.pop("seed")
    run(backend, seed, Options(**options))


OUTSIDE = (-(2**31), -7, -2, 2, 3, 4, 5, 100, 2**31 - 1)  # with two slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slots_that_are_not_there_are_neither_written_nor_read(backend, dtype):
    """Rows beside each other in one table, one of whose slots, both or none exist, and weights on absent ones."""
    pairs = [(a, b) for a in (-1, 0, 1, *OUTSIDE) for b in (-1, 0, 1, *OUTSIDE)]
    t, m = make_case(5, Options(rows=len(pairs), dtype=dtype, copies=2, sample=(3, 7)), poison=False)
    stages = len(pairs)
    t.indices = t.indices[:1].expand(stages, -1).clone()
    t.indices[:, : table.DRAW0] = torch.tensor(pairs, dtype=torch.int32)
    t.coefficients = t.coefficients[torch.arange(stages) % len(t.coefficients)].clone()
    weights = t.coefficients[:, : 3 * table.NUM_OPERANDS].view(stages, 3, table.NUM_OPERANDS)
    weights[:, :, table.SLOT + 2 : table.D] = 0.5
    weights[:, :, table.SLOT : table.SLOT + 2], weights[:, :, table.D] = 0.75, -0.25
    t.cursor, t.stop = torch.arange(stages, dtype=torch.int32), torch.full((stages,), stages, dtype=torch.int32)
    memory = torch.full((12, *t.registers.shape[1:]), 3.0, dtype=dtype)  # more of it on both sides of the registers
    memory[4:7] = t.registers
    t.registers = memory[4:7]
    before = move(t, "cpu")
    backend(t, m)
    check(before, m, t, reference_noise=backend is stage_reference)
    assert (memory[:4] == 3).all() and (memory[7:] == 3).all()


def test_several_stages_in_a_row(backend):
    """Programs whose slots feed later stages; the bound object is used again and again."""
    t, _ = make_case(3, Options(slots=5, copies=2, present=("constant",), rows=6), poison=False)
    t.cursor.zero_()
    t.stop.copy_(torch.tensor([7, 0, 3, 1, 6, 7]))
    for step in range(8):
        m = torch.randn(12, 3, 5, 7, generator=torch.Generator().manual_seed(step))
        before = move(t, "cpu")
        backend(t, m)
        check(before, m, t, reference_noise=backend is stage_reference)
    assert t.cursor.tolist() == [7, 0, 3, 1, 6, 7]


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_instruction_sets_and_thread_counts_give_the_same_bits(dtype):
    chosen, results = native.build_info()["isa"], []
    case, m = make_case(
        11,
        Options(
            sample=(3, 97, 101),
            rows=3,
            slots=3,
            copies=2,
            dtype=dtype,
            present=("mask", "known", "extra"),
            layout="channels_last",
        ),
        poison=False,
    )
    case.stop.fill_(7)
    try:
        for isa in ISAS:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                native.module.select_isa(isa)
                results.append(move(case, "cpu"))
                stage(results[-1], m)
    finally:
        native.module.select_isa(chosen)
    for t in results[1:]:
        assert all(same_bits(bits(t, b), bits(results[0], b)) for b in range(3))


def take(t: StageTensors, m: torch.Tensor, rows: list[int]) -> tuple[StageTensors, torch.Tensor]:
    """The batch of some rows of `t`, in this order."""
    both = rows + [t.rows + b for b in rows] if t.copies == 2 else rows
    some = StageTensors(
        registers=t.registers[:, rows],
        cursor=t.cursor[rows],
        stop=t.stop[rows],
        seeds=t.seeds[rows],
        coefficients=t.coefficients,
        indices=t.indices,
        copies=t.copies,
        model_input=t.model_input[both],
        model_time=t.model_time[both],
        mask=t.mask[rows],
        known=t.known[rows],
        extra=t.extra[rows],
        nonfinite=t.nonfinite[rows],
    )
    return some, m[both]


def compositions(function, count, corrupt=None):
    """Whether rows alone and rows in `count` random batches end with the same bits."""
    options = Options(sample=(3, 7), rows=12, slots=2, copies=2, present=("mask", "known", "extra"))
    t, m = make_case(21, options)
    alone = []
    for b in range(t.rows):
        one, its_m = take(t, m, [b])
        function(one, its_m)
        alone.append(bits(one, 0))
    rng, same = random.Random(0), True
    for _ in range(count):
        rows = rng.sample(range(t.rows), rng.randint(1, t.rows))
        some, its_m = take(t, m, rows)
        function(some, its_m)
        if corrupt:
            corrupt(some)
        same = same and all(same_bits(bits(some, k), alone[b]) for k, b in enumerate(rows))
    return same


@compiled_only
def test_rows_are_independent_of_ten_thousand_random_batches():
    assert compositions(stage, 10_000)


def test_rows_are_independent_in_the_reference():
    assert compositions(stage_reference, 100)


def test_a_leaked_row_would_be_seen():
    def leak(t):
        if t.rows > 3:
            t.registers[0, 0].nan_to_num_(0)[0] += 1e-7 * t.registers[0, 1].nan_to_num(1).abs().max() + 1e-6

    assert not compositions(stage_reference, 50, corrupt=leak)


def test_nan_in_an_absent_operand_changes_nothing(backend):
    results = []
    for poison in (False, True):
        t, m = make_case(5, Options(slots=5, copies=2, present=OPTIONAL, rows=6), poison=poison)
        backend(t, m)
        results.append(t)
    active = [b for b in range(6) if results[0].cursor[b] > 0]
    for b in active:
        assert results[0].registers[0, b].isfinite().all()
        assert torch.equal(results[0].registers[0, b], results[1].registers[0, b])
    assert (results[1].nonfinite == -1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_model_output_is_flagged_once(backend, bad):
    t, m = make_case(8, Options(rows=3, sample=(5, 300)), poison=False)
    c = t.coefficients
    c[:, : 3 * table.NUM_OPERANDS] = 0
    c[:, table.X], c[:, table.D], c[:, table.OUTPUT + 1] = 1, 0.5, 1
    c[:, table.CLIP], c[:, table.CLIP + 1] = -torch.inf, torch.inf
    t.cursor.fill_(2)
    t.stop.fill_(7)
    m[1, 4, 299] = bad
    backend(t, m)
    assert t.nonfinite.tolist() == [-1, 2, -1]
    assert t.registers[0].isfinite().flatten(1).all(1).tolist() == [True, False, True]
    m.fill_(bad)
    backend(t, m)
    assert t.nonfinite.tolist() == [3, 2, 3]


def test_clip_lets_nan_pass_and_bounds_everything_else(backend):
    t, m = make_case(8, Options(rows=1, sample=(4,)), poison=False)
    c = t.coefficients
    c[:, : 3 * table.NUM_OPERANDS] = 0
    c[:, table.D], c[:, table.OUTPUT], c[:, table.OUTPUT + 1], c[:, table.CLIP], c[:, table.CLIP + 1] = 1, 0, 1, -1, 2
    t.cursor.zero_()
    t.stop.fill_(7)
    m[0] = torch.tensor([float("nan"), 5.0, -float("inf"), 0.5])
    backend(t, m)
    assert t.registers[0, 0].isnan().tolist() == [True, False, False, False]
    assert t.registers[0, 0, 1:].tolist() == [2.0, -1.0, 0.5]


@compiled_only
def test_half_precision_conversions_are_exactly_torchs():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    c = torch.zeros(3, table.COEFFICIENT_COLUMNS)
    c[:, table.M], c[:, table.INPUT_SCALE] = 1, 1
    for dtype in (torch.float16, torch.bfloat16):
        halves = every.view(dtype)
        # All halves, every midpoint between two of them, and the floats just beside it.
        middle = (halves.double() + halves.double().nextafter(torch.tensor(9e99)) * 0).float()
        step = (halves.view(torch.int16) + 1).view(dtype).float()
        middle = (middle + step) / 2
        beside = [middle.nextafter(torch.tensor(side)) for side in (-torch.inf, torch.inf)]
        for isa in ISAS:
            native.module.select_isa(isa)
            for m in (halves, middle, *beside):
                t = StageTensors(
                    torch.zeros(1, 1, 2**16),
                    torch.tensor([0], dtype=torch.int32),
                    torch.tensor([3], dtype=torch.int32),
                    torch.tensor([0]),
                    c,
                    torch.full((3, 4), -1, dtype=torch.int32),
                    model_input=torch.zeros(1, 2**16, dtype=dtype),
                    model_time=torch.zeros(1),
                )
                stage(t, m[None])
                torch.testing.assert_close(t.registers[0, 0], m.float(), rtol=0, atol=0, equal_nan=True)
                torch.testing.assert_close(t.model_input[0], m.float().to(dtype), rtol=0, atol=0, equal_nan=True)
        native.module.select_isa(ISAS[0])


@pytest.mark.parametrize(
    "column", [table.X, table.D, table.OUTPUT + 1, table.GUIDANCE, table.CLIP + 1, table.INPUT_SCALE]
)
def test_a_wrong_coefficient_would_be_seen(column):
    """The control: one part in 100,000 on one coefficient breaks the bound."""
    t, m = make_case(2, Options(copies=2), poison=False)
    t.cursor.zero_()
    t.stop.fill_(7)
    c = t.coefficients
    c[:, table.X], c[:, table.D], c[:, table.OUTPUT + 1], c[:, table.GUIDANCE] = 0.7, 0.8, 1.3, 3.0
    c[:, table.CLIP], c[:, table.CLIP + 1] = -0.7, 1.1
    before = move(t, "cpu")
    c[:, column] *= 1 + 1e-5
    stage(t, m)
    with pytest.raises(AssertionError):
        check(before, m, t)


def test_a_model_that_returns_its_own_input_or_a_register(backend):
    for alias in ("input", "register", "flipped input"):
        t, m = make_case(4, Options(rows=2, sample=(6, 300), slots=1), poison=False)
        t.cursor.zero_()
        t.stop.fill_(7)
        t.model_input.copy_(m)
        t.model_input = t.model_input.contiguous()
        flipped = t.model_input.view(2, 300, 6).mT
        m = {"input": t.model_input, "register": t.registers[0], "flipped input": flipped}[alias]
        if alias != "input" and backend is stage_reference:
            continue
        before, m_before = move(t, "cpu"), m.clone()
        backend(t, m)
        check(before, m_before, t, reference_noise=backend is stage_reference)


def test_the_reference_runs_where_compiled_code_is_turned_off(monkeypatch):
    monkeypatch.setattr(native, "disabled", frozenset({"stage"}))
    monkeypatch.setattr(native, "warned", set())
    with pytest.warns(UserWarning, match="PYDIFF_DISABLE names stage"):
        run(stage, 1, Options())


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda t, m: (t, m[:-1]), ValueError, r"the model returned shape \[3, 3, 5, 7\], expected \[4, 3, 5, 7\]"),
        (lambda t, m: (t, (m,)), TypeError, "the model returned tuple, expected a tensor"),
        (lambda t, m: (t, m.int()), TypeError, "the model returned torch.int32"),
        (lambda t, m: (t, m.to("meta")), ValueError, "the model returned a tensor on meta"),
        (lambda t, m: (replace(t, seeds=t.seeds[:2]), m), ValueError, r"seeds must have shape \[4\], got \[2\]"),
        (lambda t, m: (replace(t, cursor=t.cursor.long()), m), TypeError, "cursor must be torch.int32"),
        (
            lambda t, m: (replace(t, coefficients=t.coefficients.double()), m),
            TypeError,
            "coefficients must be torch.float32",
        ),
        (lambda t, m: (replace(t, registers=t.registers.half()), m), TypeError, "registers must be float32 or float64"),
        (
            lambda t, m: (replace(t, registers=t.registers.transpose(-1, -2).contiguous().transpose(-1, -2)), m),
            ValueError,
            "registers must be contiguous",
        ),
        (lambda t, m: (replace(t, mask=t.registers[0, :, :1]), m), ValueError, "mask must have shape"),
        (lambda t, m: (replace(t, copies=3), m), ValueError, "the model returned shape|copies must be 1 or 2"),
    ],
)
def test_bad_input_is_named_and_nothing_changes(change, error, message):
    t, m = make_case(1, Options(), poison=False)
    held = [t.registers.clone(), t.cursor.clone()]
    bad, m = change(t, m)
    with pytest.raises(error, match=message):
        stage(bad, m)
    assert torch.equal(held[0], t.registers) and torch.equal(held[1], t.cursor)


@compiled_only
@pytest.mark.parametrize(
    "break_it",
    [
        lambda t: t.stop.fill_(8),
        lambda t: t.cursor.fill_(-1),
        lambda t: t.indices[:, table.DRAW0].fill_(3),
        lambda t: t.indices[:, table.DRAW1].fill_(-1),
    ],
)
def test_tables_that_point_outside_are_refused(break_it):
    t, m = make_case(1, Options(present=("noise",)), poison=False)
    t.cursor.zero_()
    t.stop.fill_(7)
    t.coefficients[:, table.Z0], t.coefficients[:, table.Z1] = 0.5, 0.5
    break_it(t)
    held = t.registers.clone()
    with pytest.raises(IndexError):
        stage(t, m)
    assert torch.equal(held, t.registers)
