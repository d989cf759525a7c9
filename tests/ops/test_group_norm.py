"""GroupNorm against float64: the Triton kernels (in the interpreter where there is no GPU), and the dispatch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from pydiff.kernels import group_norm_tiling  # noqa: E402
from pydiff.kernels.group_norm_tiling import Sizes, select, two_kernels  # noqa: E402

from pydiff.ops import group_norm as ops  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = ("plain", "add", "x2", "residual", "modulated")
SHAPES = {(2, 12, 5, 7): 2, (1, 48, 9, 5): 2, (3, 10, 13): 1, (1, 8, 2, 3, 5): 8, (1, 7, 11): 1, (5, 12): 1}
IN_TWO = {(2, 12, 5, 7): 3, (1, 70, 97): 7}  # 70 channels: two tiles, and groups across both


def lay_out(x: torch.Tensor, last: bool) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last and x.ndim > 2 else x.contiguous()


def arguments(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    last: bool,
    variant: str,
    mean: float = 0.0,
    channels2: int = 0,
) -> tuple[tuple, dict[str, Any]]:
    """A call's tensors: x with `shape`, of which a variant "x2" gives `channels2` channels (or all but 5) to x2."""
    generator = torch.Generator().manual_seed(math.prod(shape) + groups)

    def normal(*size: int, offset: float = 0.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) + offset).to(DEVICE, dtype)

    samples, channels = shape[:2]
    x = normal(*shape, offset=mean)
    args: dict[str, Any] = {"activation": None if variant == "plain" else "silu"}
    if variant in ("add", "residual", "x2"):
        args["add"] = normal(channels) if variant == "residual" else normal(samples, channels)
    if variant == "residual":
        args["residual"] = lay_out(normal(*shape), last)
    if variant == "modulated":  # the halves of a projection, as a U-Net makes them
        args["scale"], args["shift"] = normal(samples, 2 * channels).chunk(2, 1)
    if variant == "x2":
        second = channels2 or channels - 5
        x, args["x2"] = x[:, : channels - second], lay_out(x[:, channels - second :], last)
    weights = (None, None) if variant == "plain" else (normal(channels), normal(channels))
    return (lay_out(x, last), groups, *weights, 1e-5), args


def to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def assert_close(found: Any, args: tuple, more: dict[str, Any]) -> None:
    """The house's bound: twice the error of torch's chain in the same dtype, and an ulp."""
    exact = ops.group_norm_reference(
        *(to(a, torch.float64) for a in args), **{k: to(v, torch.float64) for k, v in more.items()}
    )
    chain = ops.group_norm_reference(*args, **more)
    if more.get("residual") is None:
        exact, chain, found = (exact,), (chain,), (found,)
    for e, c, f in zip(exact, chain, found, strict=True):
        assert f.shape == c.shape and f.dtype == c.dtype
        ulp = torch.finfo(f.dtype).eps * 2.0 ** math.floor(math.log2(max(e.abs().max().item(), 1e-6)))
        error, bound = (f.double() - e).abs().max().item(), 2 * (c.double() - e).abs().max().item() + ulp
        assert error <= bound, f"error {error:.3g}, bound {bound:.3g}"


@pytest.fixture
def in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls take the path for large tensors, shared out to few multiprocessors; tiny tensors take the other one."""
    monkeypatch.setattr(group_norm_tiling, "select", lambda sizes, _: two_kernels(sizes, 3))


def sweep(
    shapes: dict[tuple[int, ...], int], launches: int, variant: str, last: bool, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Every shape, each in one of the dtypes in turn."""
    for i, (shape, groups) in enumerate(shapes.items()):
        args, more = arguments(shape, groups, dtypes[(i + VARIANTS.index(variant) + last) % len(dtypes)], last, variant)
        assert ops.group_norm_launches(*args, **more) == launches
        assert_close(ops.group_norm_kernel(*args, **more), args, more)


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_kernel(variant: str, last: bool) -> None:
    sweep(SHAPES, 1, variant, last, DTYPES)


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_kernels(in_two: None, variant: str, last: bool) -> None:
    sweep(IN_TWO, 2, variant, last, DTYPES)


@pytest.mark.slow
@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination(request: pytest.FixtureRequest, dtype: torch.dtype, variant: str, last: bool) -> None:
    sweep(SHAPES, 1, variant, last, (dtype,))
    request.getfixturevalue("in_two")
    sweep(IN_TWO, 2, variant, last, (dtype,))


@pytest.mark.parametrize("channels, channels2, groups", [(320, 0, 32), (480, 160, 16), (96, 64, 2), (64, 0, 64)])
def test_unet_channels_in_two_kernels(in_two: None, channels: int, channels2: int, groups: int) -> None:
    """Tiles of 64 and 32 channels that divide the width, or not; groups that straddle them, or the inputs' border."""
    shape = (1, channels, 3, 5)
    args, more = arguments(shape, groups, torch.bfloat16, True, "x2" if channels2 else "add", channels2=channels2)
    assert_close(ops.group_norm_kernel(*args, **more), args, more)


@pytest.mark.parametrize("channels", [320, 640])
def test_unet_channels_in_one_kernel(channels: int) -> None:
    args, more = arguments((1, channels, 2, 2), channels // 160, torch.bfloat16, True, "x2", channels2=channels // 2)
    assert_close(ops.group_norm_kernel(*args, **more), args, more)


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
def test_chunks_and_repeated_tiles(in_two: None, last: bool) -> None:
    """Several blocks for each program of the first kernel, several programs for each sample, and a partial block."""
    shape = (1, 64, 2113) if last else (1, 2, 40001)
    args, more = arguments(shape, 2, torch.float32, last, "add", mean=30.0)
    tiling = group_norm_tiling.select(Sizes(1, shape[1], 0, shape[2], 2, 4, last), 132)
    assert tiling.chunks > 1 and tiling.statistics["UNROLL"] > 1
    assert_close(ops.group_norm_kernel(*args, **more), args, more)


@pytest.mark.filterwarnings("ignore:overflow")  # in the masked places of a tile
@pytest.mark.parametrize("path", ["one", "two"])
@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
def test_large_mean(path: str, last: bool, request: pytest.FixtureRequest) -> None:
    if path == "two":
        request.getfixturevalue("in_two")
    for dtype in (torch.float32, torch.float16):
        for mean in (1e3, -1e4):
            args, more = arguments((1, 6, 11, 13), 2, dtype, last, "modulated", mean=mean)
            assert_close(ops.group_norm_kernel(*args, **more), args, more)
    args, more = arguments((1, 6, 11, 13), 2, torch.float32, last, "plain")
    more["add"] = torch.full((6,), 1e3, device=DEVICE)
    assert_close(ops.group_norm_kernel(*args, **more), args, more)


@pytest.mark.parametrize("path", ["one", "two"])
def test_constant_groups_outliers_and_nan(path: str, request: pytest.FixtureRequest) -> None:
    if path == "two":
        request.getfixturevalue("in_two")
    x = torch.full((1, 4, 6, 50), 1234.5, device=DEVICE)
    assert ops.group_norm_kernel(x, 2).abs().max() == 0
    x[:, :, 0, 0] = 2000.0  # the first value of each channel is what the others are compared with
    exact = ops.group_norm_reference(x.double(), 2)
    assert (ops.group_norm_kernel(x, 2) - exact).abs().max() <= 1e-5 * exact.abs().max()
    x[0, 3, 3, 3] = math.nan
    assert torch.equal(ops.group_norm_kernel(x, 2).isnan().flatten(2).all(2)[0], torch.arange(4, device=DEVICE) >= 2)


@pytest.mark.parametrize("path", ["one", "two"])
def test_the_residual_sum_is_what_is_normalised(path: str, request: pytest.FixtureRequest) -> None:
    if path == "two":
        request.getfixturevalue("in_two")
    args, more = arguments((2, 12, 5, 7), 3, torch.bfloat16, True, "residual", mean=50.0)
    y, s = ops.group_norm_kernel(*args, **more)
    total = args[0].float() + more["add"].float()[:, None, None] + more["residual"].float()
    assert (s.float() - total).abs().max() <= torch.finfo(torch.bfloat16).eps * total.abs().max()
    assert_close(y, (s, *args[1:]), {"activation": "silu"})


def test_the_check_sees_a_wrong_result() -> None:
    args, more = arguments((2, 12, 5, 7), 3, torch.bfloat16, True, "add")
    for wrong in ({"eps": 0.05}, {"add": None}, {"activation": None}):
        found = ops.group_norm_kernel(*args[:4], **({"eps": 1e-5} | more | wrong))
        with pytest.raises(AssertionError, match="bound"):
            assert_close(found, args, more)


def test_layouts_and_strides() -> None:
    x = torch.randn(2, 12, 3, 4, device=DEVICE)
    last = x.contiguous(memory_format=torch.channels_last)
    assert ops.group_norm_kernel(x, 3).is_contiguous()
    assert ops.group_norm_kernel(last, 3).is_contiguous(memory_format=torch.channels_last)
    y, s = ops.group_norm_kernel(last, 3, residual=x)  # a residual in the other layout is brought into that of x
    assert y.stride() == s.stride() == last.stride()
    assert_close((y, s), (last, 3), {"residual": x})
    both = ops.group_norm_kernel(last, 3, x2=last[:, :6])
    assert both.is_contiguous(memory_format=torch.channels_last)
    assert_close(both, (last, 3), {"x2": last[:, :6]})
    for odd in (x[:, :, ::2], x[:, 3:9], last[:, 3:9], x.transpose(2, 3), x[:1].expand(3, -1, -1, -1)):
        assert_close(ops.group_norm_kernel(odd, 3), (odd, 3), {})
    tokens = torch.randn(2, 9, 12, device=DEVICE).transpose(1, 2)
    assert ops.group_norm_kernel(tokens, 3).stride() == tokens.stride()
    rows = torch.randn(12, 2, device=DEVICE).t()  # channels apart in memory: made contiguous
    assert_close(ops.group_norm_kernel(x, 3, add=rows), (x, 3), {"add": rows})
    one = torch.randn(1, 12, device=DEVICE)
    assert_close(ops.group_norm_kernel(x[:1], 3, add=one.double()), (x[:1], 3), {"add": one.double()})


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.integers(1, 3),
    groups=st.integers(1, 5),
    cpg=st.integers(1, 11),
    positions=st.integers(1, 70),
    last=st.booleans(),
    two=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    variant=st.sampled_from(VARIANTS),
)
def test_any_shape(
    monkeypatch: pytest.MonkeyPatch,
    samples: int,
    groups: int,
    cpg: int,
    positions: int,
    last: bool,
    two: bool,
    dtype: torch.dtype,
    variant: str,
) -> None:
    if variant == "x2" and groups * cpg < 6 or positions * cpg < 4:
        variant = "plain" if positions * cpg > 3 else "add"
    if positions * cpg < 4:
        return  # the statistics of a few values magnify rounding without bound
    with monkeypatch.context() as patch:
        if two:
            patch.setattr(group_norm_tiling, "select", lambda sizes, _: two_kernels(sizes, 2))
        args, more = arguments((samples, groups * cpg, positions), groups, dtype, last, variant)
        assert_close(ops.group_norm_kernel(*args, **more), args, more)


def test_bad_input() -> None:
    x = torch.zeros(2, 12, 3, 3)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("num_groups", {"num_groups": 5}),
        ("num_groups", {"num_groups": 0}),
        ("weight", {"weight": torch.ones(11)}),
        ("bias", {"bias": torch.ones(12, dtype=torch.long)}),
        ("activation", {"activation": "gelu"}),
        ("x2", {"x2": torch.zeros(2, 12, 3, 4)}),
        ("x2", {"x2": torch.zeros(2, 12, 3, 3).half()}),
        ("residual", {"residual": torch.zeros(2, 12, 3)}),
        ("residual", {"x2": x, "residual": x}),
        ("add", {"add": torch.zeros(3, 12)}),
        ("shift", {"scale": torch.zeros(2, 12)}),
        ("scale", {"scale": torch.zeros(12), "shift": torch.zeros(12)}),
    ]
    for name, wrong in bad:
        with pytest.raises(ValueError, match=name):
            ops.group_norm(**({"x": x, "num_groups": 3} | wrong))
    with pytest.raises(ValueError, match="x must be"):
        ops.group_norm(torch.zeros(3), 1)


def test_reference_runs_on_the_cpu_with_gradients() -> None:
    args, more = arguments((2, 12, 5, 7), 3, torch.float32, True, "modulated")
    x = args[0].cpu().double().requires_grad_()
    more = {k: v.cpu().double() if isinstance(v, torch.Tensor) else v for k, v in more.items()}
    y = ops.group_norm(x, 3, **more)
    y.sum().backward()
    assert torch.equal(y, ops.group_norm_reference(x, 3, **more)) and x.grad is not None
    fast, reason = ops.can_use_group_norm(x)
    assert not fast and "cpu" in reason


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [8, 64])
def test_fake_cuda_tensors_see_one_operator(size: int) -> None:
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 320, size, size, device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last)
        weight, add = torch.empty(320, device="cuda"), torch.empty(2, 320, device="cuda")
        with Seen() as seen:
            y = ops.group_norm(x, 32, weight, weight, activation="silu", add=add)
            both = ops.group_norm(x, 32, x2=x)
            _, s = ops.group_norm(x, 32, residual=x)
    assert [n for n in seen.names if n.startswith("pydiff")] == [
        "pydiff.group_norm.default",
        "pydiff.group_norm.default",
        "pydiff.group_norm_residual.default",
    ]
    assert y.shape == x.shape and y.stride() == s.stride() == x.stride() and y.dtype == x.dtype and y.is_cuda
    assert both.shape == (2, 640, size, size) and both.is_contiguous(memory_format=torch.channels_last)


def test_launches() -> None:
    def count(*shape: int, **more: Any) -> int:
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
        return ops.group_norm_launches(x, 32, **more)

    assert [count(2, 1280, 8, 8), count(2, 2560, 8, 8), count(2, 1280, 16, 16)] == [1, 1, 1]
    assert [count(2, 320, 64, 64), count(1, 128, 1024, 1024)] == [2, 2]


@pytest.mark.parametrize("nhwc", [True, False])
def test_programs_cover_the_tensor_and_fit(nhwc: bool) -> None:
    """At most 64 elements a thread, every multiprocessor at work on large tensors, blocks within the positions."""
    for channels, positions, samples in ((320, 128**2, 2), (960, 64**2, 2), (512, 128**2, 1), (128, 1024**2, 1)):
        tiling = select(Sizes(samples, channels, 0, positions, 32, 2, nhwc), 132)
        first, second = tiling.statistics, tiling.apply
        tiles = -(-channels // first["COLS"])
        assert tiling.programs == samples * tiles * tiling.chunks >= 110
        assert first["ROWS"] * first["UNROLL"] <= positions
        assert first["ROWS"] * first["COLS"] == 256 * first["num_warps"]
        assert second["ROWS"] * second["COLS"] <= 2048 * second["num_warps"]
        steps = -(-positions // (second["ROWS"] * second["REPEAT"]))
        assert tiling.apply_programs == samples * tiles * steps
