"""What a device does during a run, as torch.profiler saw it: how long it had nothing to do, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STAGE_KERNEL = "stage_kernel"  # pydiff's own, the last of a stage


class Event(NamedTuple):
    """A kernel, copy or fill, in microseconds."""

    name: str
    start: float
    end: float


def gaps(intervals: Sequence[tuple[float, float]]) -> list[float]:
    """How long nothing runs after each interval but the last, in the order of their starts: a gap is between the end
    of all that has begun and the next start, so what overlaps leaves none."""
    ordered, found = sorted(intervals), []
    busy_until = float("-inf")
    for (_, end), (start, _) in zip(ordered, ordered[1:]):
        busy_until = max(busy_until, end)
        found.append(max(0.0, start - busy_until))
    return found


def idle_time(events: Sequence[Event]) -> dict[str, Any]:
    """The span of the events, their gaps, and those of them that follow a stage's last kernel (None without such)."""
    ordered = sorted(events, key=lambda event: event[1:])
    found = gaps([event[1:] for event in ordered])
    after = [gap for event, gap in zip(ordered, found) if STAGE_KERNEL in event.name]
    span = max(event.end for event in ordered) - ordered[0].start
    return {
        "events": len(ordered),
        "span_us": span,
        "gaps_us": sum(found),
        "gap_share": sum(found) / span,
        "stage_gaps_us": sum(after) if after else None,
        "stage_gap_share": sum(after) / span if after else None,
    }


def profiled_idle_time(run: Callable[[], Any]) -> dict[str, Any]:
    """`idle_time` of one run on CUDA. The profiler makes launches from Python slower, so it widens the gaps of loops
    that are not in a graph."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [
        Event(e.name, e.time_range.start, e.time_range.end)
        for e in profiler.events()
        if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
    ]
    if not events:
        raise RuntimeError("the profiler saw no kernel")
    return idle_time(events)
