"""Time on the device alone: loops captured in CUDA graphs, whose replays are timed with events."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Entries, Entry, NotMeasured, Outcome, Timing, failure

# A copy of this many bytes goes ahead of each replay: the host enqueues the graph meanwhile, so that its
# latency is not measured, and the cache forgets what the entry before left in it.
FILLER_BYTES = 1 << 28


def measure_device(entries: Entries, rounds: int) -> dict[str, Outcome]:
    """Seconds an operation takes the device, for each entry, with the entries replayed in turn.

    What synchronises with the host cannot be captured and is not measured here; `harness.measure` times it, its
    waits included.
    """
    outcomes: dict[str, Outcome] = {name: e for name, e in entries.items() if isinstance(e, NotMeasured)}
    graphs: dict[str, tuple[Entry, torch.cuda.CUDAGraph, Any]] = {}
    for name, entry in entries.items():
        if isinstance(entry, NotMeasured):
            continue
        try:
            graphs[name] = (entry, *_capture(entry))
        except Exception as error:
            outcomes[name] = failure(error)
    filler = torch.empty((2, FILLER_BYTES), dtype=torch.uint8, device="cuda").zero_()
    found: dict[str, list[float]] = {name: [] for name in graphs}
    names = list(graphs)
    for k in range(rounds + 1):  # the first round warms up
        first = k % max(len(names), 1)
        for name in names[first:] + names[:first]:
            seconds = _replay(*graphs[name][:2], filler)
            if k:
                found[name].append(seconds)
    for name, times in found.items():
        outcomes[name] = Timing(times, min(times), len(times))
    return {name: outcomes[name] for name in entries}


def _capture(entry: Entry) -> tuple[torch.cuda.CUDAGraph, Any]:
    before = entry.before or (lambda: None)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        before()
        entry.run()
        before()
        torch.cuda.synchronize()
        # Asked first: a synchronisation during the capture would leave torch's allocator in a poor state.
        torch.cuda.set_sync_debug_mode("error")
        try:
            entry.run()
        except RuntimeError as error:
            raise RuntimeError(f"cannot be captured in a CUDA graph: {error}") from None
        finally:
            torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    for generator in entry.generators:
        graph.register_generator_state(generator)
    before()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = entry.run()
    return graph, result  # the graph writes to the memory of its result


def _replay(entry: Entry, graph: torch.cuda.CUDAGraph, filler: torch.Tensor) -> float:
    if entry.before:
        entry.before()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    filler[0].copy_(filler[1])
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / entry.per
