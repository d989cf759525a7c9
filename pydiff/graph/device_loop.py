"""The loop that the GPU drives: one launch runs a captured stage until every row has ended.

A CUDA graph of one stage is put into the body of a conditional WHILE node (CUDA 12.4), and a kernel of one thread block
decides behind every stage, in device memory, whether another one follows. The host launches once, however many stages
there are, and rows that end early end the loop.

What such a body may hold is less than what a graph may: kernels, copies, fills (and graphs of these), all on one
device. Host functions, events, allocations and conditional nodes are refused when the loop is made, and so are kernels
that launch others, and cooperative kernels where the driver is older than 12.6. The stage graph itself can then still
be replayed stage by stage.
"""

from __future__ import annotations

from typing import Any

import torch

from pydiff.ops import native

OLDEST_CUDA = 12040  # as CUDA counts: 12.4, the first with WHILE nodes


def can_use_device_loop(device: torch.device) -> tuple[bool, str]:
    """Whether a loop can run on `device` without the host, and if not, why."""
    if device.type != "cuda":
        return False, f"a device-driven loop is a CUDA graph, and there is none on {device.type} devices"
    if not torch.cuda.is_available():
        return False, "torch finds no CUDA device"
    compiled, reason = native.available("device_loop", device)
    if not compiled:
        return False, reason
    built, driver = native.module.cuda_versions()
    if built < OLDEST_CUDA:
        return False, f"pydiff was built with CUDA {_version(built)}: build it with 12.4 or later"
    if driver < OLDEST_CUDA:
        return False, f"the driver supports CUDA {_version(driver)}: install one for 12.4 or later"
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        return False, f"torch {torch.__version__} cannot hand out its graphs: install 2.8 or later"
    return True, ""


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


class DeviceLoop:
    """A captured stage as the body of a loop on the GPU: a launch runs stages while ``cursor < stop`` in any row.

    The stage itself advances `cursor`, and leaves rows alone whose `cursor` is at `stop`. A launch with nothing to do
    runs no stage. All three tensors may be written between launches, on the stream of the launches; the graph keeps
    their addresses. One launch at a time: those of one loop run one after the other, also on several streams, and two
    threads must not launch it at once.

    Numbers drawn from torch's own generators inside the stage are the same at every stage, since it is
    `CUDAGraph.replay` that moves their state on. pydiff's noise is not concerned: it is counted by the plan.

    Args:
        stage_graph: `torch.cuda.CUDAGraph(keep_graph=True)` after the capture of one stage. Its nodes are copied; the
            memory pool that they work in stays its own, so it is kept.
        cursor: [rows] int32, the stage each row is at.
        stop: [rows] int32, where each row ends.
        remaining: [1] int32, how many stages launches may still run. Set it before a launch to cut the run there (or
            to more than there are); every stage takes one off.

    Raises:
        TypeError: `stage_graph` is no CUDA graph, or a tensor is not int32.
        ValueError: wrong shapes, several devices, memory that is not contiguous, a graph that was not kept.
        pydiff.ops.native.Unsupported: no such loop can run here, or not with this stage; the message says why.
    """

    def __init__(self, stage_graph: Any, cursor: torch.Tensor, stop: torch.Tensor, remaining: torch.Tensor) -> None:
        _check(cursor, stop, remaining)
        device = cursor.device
        possible, reason = can_use_device_loop(device)
        if not possible:
            raise native.Unsupported(reason)
        self._index = device.index
        self._kept: Any = (stage_graph, cursor, stop, remaining)
        stream = native.current_stream(device.index)
        addresses = cursor.data_ptr(), stop.data_ptr(), cursor.numel(), remaining.data_ptr()
        raw = _raw_graph(stage_graph)
        try:
            self._graph: Any = native.module.WhileGraph(raw, *addresses, device.index, stream)
        except RuntimeError as error:
            raise native.Unsupported(f"the stage cannot be the body of a loop on the GPU: {error}") from None

    def replay(self) -> None:
        """Enqueue the loop on the device's current stream. Waits for nothing."""
        if self._graph is None:
            raise RuntimeError("the loop was released: make a new one")
        self._graph.launch(native.current_stream(self._index))

    def release(self) -> None:
        """Free the graph, and let go of the stage graph and the tensors. Again is allowed.

        A launch under way runs to its end, and CUDA frees the graph behind it. The memory it works in has no such
        guard: keep the stage graph and the tensors until the launch is done, as with any work on a stream.
        """
        self._graph = self._kept = None


def _raw_graph(stage_graph: Any) -> int:
    """Address of the cudaGraph_t in torch's object."""
    if not hasattr(stage_graph, "raw_cuda_graph"):
        raise TypeError(f"stage_graph must be a torch.cuda.CUDAGraph, got {type(stage_graph).__name__}")
    try:
        return stage_graph.raw_cuda_graph()
    except RuntimeError as error:
        raise ValueError(
            "stage_graph holds no graph to copy: make it with torch.cuda.CUDAGraph(keep_graph=True) "
            f"and capture a stage first ({error})"
        ) from None


def _check(cursor: torch.Tensor, stop: torch.Tensor, remaining: torch.Tensor) -> None:
    if cursor.dim() != 1:
        raise ValueError(f"cursor must have shape [rows], got {list(cursor.shape)}")
    shapes = {"cursor": cursor.shape, "stop": cursor.shape, "remaining": torch.Size([1])}
    for name, tensor in (("cursor", cursor), ("stop", stop), ("remaining", remaining)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, got {tensor.dtype}; use .int()")
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name} must have shape {list(shapes[name])}, got {list(tensor.shape)}")
        if tensor.device != cursor.device:
            raise ValueError(f"{name} must be on {cursor.device}, where cursor is, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}; use .contiguous()")
