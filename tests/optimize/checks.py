"""What every model that `pydiff.optimize` knows has to pass."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pydiff
from pydiff.optimize import swap
from pydiff.optimize.swap import Fused, is_fused

Call = Callable[[nn.Module], Tensor]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model with reproducible weights, none of them zero, ready for inference."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() or parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def relative(result: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest value expected."""
    return float((result.double() - expected.double()).abs().max() / expected.double().abs().max())


def assert_close_in_float32(make: Callable[[], nn.Module], call: Call, bound: float = 2e-5) -> None:
    """The fused model differs by float32 rounding, and a model with one weight off by 1 % does not pass for it.

    The bound is some hundred units of rounding (1.2e-7): what a few dozen layers add up to.
    """
    original, fused = seeded(make), seeded(make)
    expected = call(original)
    pydiff.optimize(fused, memory_format=torch.channels_last)
    assert any(is_fused(m) for m in fused.modules())
    assert relative(call(fused), expected) <= bound
    weight = max((p for p in fused.parameters() if p.ndim > 1), key=lambda p: p.numel())
    with torch.no_grad():
        weight.mul_(1.01)
    assert relative(call(fused), expected) > bound


def assert_low_precision_error(
    make: Callable[[], nn.Module],
    call: Callable[[nn.Module, torch.dtype], Tensor],
    dtype: torch.dtype = torch.bfloat16,
    seeds: int = 3,
) -> None:
    """Against float64, the fused model in `dtype` errs at most twice as much as the original in `dtype`."""
    worst, ours, theirs = 0.0, 0.0, 0.0
    for seed in range(seeds):
        exact = call(seeded(make, seed).double(), torch.float64)
        low = seeded(make, seed).to(dtype)
        error = (call(low, dtype).double() - exact.to(torch.float64)).abs()
        fused = (call(pydiff.optimize(low), dtype).double() - exact).abs()
        worst = max(worst, float(fused.max() / error.max()))
        ours, theirs = ours + float(fused.square().mean()), theirs + float(error.square().mean())
    assert worst <= 2.0
    assert ours <= 1.3**2 * theirs  # of the squares: no worse on the whole, but for the luck of a few seeds


def assert_restored(make: Callable[[], nn.Module], call: Call) -> None:
    """Keys and values of the state are the user's throughout, and `restore` is exact."""
    model = seeded(make)
    expected, classes = call(model), [type(m) for m in model.modules()]
    parameters = dict(model.named_parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    pydiff.optimize(model, memory_format=torch.channels_last)
    call(model)
    assert [type(m) for m in model.modules()] != classes
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert pydiff.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert not [m for m in model.modules() if any(k.startswith("_pydiff") for k in vars(m))]
    assert torch.equal(call(model), expected)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def assert_copies(make: Callable[[], nn.Module], call: Call) -> None:
    """A fused model can be copied and pickled, and the copy works on its own."""
    model = pydiff.optimize(seeded(make))
    expected = call(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(call(other), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(call(model), expected)
        assert isinstance(other, Fused) == isinstance(model, Fused)


def assert_compiles(make: Callable[[], nn.Module], call: Call) -> None:
    """One graph, without a break, and the same result."""
    model = pydiff.optimize(seeded(make))
    expected = call(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    assert relative(call(compiled), expected) < 1e-5


def assert_follows_weights(make: Callable[[], nn.Module], call: Call, names: list[str]) -> None:
    """A weight changed in place, given new storage, or replaced is what the next call uses."""
    plain, fused = seeded(make), pydiff.optimize(seeded(make))
    call(fused)

    def change(model: nn.Module, name: str, way: str) -> None:
        owner, _, attribute = name.rpartition(".")
        layer = model.get_submodule(owner)
        parameter = getattr(layer, attribute)
        new = parameter.detach() * 1.5
        if way == "in place":
            parameter.data.copy_(new)
        elif way == "storage":
            parameter.data = new
        else:
            setattr(layer, attribute, nn.Parameter(new, requires_grad=False))

    for name in names:
        for way in ("in place", "storage", "parameter"):
            before = call(fused)
            change(plain, name, way)
            change(fused, name, way)
            assert not torch.equal(call(fused), before)
            assert relative(call(fused), call(plain)) < 2e-5


def assert_hooks_fire(
    make: Callable[[], nn.Module],
    call: Call,
    kinds: tuple[type[nn.Module], ...],
    never: Callable[[str], bool] = lambda name: False,
) -> None:
    """A hook on any module the original calls sees what it saw before."""
    plain, fused = seeded(make), pydiff.optimize(seeded(make))
    seen: list[dict[str, list[Tensor]]] = [{}, {}]
    for k, model in enumerate((plain, fused)):
        for name, module in model.named_modules():
            if isinstance(module, kinds) and not never(name):
                module.register_forward_hook(lambda m, a, out, name=name, k=k: seen[k].setdefault(name, []).append(out))
    assert relative(call(fused), call(plain)) < 2e-5
    assert seen[0] and list(seen[0]) == list(seen[1])
    for name, outputs in seen[0].items():
        assert len(outputs) == len(seen[1][name])
        for expected, result in zip(outputs, seen[1][name]):
            assert result.shape == expected.shape and relative(result, expected) < 1e-4


def assert_reference_path(make: Callable[[], nn.Module], call: Call) -> None:
    """In training mode and where gradients are wanted, the original runs, bit for bit, and says so once."""
    plain, fused = seeded(make), pydiff.optimize(seeded(make))
    for model in (plain, fused):
        model.requires_grad_(True)
    swap._warned.clear()
    with pytest.warns(UserWarning, match="gradients are required"):
        result = call(fused)
    expected = call(plain)
    assert torch.equal(result, expected)
    result.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    fused.train()
    with torch.no_grad(), pytest.warns(UserWarning, match="training mode"):
        call(fused)


def assert_hoisting(
    make: Callable[[], nn.Module], shape: tuple[int, ...], cond: dict[str, Any], **options: Any
) -> None:
    """Sampling with and without hoisting gives the same samples, and times that differ do matter."""
    model = pydiff.optimize(seeded(make))
    sampler = pydiff.Sampler(model, steps=3, **options)
    arguments = {"seed": 0, "cond": cond, "check_finite": False}
    plain = sampler(shape, hoist=False, **arguments)
    assert relative(sampler(shape, **arguments), plain) < 2e-5
    model.hoist_times = lambda times, cond: type(model).hoist_times(model, times.flip(0), cond)
    assert relative(sampler(shape, **arguments), plain) > 1e-4
