"""What `kernels.py` times: an operation on a shape of a published model, in pydiff's form and in PyTorch's.

Every row's functions take the same tensors. Images are channels_last, as in a U-Net that is made for speed; "eager
NCHW" is PyTorch's operation on the same values in the layout that it prefers. Bytes are those that have to move at the
least, each operand once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = Path(__file__).with_name("unet_shapes.json")
FAMILIES = (
    "group_norm_silu",
    "group_norm",
    "attention_self",
    "attention_cross",
    "geglu",
    "linear_geglu",
    "layer_norm",
    "add_layer_norm",
    "upsample_conv",
    "residual",
)
Run = Callable[..., Any]


@dataclass
class Row:
    """`runs` by name: "pydiff", "eager" and rivals; "eager" is also what is compiled. `tensors` are (shape, NHWC)."""

    workload: str
    family: str
    shape: str
    calls: int
    tensors: Sequence[tuple[tuple[int, ...], bool]]
    runs: dict[str, Run]
    flops: float = 0.0
    written: int = 0
    """Elements of the results."""

    @property
    def elements(self) -> int:
        """Elements read and written at the least."""
        return sum(math.prod(shape) for shape, _ in self.tensors) + self.written

    def make(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        made = [torch.randn(shape, device=device).to(dtype) for shape, _ in self.tensors]
        return [t.to(memory_format=torch.channels_last) if nhwc else t for t, (_, nhwc) in zip(made, self.tensors)]


def rows(workloads: list[str], *, smoke: bool = False) -> list[Row]:
    """Every row of these workloads; with `smoke` one small row of each family."""
    found: list[Row] = []
    for workload in workloads:
        for family, entries in shapes()[workload].items():
            for entry in entries[:1] if smoke else entries:
                found += BUILDERS[family](workload, family, _shrunk(entry) if smoke else entry)
    return found


def shapes() -> dict[str, dict[str, list[dict[str, Any]]]]:
    return json.loads(SHAPES.read_text(encoding="utf-8"))["models"]


def _shrunk(entry: dict[str, Any]) -> dict[str, Any]:
    small = dict(entry)
    if "shape" in entry:
        shape = entry["shape"]
        small["shape"] = (
            [shape[0], 64, 4, 4] if len(shape) == 4 else [shape[0], *([8, 64] if "groups" not in entry else [64, 8])]
        )
    limits = {
        "heads": 2,
        "q": 16,
        "kv": 16 if entry.get("kv", 0) == entry.get("q") else 7,
        "head_dim": 16,
        "rows": 16,
        "columns": 32,
        "inner": 16,
    }
    return {k: min(v, limits[k]) if k in limits else v for k, v in small.items()}


# ---------------------------------------------------------------------------- families


def _group_norm(workload: str, family: str, entry: dict[str, Any]) -> Iterator[Row]:
    shape, groups, eps = tuple(entry["shape"]), entry["groups"], entry["eps"]
    activation = "silu" if family.endswith("silu") else None

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        from pydiff.ops.group_norm import group_norm

        return group_norm(x, groups, weight, bias, eps, activation=activation)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(y) if activation else y

    image = len(shape) == 4
    runs: dict[str, Run] = {"pydiff": ours, "eager": eager}
    if image:
        runs["eager NCHW"] = Prepared(eager, lambda tensors: [tensors[0].contiguous(), *tensors[1:]])
    tensors = [(shape, image), ((shape[1],), False), ((shape[1],), False)]
    yield Row(workload, family, f"{list(shape)}", entry["calls"], tensors, runs, written=math.prod(shape))


@dataclass
class Prepared:
    """A run whose tensors are changed once, before anything is timed."""

    run: Run
    prepare: Callable[[list[Tensor]], list[Tensor]]

    def __call__(self, *tensors: Tensor) -> Any:
        return self.run(*tensors)


def _sdpa(backend: SDPBackend | None) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def _attention(workload: str, family: str, entry: dict[str, Any]) -> Iterator[Row]:
    batch, heads, q, kv, dim = (entry[k] for k in ("batch", "heads", "q", "kv", "head_dim"))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from pydiff.ops.attention import attention

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attention(q, k, v)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from pydiff.ops.attention import attention_kernel

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attention_kernel(q, k, v)

    runs = {
        "pydiff": ours,
        "pydiff kernel": kernel,
        "eager": _sdpa(None),
        "cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    }
    tensors = [((batch, rows, heads, dim), False) for rows in (q, kv, kv)]
    yield Row(
        workload,
        family,
        f"{[batch, heads, q, dim]}, {kv} keys",
        entry["calls"],
        tensors,
        runs,
        flops=4.0 * batch * heads * q * kv * dim,
        written=batch * heads * q * dim,
    )


def _geglu(workload: str, family: str, entry: dict[str, Any]) -> Iterator[Row]:
    rows, columns, inner = entry["rows"], entry["columns"], entry["inner"]

    def eager(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def ours(x: Tensor) -> Tensor:
        from pydiff.ops.geglu import geglu

        return geglu(x)

    yield Row(
        workload,
        "geglu",
        f"{[rows, 2 * columns]}",
        entry["calls"],
        [((rows, 2 * columns), False)],
        {"pydiff": ours, "eager": eager},
        written=rows * columns,
    )

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return eager(F.linear(x, weight, bias))

    def ours_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from pydiff.ops.geglu import linear_geglu

        return linear_geglu(x, weight, bias)

    def kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from pydiff.ops.geglu import linear_geglu_kernel

        return linear_geglu_kernel(x, weight, bias)

    tensors = [((rows, inner), False), ((2 * columns, inner), False), ((2 * columns,), False)]
    yield Row(
        workload,
        "linear_geglu",
        f"{[rows, inner]} -> {columns}",
        entry["calls"],
        tensors,
        {"pydiff": ours_linear, "pydiff kernel": kernel, "eager": linear},
        flops=4.0 * rows * inner * columns,
        written=rows * columns,
    )


def _layer_norm(workload: str, family: str, entry: dict[str, Any]) -> Iterator[Row]:
    """Of a transformer block's three norms two follow a residual addition."""
    shape, channels = tuple(entry["shape"]), entry["shape"][-1]

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (channels,), weight, bias)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from pydiff.ops.layer_norm import layer_norm

        return layer_norm(x, weight, bias, 1e-5)

    affine = [((channels,), False)] * 2
    yield Row(
        workload,
        "layer_norm",
        f"{list(shape)}",
        entry["calls"] // 3,
        [(shape, False), *affine],
        {"pydiff": ours, "eager": eager},
        written=math.prod(shape),
    )

    def add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return eager(total, weight, bias), total

    def ours_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        from pydiff.ops.layer_norm import layer_norm

        return layer_norm(x, weight, bias, 1e-5, residual=residual)

    yield Row(
        workload,
        "add_layer_norm",
        f"{list(shape)}",
        entry["calls"] * 2 // 3,
        [(shape, False)] * 2 + affine,
        {"pydiff": ours_add, "eager": add},
        written=2 * math.prod(shape),
    )


def _upsample(workload: str, family: str, entry: dict[str, Any]) -> Iterator[Row]:
    batch, channels, height, width = shape = tuple(entry["shape"])

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from pydiff.ops.upsample import upsample_conv2d

        return upsample_conv2d(x, weight, bias)

    pixels = batch * 4 * height * width
    yield Row(
        workload,
        "upsample_conv",
        f"{list(shape)}",
        entry["calls"],
        [(shape, True), ((channels, channels, 3, 3), True), ((channels,), False)],
        {"pydiff": ours, "eager": eager},
        flops=18.0 * pixels * channels**2,
        written=pixels * channels,
    )


def _residual(workload: str, family: str, entry: dict[str, Any]) -> Iterator[Row]:
    """In an image a convolution's bias is added with it, which eager cuDNN does in a kernel of its own.

    Two in three of the additions to tokens are part of `add_layer_norm`.
    """
    shape = tuple(entry["shape"])
    image = len(shape) == 4

    def eager(x: Tensor, residual: Tensor, *bias: Tensor) -> Tensor:
        return (x + bias[0][:, None, None] if bias else x) + residual

    def ours(x: Tensor, residual: Tensor, *bias: Tensor) -> Tensor:
        from pydiff.ops.residual import residual_add

        return residual_add(x, residual, bias=bias[0] if bias else None, channel_dim=1 if image else -1)

    tensors = [(shape, image)] * 2 + [((shape[1],), False)] * image
    yield Row(
        workload,
        "residual",
        f"{list(shape)}",
        entry["calls"] if image else entry["calls"] // 3,
        tensors,
        {"pydiff": ours, "eager": eager},
        written=math.prod(shape),
    )


BUILDERS: dict[str, Callable[[str, str, dict[str, Any]], Iterator[Row]]] = {
    "group_norm_silu": _group_norm,
    "group_norm": _group_norm,
    "attention_self": _attention,
    "attention_cross": _attention,
    "geglu": _geglu,
    "layer_norm": _layer_norm,
    "upsample": _upsample,
    "residual": _residual,
}
