"""Every Triton kernel on a real device: the shapes of real models, 64-bit offsets, graphs, streams, compiled code.

The interpreter's tests (tests/ops) cover the odd cases; here the same rule holds at full size: a kernel errs at most
twice as much as PyTorch's own chain in the same precision, both against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pydiff.ops import attention, geglu, group_norm, layer_norm, residual, rms_norm, upsample

pytestmark = pytest.mark.gpu

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def randn(*shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda") * scale + mean


def nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def affine(channels: int) -> tuple[Tensor, Tensor]:
    return randn(channels, scale=0.1, mean=1.0), randn(channels, scale=0.1)


def norm_case(n: int, c: int, hw: int, layout: Callable[[Tensor], Tensor] = nhwc, **options: Any) -> Arguments:
    given = {
        "add": lambda: randn(n, c),
        "x2": lambda: layout(randn(n, c, hw, hw)),
        "residual": lambda: layout(randn(n, c, hw, hw)),
        "scale": lambda: randn(n, c, scale=0.1),
        "shift": lambda: randn(n, c),
    }
    made = {k: given[k]() if v is True else v for k, v in options.items()}
    total = 2 * c if options.get("x2") else c
    return (layout(randn(n, c, hw, hw)), 32, *affine(total), 1e-5), made


def heads(b: int, h: int, lq: int, lk: int, d: int) -> Arguments:
    q = randn(b, lq, h, d).transpose(1, 2)
    k, v = randn(b, lk, 2, h, d).permute(2, 0, 3, 1, 4)
    return (q, k, v), {}


CASES: dict[str, tuple[Any, str, Callable[[], Arguments]]] = {
    "norm 320x64 silu add": (group_norm, "group_norm", lambda: norm_case(2, 320, 64, activation="silu", add=True)),
    "norm 1280x8": (group_norm, "group_norm", lambda: norm_case(2, 1280, 8, activation="silu")),
    "norm 2x960x32": (group_norm, "group_norm", lambda: norm_case(2, 960, 32, activation="silu", x2=True)),
    "norm 2560x16 scale": (
        group_norm,
        "group_norm",
        lambda: norm_case(2, 2560, 16, activation="silu", scale=True, shift=True),
    ),
    "norm 640x32 residual": (group_norm, "group_norm", lambda: norm_case(2, 640, 32, residual=True)),
    "norm 128x512": (group_norm, "group_norm", lambda: norm_case(1, 128, 512, activation="silu")),
    "norm 512x128 NCHW": (group_norm, "group_norm", lambda: norm_case(1, 512, 128, torch.Tensor.contiguous)),
    "attention 40": (attention, "attention", lambda: heads(2, 8, 4096, 4096, 40)),
    "attention 80": (attention, "attention", lambda: heads(2, 8, 1024, 1024, 80)),
    "attention 160": (attention, "attention", lambda: heads(2, 8, 256, 256, 160)),
    "attention 64": (attention, "attention", lambda: heads(2, 20, 1024, 1024, 64)),
    "attention 512": (attention, "attention", lambda: heads(1, 1, 4096, 4096, 512)),
    "attention text": (attention, "attention", lambda: heads(2, 8, 4096, 77, 40)),
    "geglu": (geglu, "geglu", lambda: ((randn(2, 4096, 2560),), {})),
    "linear_geglu": (
        geglu,
        "linear_geglu",
        lambda: ((randn(2, 4096, 320), randn(2560, 320, scale=0.05), randn(2560)), {}),
    ),
    "linear_geglu small": (
        geglu,
        "linear_geglu",
        lambda: ((randn(2, 64, 1280), randn(10240, 1280, scale=0.03), randn(10240)), {}),
    ),
    "layer_norm": (layer_norm, "layer_norm", lambda: ((randn(2, 4096, 320), *affine(320), 1e-5), {})),
    "layer_norm residual": (
        layer_norm,
        "layer_norm",
        lambda: ((randn(2, 1024, 1280), *affine(1280), 1e-5), {"residual": randn(2, 1024, 1280)}),
    ),
    "layer_norm adaptive": (
        layer_norm,
        "layer_norm",
        lambda: (
            (randn(2, 256, 1152), None, None, 1e-6),
            {"residual": randn(2, 256, 1152), **{k: randn(2, 1152) for k in ("gate", "scale", "shift")}},
        ),
    ),
    "residual_add": (
        residual,
        "residual_add",
        lambda: ((nhwc(randn(2, 320, 64, 64)), nhwc(randn(2, 320, 64, 64))), {"bias": randn(320), "scale": 0.5}),
    ),
    "rms_norm": (rms_norm, "rms_norm", lambda: ((randn(2, 4096, 24, 128), randn(128), 1e-6), {})),
    "qk_norm_rotary": (
        rms_norm,
        "qk_norm_rotary",
        lambda: ((*randn(2, 1024, 2, 24, 64).unbind(2), randn(64), randn(64), randn(1024, 64), randn(1024, 64)), {}),
    ),
    "upsample": (
        upsample,
        "upsample_conv2d",
        lambda: ((nhwc(randn(2, 640, 32, 32)), nhwc(randn(640, 640, 3, 3, scale=0.013)), randn(640)), {}),
    ),
}


def cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) else value

    return tuple(map(one, arguments[0])), {k: one(v) for k, v in arguments[1].items()}


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, str, Arguments]:
    module, name, make = CASES[request.param]
    torch.manual_seed(0)
    return module, name, make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.no_grad()
def test_error_at_most_twice_that_of_torch(case: tuple[Any, str, Arguments], dtype: torch.dtype) -> None:
    module, name, arguments = case
    low = cast(arguments, dtype)
    (args, options), (exact_args, exact_options) = low, cast(low, torch.float64)
    reference = getattr(module, f"{name}_reference")
    exact = outputs(reference(*exact_args, **exact_options))
    torchs = outputs(reference(*args, **options))
    ours = outputs(getattr(module, f"{name}_kernel")(*args, **options))
    for e, t, o in zip(exact, torchs, ours):
        assert o.shape == t.shape and o.dtype == dtype
        ulp = float(e.abs().max()) * torch.finfo(dtype).eps
        assert float((o - e).abs().max()) <= 2 * float((t - e).abs().max()) + ulp


@torch.no_grad()
def test_replay_of_a_graph_is_the_eager_call(case: tuple[Any, str, Arguments]) -> None:
    module, name, arguments = case
    args, options = cast(arguments, torch.bfloat16)
    function = getattr(module, name)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        eager = outputs(function(*args, **options))  # compiles, loads, measures
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(function(*args, **options))
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    for expected, result in zip(eager, captured):
        assert torch.equal(result, expected)


@torch.no_grad()
def test_inductor_sees_through(case: tuple[Any, str, Arguments]) -> None:
    module, name, arguments = case
    args, options = cast(arguments, torch.bfloat16)
    function = getattr(module, name)
    eager = outputs(function(*args, **options))
    compiled = outputs(torch.compile(function, fullgraph=True, dynamic=False)(*args, **options))
    for expected, result in zip(eager, compiled):
        scale = float(expected.abs().max())
        assert float((result - expected).abs().max()) <= 0.02 * scale


@torch.no_grad()
def test_offsets_beyond_32_bits() -> None:
    x = torch.empty(9, 2**19, 512, dtype=torch.bfloat16, device="cuda").normal_()
    y = layer_norm.layer_norm_kernel(x, None, None, 1e-5)
    assert torch.equal(y[8], layer_norm.layer_norm_kernel(x[8:], None, None, 1e-5)[0])
    image = x.transpose(1, 2).unflatten(2, (2**10, 2**9))
    y = group_norm.group_norm_kernel(image, 32, activation="silu")
    expected = group_norm.group_norm_kernel(image[8:], 32, activation="silu")
    assert float((y[8] - expected[0]).abs().max()) < 0.05


@torch.no_grad()
def test_a_model_optimised_on_the_device() -> None:
    diffusers = pytest.importorskip("diffusers")
    import pydiff

    torch.manual_seed(0)
    model = (
        diffusers.UNet2DConditionModel(
            sample_size=32,
            cross_attention_dim=64,
            block_out_channels=(320, 640),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        .cuda()
        .eval()
        .requires_grad_(False)
    )
    x, t, text = randn(2, 4, 32, 32), torch.tensor([500, 3], device="cuda"), randn(2, 77, 64)
    exact = model.double()(x.double(), t, text.double()).sample
    model.bfloat16()
    low = (x.bfloat16(), t, text.bfloat16())
    error = (model(*low).sample - exact).abs()
    fused = (pydiff.optimize(model)(*low).sample - exact).abs()
    assert float(fused.max()) <= 2 * float(error.max())
    compiled = (torch.compile(model, fullgraph=True)(*low).sample - exact).abs()
    assert float(compiled.max()) <= 2 * float(error.max())
    pydiff.restore(model)
    assert torch.equal((model(*low).sample - exact).abs(), error)
