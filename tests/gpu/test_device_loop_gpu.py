"""The loop that the GPU drives, on a GPU: a captured stage runs as often as it should, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pydiff.graph.device_loop import DeviceLoop, can_use_device_loop
from pydiff.ops import native, noise
from pydiff.ops.stage import StageTensors, stage
from pydiff.plans import table

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def possible():
    ok, reason = can_use_device_loop(DEVICE)
    if not ok:
        pytest.skip(reason)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def capture(function, keep_graph: bool = True) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph(keep_graph=keep_graph)
    with torch.cuda.graph(graph):
        function()
    return graph


class Counting:
    """A stage that counts how often it ran, and moves the rows on."""

    def __init__(self, *stop: int) -> None:
        self.cursor, self.stop, self.ran, self.remaining = ints(*[0] * len(stop)), ints(*stop), ints(0), ints(1000)
        self.stage()  # warm-up: loads the kernels
        torch.cuda.synchronize()
        self.graph = capture(self.stage)
        self.reset()
        self.loop = DeviceLoop(self.graph, self.cursor, self.stop, self.remaining)

    def stage(self) -> None:
        self.ran.add_(1)
        self.cursor.add_(self.cursor < self.stop)

    def reset(self) -> None:
        self.cursor.zero_()
        self.ran.zero_()

    def launch(self, remaining: int) -> tuple[int, int]:
        """Stages that have run since the last reset, and what is left of `remaining`."""
        self.remaining.fill_(remaining)
        self.loop.replay()
        return self.ran.item(), self.remaining.item()


def test_it_runs_until_every_row_has_ended() -> None:
    c = Counting(3, 7, 5)
    assert c.launch(1000) == (7, 993) and c.cursor.tolist() == [3, 7, 5]


def test_it_stops_where_it_is_cut_and_goes_on() -> None:
    c = Counting(3, 7, 5)
    assert c.launch(4) == (4, 0) and c.cursor.tolist() == [3, 4, 4]
    assert c.launch(1000) == (7, 997)


def test_a_launch_with_nothing_to_do_runs_nothing() -> None:
    c = Counting(3, 7, 5)
    assert c.launch(0) == (0, 0) and c.launch(-1) == (0, -1)
    c.cursor.copy_(c.stop)
    assert c.launch(1000) == (0, 1000)
    assert Counting().launch(5) == (0, 5)


def test_many_rows_are_all_looked_at() -> None:
    c = Counting(*[0] * 4999, 6)
    assert c.launch(1000) == (6, 994)


def test_many_launches() -> None:
    c = Counting(3, 7, 5)
    c.launch(1000)
    before = torch.cuda.mem_get_info()[0]
    for _ in range(2000):
        c.cursor.zero_()
        c.remaining.fill_(1000)
        c.loop.replay()
    assert c.ran.item() == 7 * 2001
    assert before - torch.cuda.mem_get_info()[0] < 2**21


def test_it_runs_on_the_current_stream() -> None:
    c = Counting(5)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        c.stop.fill_(9)  # only this stream knows that the loop comes after it
        assert c.launch(1000) == (9, 991)


def test_release_lets_a_launch_end() -> None:
    c = Counting(200)
    torch.cuda._sleep(20_000_000)
    c.loop.replay()
    c.loop.release()
    c.loop.release()
    assert c.ran.item() == 200
    with pytest.raises(RuntimeError, match="released"):
        c.loop.replay()


class Model(nn.Module):
    """Kernels of cuDNN, cuBLAS and torch."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(torch.tanh(self.convolution(x.to(torch.bfloat16))))
        return nn.functional.scaled_dot_product_attention(x, x, x)


def sampler_state() -> StageTensors:
    stages, rows = 12, 3
    c = torch.zeros(stages, table.COEFFICIENT_COLUMNS, device=DEVICE)
    c[:, table.X], c[:, table.D], c[:, table.Z0], c[:, table.OUTPUT + 1] = 0.9, 0.3, 0.1, 1
    c[:, table.CLIP], c[:, table.CLIP + 1], c[:, table.INPUT_SCALE] = -torch.inf, torch.inf, 1
    index = torch.full((stages, table.INDEX_COLUMNS), -1, dtype=torch.int32, device=DEVICE)
    index[:, table.DRAW0] = torch.arange(stages)
    x = noise.normal(torch.arange(rows, device=DEVICE), noise.INITIAL_DRAW, (8, 32, 32))
    return StageTensors(
        x[None].clone(),
        ints(0, 2, 4),
        ints(stages, stages, 9),
        torch.arange(rows, device=DEVICE),
        c,
        index,
        nonfinite=ints(-1, -1, -1),
    )


@torch.no_grad()
def test_a_model_and_the_stage_operation_give_the_bits_of_the_eager_loop() -> None:
    torch.manual_seed(0)
    model = Model().to(DEVICE, torch.bfloat16)
    eager, looped = sampler_state(), sampler_state()
    for _ in range(12):
        stage(eager, model(eager.registers[0]))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        stage(looped, model(looped.registers[0]))  # warm-up, and one stage of the run
    torch.cuda.synchronize()
    graph = capture(lambda: stage(looped, model(looped.registers[0])))
    remaining = ints(100)
    loop = DeviceLoop(graph, looped.cursor, looped.stop, remaining)
    loop.replay()
    assert torch.equal(looped.registers, eager.registers) and torch.equal(looped.cursor, eager.cursor)
    assert remaining.item() == 100 - 11


def test_a_stage_that_cannot_loop_is_refused_and_can_still_be_replayed() -> None:
    counter, event = ints(0), torch.cuda.Event(external=True)

    def recording() -> None:
        counter.add_(1)
        event.record()

    graph = capture(recording)
    with pytest.raises(native.Unsupported, match="event record"):
        DeviceLoop(graph, ints(0), ints(5), ints(5))
    graph.replay()
    assert counter.item() == 1
    noise.normal(torch.arange(2, device=DEVICE), 0, (8,))  # the refusal left no error for the next launch to find


def test_a_graph_that_was_not_kept_is_refused() -> None:
    counter = ints(0)
    not_captured = torch.cuda.CUDAGraph(keep_graph=True)
    for graph in (capture(lambda: counter.add_(1), keep_graph=False), not_captured):
        with pytest.raises(ValueError, match="keep_graph=True"):
            DeviceLoop(graph, ints(0), ints(5), ints(5))
    with pytest.raises(TypeError, match="CUDAGraph"):
        DeviceLoop(None, ints(0), ints(5), ints(5))
