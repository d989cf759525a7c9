"""What the fused forwards are made of: a layer called in its fast form where it is the plain layer of torch that it was
when the model was optimised, and as the module that it is where not (a hook, a LoRA wrapper, quantised weights)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydiff.ops.group_norm import group_norm
from pydiff.ops.layer_norm import layer_norm
from pydiff.optimize.swap import PACKED

ACTIVATIONS: dict[type[nn.Module], str] = {nn.SiLU: "silu"}


def unhooked(module: nn.Module) -> bool:
    """Whether calling a module is calling its forward and no more."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or module._compiled_call_impl is not None
    )


def is_plain(module: Any, cls: type[nn.Module]) -> bool:
    """Whether a module is exactly the torch layer `cls`, unhooked, with floating-point weights of torch's own kind."""
    return type(module) is cls and unhooked(module) and plain_weight(module._parameters.get("weight"))


def plain_weight(weight: Tensor | None) -> bool:
    """False for a quantised or distributed tensor, which only its own operations understand."""
    if weight is None:
        return True
    if type(weight) is nn.Parameter:  # the usual case, answered quickly
        return weight.is_floating_point()
    ordinary = type(weight) in (nn.Parameter, Tensor) or not hasattr(weight, "__tensor_flatten__")
    return ordinary and weight.is_floating_point() and not weight.is_quantized


def activation_name(activation: nn.Module | None) -> str | None:
    """The name `group_norm` knows an activation module by; None where it knows none."""
    return ACTIVATIONS.get(type(activation)) if activation is not None and unhooked(activation) else None


def norm_act(
    norm: nn.Module,
    activation: nn.Module | None,
    x: Tensor,
    *,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """GroupNorm of [x; x2] + add, adaptive scale and shift [N, C], activation, as `pydiff.ops.group_norm` has them."""
    name = activation_name(activation)
    if is_plain(norm, nn.GroupNorm) and (activation is None or name):
        norm_any: Any = norm
        y = group_norm(
            x,
            norm_any.num_groups,
            norm_any.weight,
            norm_any.bias,
            norm_any.eps,
            activation=name,
            x2=x2,
            add=add,
            scale=scale,
            shift=shift,
        )
        assert isinstance(y, Tensor)  # a pair only where a residual is given
        return y
    x = cat(x, x2)
    if add is not None:
        x = x + add.reshape(*add.shape, *([1] * (x.ndim - 2))).to(x.dtype)
    x = norm(x)
    if scale is not None and shift is not None:
        x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return x if activation is None else activation(x)


def convolution(conv: nn.Module, x: Tensor, *, split: bool | None = None) -> tuple[Tensor, Tensor | None]:
    """A convolution and the bias that is still to be added to its result, where that can be left to the next kernel.

    cuDNN's convolution has no bias in torch: eager adds it in a kernel of its own. `split`: leave the bias out wherever
    the layer is plain; by default on CUDA devices alone.
    """
    c: Any = conv
    split = x.device.type == "cuda" if split is None else split
    if not split or not is_plain(conv, nn.Conv2d) or c.padding_mode != "zeros" or c.bias is None:
        return conv(x), None
    return F.conv2d(x, c.weight, None, c.stride, c.padding, c.dilation, c.groups), c.bias


def pointwise(conv: nn.Module, x: Tensor, x2: Tensor | None = None) -> Tensor:
    """A 1x1 convolution of [x; x2] as a matrix product over channels-last pixels, the concatenation never made."""
    c: Any = conv
    plain = is_plain(conv, nn.Conv2d) and c.kernel_size == (1, 1) and c.stride == (1, 1) and c.groups == 1
    if not (plain and is_nhwc(x) and c.padding in ((0, 0), 0)):
        return conv(cat(x, x2))
    return product_of_pixels(x, x2, c.weight.flatten(1), c.bias)


def product_of_pixels(x: Tensor, x2: Tensor | None, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight [O, C] times every pixel of the channels-last [x; x2], the concatenation never made."""
    y = F.linear(x.permute(0, 2, 3, 1), weight[:, : x.shape[1]], bias)
    if x2 is not None:
        rows = x2.permute(0, 2, 3, 1).reshape(-1, x2.shape[1])
        y.view(-1, y.shape[-1]).addmm_(rows, weight[:, x.shape[1] :].t())
    return y.permute(0, 3, 1, 2)


def cat(x: Tensor, x2: Tensor | None) -> Tensor:
    """[x; x2] along the channels, or x where there is no second."""
    return x if x2 is None else torch.cat([x, x2], dim=1)


def is_plain_3x3(conv: Any) -> bool:
    """Whether a module is a plain 3x3 convolution that keeps the size."""
    return (
        is_plain(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.groups == 1
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
    )


def is_nhwc(x: Tensor) -> bool:
    """Whether x is a channels-last image [N, C, H, W]."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def layer_norm_of(
    norm: nn.Module, x: Tensor, residual: Tensor | None = None, total_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(norm(s), s + total_bias) with s = x + residual, or x where there is no residual."""
    n: Any = norm
    if not is_plain(norm, nn.LayerNorm) or len(n.normalized_shape) != 1:
        s = x if residual is None else x + residual
        return norm(s), s if total_bias is None else s + total_bias
    if residual is None:
        return layer_norm(x, n.weight, n.bias, n.eps), x
    return layer_norm(x, n.weight, n.bias, n.eps, residual=residual, total_bias=total_bias)


def packed(owner: nn.Module, layers: Sequence[Any], name: str = "") -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of several linear layers of one input as one matrix, or None where they cannot be.

    `name` tells several packs of one owner apart. The layers' parameters become views of one storage (their values,
    names and identity stay), so that what is written into them is what the matrix holds. A parameter that has since got
    other storage (`.to`, `load_state_dict` with assign, ``.data = ...``) is noticed, and they are packed anew. Not
    while compiling: a traced graph could not notice.
    """
    if torch.compiler.is_compiling() or not all(is_plain(layer, nn.Linear) for layer in layers):
        return None
    if not all(_packable(p) for layer in layers for p in (layer.weight, layer.bias)):
        return None
    first = layers[0]
    if any(
        (x.bias is None) != (first.bias is None)
        or x.weight.dtype != first.weight.dtype
        or x.weight.device != first.weight.device
        for x in layers
    ):
        return None
    weight = _packed_parameter(owner, f"{PACKED}_{name}_weight", [layer.weight for layer in layers])
    if first.bias is None:
        return weight, None
    return weight, _packed_parameter(owner, f"{PACKED}_{name}_bias", [layer.bias for layer in layers])


def _packable(parameter: Tensor | None) -> bool:
    """False for a tensor that stands in for a parameter (functional_call), and for a layout that would be lost."""
    return parameter is None or (isinstance(parameter, nn.Parameter) and parameter.is_contiguous())


def _packed_parameter(owner: nn.Module, name: str, parameters: list[Tensor]) -> Tensor:
    whole = vars(owner).get(name)
    if whole is not None and _are_views(whole, parameters):
        return whole
    with torch.inference_mode(False), torch.no_grad():  # a parameter stays one that can be trained
        whole = torch.cat([p.detach() for p in parameters])
        for parameter, view in zip(parameters, whole.split([p.shape[0] for p in parameters])):
            parameter.data = view
    object.__setattr__(owner, name, whole)
    return whole


def _are_views(whole: Tensor, parameters: list[Tensor]) -> bool:
    storage, offset = whole.untyped_storage()._cdata, 0
    for p in parameters:
        if p.untyped_storage()._cdata != storage or p.storage_offset() != offset or p.dtype != whole.dtype:
            return False
        offset += p.numel()
    return True
