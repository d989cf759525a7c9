"""GroupNorm and its neighbours in a U-Net block: what is added before, modulation and SiLU after, in one pass or two.

s = cat(x, x2) + add + residual                    [N, C, *spatial], the parts that are given
y = activation(norm(s) * weight + bias)            statistics of a group: all its channels and positions
y = activation((norm(s) * weight + bias) * (1 + scale) + shift)          with scale and shift
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydiff.ops import triton_ops

if TYPE_CHECKING:
    from pydiff.kernels.group_norm_tiling import Tiling

Output = Tensor | tuple[Tensor, Tensor]


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """[C] or [N, C] to [1 or N, C, 1, ...] in the dtype of `like`."""
    values = values if values.ndim == 2 else values[None]
    return values.to(like.dtype).reshape(*values.shape, *([1] * (like.ndim - 2)))


def group_norm_reference(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    activation: str | None = None, x2: Tensor | None = None, add: Tensor | None = None,
    residual: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
) -> Output:  # fmt: skip
    """The chain of torch operations that `group_norm` stands for, in the dtype of x; differentiable."""
    s = x if x2 is None else torch.cat((x, x2), 1)
    if add is not None:
        s = s + _per_channel(add, s)
    if residual is not None:
        s = s + residual
    weight = None if weight is None else weight.to(s.dtype)
    y = F.group_norm(s, num_groups, weight, None if bias is None else bias.to(s.dtype), eps)
    if scale is not None and shift is not None:
        y = y * (1 + _per_channel(scale, y)) + _per_channel(shift, y)
    if activation == "silu":
        y = F.silu(y)
    return y if residual is None else (y, s)


def _channels_last(x: Tensor) -> bool | None:
    """Whether x lies densely in memory with its channels innermost; False: outermost of a sample; None: neither."""
    if x.ndim == 2:
        return True if x.is_contiguous() else None
    if x.is_contiguous():
        return x.shape[2:].numel() == 1
    return True if x.movedim(1, -1).is_contiguous() else None


def _like(x: Tensor, channels: int, nhwc: bool) -> Tensor:
    """Uninitialised [N, channels, *spatial] with the layout and dtype of x."""
    if nhwc and x.ndim > 2:
        return torch.empty((x.shape[0], *x.shape[2:], channels), dtype=x.dtype, device=x.device).movedim(-1, 1)
    return torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device)


def _in_one_layout(
    x: Tensor, x2: Tensor | None, residual: Tensor | None
) -> tuple[bool, Tensor, Tensor | None, Tensor | None]:
    """Whether channels lie innermost, and the inputs so: in the layout of x, contiguous if x has neither."""
    nhwc = _channels_last(x)
    if nhwc is None:
        x, nhwc = x.contiguous(), x.ndim == 2
    x2, residual = (
        t if t is None or _channels_last(t) == nhwc else _like(t, t.shape[1], nhwc).copy_(t) for t in (x2, residual)
    )
    return nhwc, x, x2, residual


def _tiling(x: Tensor, x2: Tensor | None, num_groups: int, nhwc: bool) -> Tiling:
    from pydiff.kernels import group_norm_tiling

    samples, channels, *spatial = map(int, x.shape)
    more = 0 if x2 is None else int(x2.shape[1])
    numbers = (samples, channels, more, math.prod(spatial), int(num_groups), x.element_size())
    sizes = group_norm_tiling.Sizes(*numbers, nhwc)
    return group_norm_tiling.select(sizes, triton_ops.multiprocessors(x.device))


def _rows(values: Tensor | None) -> tuple[Tensor | None, int]:
    """Channel values with their channels side by side, and the distance between samples (0: the same for all)."""
    if values is None:
        return None, 0
    if values.stride(-1) != 1 and values.shape[-1] > 1:
        values = values.contiguous()
    return values, values.stride(0) if values.ndim == 2 and values.shape[0] > 1 else 0


def group_norm_kernel(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    activation: str | None = None, x2: Tensor | None = None, add: Tensor | None = None,
    residual: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
) -> Output:  # fmt: skip
    """`group_norm` by the Triton kernels, whatever the device."""
    from pydiff.kernels import group_norm as kernels

    nhwc, x, x2, residual = _in_one_layout(x, x2, residual)
    rows = map(_rows, (weight, bias, add, scale, shift))
    (weight, _), (bias, _), (add, add_stride), (scale, scale_stride), (shift, shift_stride) = rows
    channels1, channels2 = x.shape[1], 0 if x2 is None else x2.shape[1]
    channels, positions = channels1 + channels2, x.shape[2:].numel()
    tiling = _tiling(x, x2, num_groups, nhwc)
    silu = activation == "silu"
    y = _like(x, channels, nhwc)
    s = None if residual is None else _like(x, channels1, nhwc)
    if tiling.chunks == 0:
        triton_ops.launch(
            kernels.group_norm_fused_kernel, (tiling.programs,),
            x, x2, add, residual, s, y, weight, bias, scale, shift,
            positions, channels1, channels2, add_stride, scale_stride, shift_stride, eps,
            SILU=silu, **tiling.statistics,
        )  # fmt: skip
        return y if s is None else (y, s)
    shape = (x.shape[0], tiling.chunks, tiling.parts, 2, num_groups)
    parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    shared = (positions, channels1, channels2, num_groups, channels // num_groups, tiling.chunks)
    triton_ops.launch(
        kernels.group_norm_statistics_kernel, (tiling.programs,),
        x, x2, add, residual, s, parts, *shared, add_stride, **tiling.statistics,
    )  # fmt: skip
    if s is not None:  # the first kernel has added all
        x, add, add_stride = s, None, 0
    triton_ops.launch(
        kernels.group_norm_apply_kernel, (tiling.apply_programs,),
        x, x2, add, parts, y, weight, bias, scale, shift, *shared, add_stride, scale_stride, shift_stride, eps,
        SILU=silu, **tiling.apply,
    )  # fmt: skip
    return y if s is None else (y, s)


def can_use_group_norm(x: Tensor, *others: Tensor | None) -> triton_ops.Usable:
    """Whether the kernels run on x and the other tensors of a call, and if not, why."""
    return triton_ops.can_use("group_norm", x, *others)


def group_norm_launches(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    activation: str | None = None, x2: Tensor | None = None, add: Tensor | None = None,
    residual: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
) -> int:  # fmt: skip
    """How many kernels a call with these arguments launches where the Triton kernels run (copies of x aside)."""
    nhwc = _channels_last(x)
    return _tiling(x, x2, num_groups, x.ndim == 2 if nhwc is None else nhwc).launches


def _check_channels(name: str, values: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if values is None:
        return
    if tuple(values.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(values.shape)}")
    if not values.is_floating_point():
        raise ValueError(f"{name} must be a float tensor, got {values.dtype}; convert it with .float()")


def _check(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, activation: str | None,
    x2: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: Tensor | None, shift: Tensor | None,
) -> None:  # fmt: skip
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x must be a float tensor [N, C, *spatial], got {x.dtype} {tuple(x.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    if x2 is not None and residual is not None:
        raise ValueError("residual cannot be given together with x2; concatenate first and pass the result as x")
    if (scale is None) != (shift is None):
        raise ValueError(f"{'scale' if scale is None else 'shift'} is missing: give scale and shift together")
    for name, other in (("x2", x2), ("residual", residual)):
        if other is None:
            continue
        same = x.shape if name == "residual" else (x.shape[0], other.shape[1] if other.ndim > 1 else 0, *x.shape[2:])
        if tuple(other.shape) != tuple(same) or other.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} of shape {list(same)}, got {other.dtype} {list(other.shape)}")
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels, got {num_groups}")
    for name, values in (("weight", weight), ("bias", bias)):
        _check_channels(name, values, (channels,))
    _check_channels("add", add, (channels,), (x.shape[0], channels))
    for name, values in (("scale", scale), ("shift", shift)):
        _check_channels(name, values, (x.shape[0], channels))


_SIGNATURE = (
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, str? activation=None, "
    "Tensor? x2=None, Tensor? add=None, Tensor? residual=None, Tensor? scale=None, Tensor? shift=None)"
)
_group_norm = triton_ops.define(f"group_norm{_SIGNATURE} -> Tensor", group_norm_kernel, group_norm_reference)
_group_norm_residual = triton_ops.define(
    f"group_norm_residual{_SIGNATURE} -> (Tensor, Tensor)", group_norm_kernel, group_norm_reference
)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    activation: str | None = None, x2: Tensor | None = None, add: Tensor | None = None,
    residual: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
) -> Output:  # fmt: skip
    """GroupNorm of cat(x, x2) + add + residual, modulated and activated: see the module's docstring.

    Close to `group_norm_reference`: the error against float64 is at most twice that of the reference in the dtype of x,
    plus one ulp of the result. Statistics are float32 and merged as means and squared deviations, so that a mean far
    above the deviation costs nothing. Falls back to the reference, see `can_use_group_norm`.

    Args:
        x: [N, C, *spatial], any number of dimensions from 2; contiguous or with the channels innermost (channels_last),
            and made contiguous otherwise. The result has its layout and dtype.
        num_groups: divides all channels, those of x2 included.
        weight, bias: [channels], any float dtype.
        activation: None or "silu".
        x2: [N, C2, *spatial] in the dtype of x: more channels; the concatenation is never made.
        add: [N, channels] or [channels], any float dtype: added to all positions of a channel first, in float32.
        residual: like x, added too. The result is then (y, s), s the sum in the dtype of x, y the norm of that s.
        scale, shift: [N, channels], together: the norm is multiplied by 1 + scale, shift added.
    """
    _check(x, num_groups, weight, bias, activation, x2, add, residual, scale, shift)
    more: dict[str, Any] = {"activation": activation, "x2": x2, "add": add, "residual": residual}
    more |= {"scale": scale, "shift": shift}
    fast, reason = can_use_group_norm(x, weight, bias, x2, add, residual, scale, shift)
    if not fast:
        triton_ops.refused("group_norm", x, reason)
        return group_norm_reference(x, num_groups, weight, bias, eps, **more)
    if triton_ops.traced(x):
        op = _group_norm if residual is None else _group_norm_residual
        return op(x, num_groups, weight, bias, eps, **more)
    return group_norm_kernel(x, num_groups, weight, bias, eps, **more)
