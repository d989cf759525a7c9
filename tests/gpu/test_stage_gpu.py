"""The CPU test matrix on a CUDA device, and what only a device has: streams, graph capture, bandwidth."""

from __future__ import annotations

import pytest
import torch

from pydiff.ops import native, noise
from pydiff.ops import stage as stage_module
from pydiff.ops.stage import StageTensors, stage, stage_reference
from pydiff.plans import table
from tests.ops.stage_cases import LAYOUTS, OPTIONAL, Options, check, keep_strides, make_case, move

pytestmark = pytest.mark.gpu
CUDA = "cuda:0"


@pytest.fixture(autouse=True)
def compiled():
    assert native.available("stage", torch.device(CUDA)) == (True, "")


def run(seed: int, options: Options) -> None:
    t, m = make_case(seed, options)
    before, on_device = move(t, "cpu"), move(t, CUDA)
    stage(on_device, keep_strides(m, CUDA))
    # The bound leaves no room for other noise: with compiled code on both sides it has the same bits.
    check(before, m, move(on_device, "cpu"))


@pytest.mark.parametrize(
    "sample", [(), (1,), (2,), (3, 5, 7), (4, 8, 8), (1023,), (1025,), (3, 37, 41), (2, 3, 2, 3, 2), (70_001,)]
)
def test_shapes(sample):
    for seed in range(6):
        run(seed, Options(sample=sample, present=OPTIONAL[seed:], copies=1 + seed % 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model_dtype", stage_module.MODEL_DTYPES)
@pytest.mark.parametrize("sample", [(3, 5, 7), (4, 8, 8)])
def test_dtypes(dtype, model_dtype, sample):
    for seed, input_dtype in enumerate((None, *stage_module.MODEL_DTYPES)):
        run(seed, Options(sample=sample, dtype=dtype, model_dtype=model_dtype, input_dtype=input_dtype, copies=2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("copies", [1, 2])
def test_strides(layout, copies):
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        run(
            seed,
            Options(
                sample=(5, 19, 23),
                layout=layout,
                copies=copies,
                present=OPTIONAL,
                model_dtype=dtype,
                input_dtype=dtype,
                slots=4,
            ),
        )


def test_random_programs():
    for seed in range(300):
        run(
            seed,
            Options(
                rows=1 + seed % 5,
                slots=seed % 6,
                copies=1 + seed % 2,
                present=OPTIONAL[: seed % 6],
                layout=LAYOUTS[seed % len(LAYOUTS)],
                sample=(1 + seed % 7, 1 + seed % 11),
            ),
        )


@pytest.mark.parametrize("options", [Options(rows=0), Options(sample=(0,)), Options(rows=1000, sample=(3,))])
def test_edges(options):
    run(0, options)


@pytest.mark.parametrize("shape", [(), (3,), (4,), (5, 7), (2, 3, 1021), (1031, 5)])
def test_noise_has_the_bits_of_the_cpu(shape):
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
    on_device = noise.normal(seeds.to(CUDA), noise.INITIAL_DRAW, shape).cpu()
    if native.available("noise", torch.device("cpu"))[0]:
        assert torch.equal(on_device, noise.normal(seeds, noise.INITIAL_DRAW, shape))
    expected = noise.normal_reference(seeds, torch.full_like(seeds, noise.INITIAL_DRAW), shape)
    torch.testing.assert_close(on_device, expected, rtol=4 * 2.0**-23, atol=0)


def plain_case(rows: int = 4, sample: tuple[int, ...] = (4, 32, 32), stages: int = 40, slots: int = 1):
    """x, d -> x, slot: the shape of a second-order multistep stage."""
    c = torch.zeros(stages, table.COEFFICIENT_COLUMNS, device=CUDA)
    c[:, table.X], c[:, table.SLOT], c[:, table.D], c[:, table.NUM_OPERANDS + table.D] = 0.9, -0.2, 0.3, 1
    c[:, table.OUTPUT], c[:, table.OUTPUT + 1], c[:, table.INPUT_SCALE] = 1.1, -0.4, 1
    c[:, table.CLIP], c[:, table.CLIP + 1], c[:, table.Z0] = -torch.inf, torch.inf, 0
    index = torch.full((stages, table.INDEX_COLUMNS), -1, dtype=torch.int32, device=CUDA)
    index[:, table.WRITE_A] = 0
    return StageTensors(
        torch.randn(1 + slots, rows, *sample, device=CUDA),
        torch.zeros(rows, dtype=torch.int32, device=CUDA),
        torch.full((rows,), stages, dtype=torch.int32, device=CUDA),
        torch.arange(rows, device=CUDA),
        c,
        index,
        nonfinite=torch.full((rows,), -1, dtype=torch.int32, device=CUDA),
    )


def test_rows_are_bit_identical_in_any_batch():
    t = plain_case(rows=64)
    t.coefficients[:, table.Z0] = 0.5
    t.indices[:, table.DRAW0] = torch.arange(40, dtype=torch.int32, device=CUDA)
    t.cursor = torch.arange(64, dtype=torch.int32, device=CUDA) % 40
    m = torch.randn(64, 4, 32, 32, device=CUDA)
    order = torch.randperm(64)[:23]
    some = StageTensors(
        t.registers[:, order].contiguous(), t.cursor[order], t.stop[order], t.seeds[order], t.coefficients, t.indices
    )
    stage(some, m[order])
    stage(t, m)
    assert torch.equal(some.registers, t.registers[:, order]) and torch.equal(some.cursor, t.cursor[order])


def test_it_runs_on_the_current_stream():
    t, m = plain_case(), torch.randn(4, 4, 32, 32, device=CUDA)
    side, late = torch.cuda.Stream(), torch.zeros_like(m)
    stage(t, late)  # bind and load
    expected = move(t, CUDA)
    stage_reference(expected, m)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(m)  # the stage must come after this, which only its stream knows
        stage(t, late)
    side.synchronize()
    torch.testing.assert_close(t.registers, expected.registers, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_it_runs_on_the_tensors_device():
    t, m = make_case(1, Options(), poison=False)
    before, there = move(t, "cpu"), move(t, "cuda:1")
    with torch.cuda.device(0):
        stage(there, m.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    check(before, m, move(there, "cpu"))


def test_a_captured_stage_advances_its_own_counter():
    t, m = plain_case(), torch.randn(4, 4, 32, 32, device=CUDA)
    t.coefficients[:, table.X] = torch.linspace(0.5, 1, 40, device=CUDA)
    t.stop.copy_(torch.tensor([40, 5, 0, 17]))
    eager = move(t, CUDA)
    stage(t, m)
    stage(eager, m)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stage(t, m)
    for _ in range(30):
        graph.replay()
        stage(eager, m)
    assert torch.equal(t.registers, eager.registers)
    assert t.cursor.tolist() == eager.cursor.tolist() == [31, 5, 0, 17]


def test_a_stage_never_waits_for_the_device():
    t, m = plain_case(), torch.randn(4, 4, 32, 32, device=CUDA)
    stage(t, m)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stage(t, m)
        noise.normal(t.seeds, 0, (7,))
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def device_time(function, inputs, repeats: int = 20) -> float:
    """Median seconds of a call, its input another one every time."""
    times = []
    for k in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function(inputs[k % len(inputs)])
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return sorted(times[3:])[repeats // 2]


def test_bandwidth_is_nine_tenths_of_a_copy_at_one_gibibyte():
    rows, sample = 64, (4, 512, 410)  # 215 MB a tensor, five of them moved: 1 GiB
    cases = [(plain_case(rows, sample, stages=2**15), torch.randn(rows, *sample, device=CUDA)) for _ in range(3)]
    moved = 5 * cases[0][1].numel() * 4
    seconds = device_time(lambda case: stage(*case), cases)
    source = [torch.randn(moved // 8, device=CUDA) for _ in range(3)]
    target = torch.empty_like(source[0])
    copy = device_time(target.copy_, source)
    assert seconds <= copy / 0.9, f"{moved / seconds / 1e9:.0f} GB/s, a copy {moved / copy / 1e9:.0f} GB/s"
