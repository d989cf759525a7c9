"""What can be done for modules that no rule knows: norms, norm-activation pairs, torch's attention.

A GroupNorm and the SiLU that follows it become one operation where that is provable:

- in an nn.Sequential, when the Sequential is called as a whole (its layers called one by one stay what they are);
- in a module whose forward has no branches and, traced with torch.fx, hands the norm's output to the SiLU and to
  nothing else. While that forward runs, and only then, the norm applies both and the SiLU passes through; both
  decisions are made once, before it runs, so that they cannot differ.

Any other GroupNorm or LayerNorm becomes the fused operation of its own, and nn.MultiheadAttention takes the attention
backend measured fastest. A function cannot be replaced by replacing classes: ``F.silu`` after a norm, and
``F.scaled_dot_product_attention``, are left and reported.
"""

from __future__ import annotations

import collections
import copy
import dis
import functools
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pydiff.ops.attention import attention
from pydiff.ops.group_norm import group_norm
from pydiff.ops.layer_norm import layer_norm
from pydiff.optimize.parts import plain_weight, unhooked
from pydiff.optimize.report import Entry
from pydiff.optimize.swap import Fused, Rule, is_fused, ready, refusal

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_running = threading.local()  # .folded: ids of the norms and activations folded by the forwards on this thread's stack


def _folded(module: nn.Module) -> bool:
    return id(module) in getattr(_running, "folded", ())


class FusedGroupNorm(Fused):
    """nn.GroupNorm in one kernel, with the SiLU after it where a `FusedPairs` says so."""

    def forward(self: Any, x: Tensor) -> Any:
        """x [N, C, *spatial]."""
        if not torch.compiler.is_compiling() and _folded(self):
            return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, activation="silu")
        if x.ndim < 2 or not plain_weight(self.weight) or not ready(self, x):
            return super().forward(x)
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class FoldedActivation(Fused):
    """The SiLU after a norm that applies it, in whose place it returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape."""
        if not torch.compiler.is_compiling() and _folded(self):
            return x
        return super().forward(x)


class FusedLayerNorm(Fused):
    """nn.LayerNorm over the last dimension, in one kernel."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x [..., C]."""
        if x.ndim < 2 or not plain_weight(self.weight) or not ready(self, x):
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, self.eps)


class FusedSequential(Fused):
    """A Sequential whose GroupNorms take the SiLU behind them along."""

    def forward(self: Any, x: Any) -> Any:
        """What the layers make of x, one after the other."""
        if not isinstance(x, Tensor) or not ready(self, x):
            return super().forward(x)
        layers, i = list(self._modules.values()), 0
        while i < len(layers):
            if _is_pair(layers[i : i + 2]):
                norm, i = layers[i], i + 2
                x = group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation="silu")
            else:
                x, i = layers[i](x), i + 1
        return x


def _kind(module: nn.Module) -> type[nn.Module]:
    return module._original if isinstance(module, Fused) else type(module)


def _is_pair(layers: list[Any]) -> bool:
    """Whether these are a GroupNorm and a SiLU that no one watches."""
    return (
        len(layers) == 2
        and _kind(layers[0]) is nn.GroupNorm
        and _kind(layers[1]) is nn.SiLU
        and all(map(unhooked, layers))
        and plain_weight(layers[0].weight)
        and all(layer._compiled_call_impl is None for layer in layers)
    )


class FusedPairs(Fused):
    """A module of any class whose GroupNorms take along the SiLU that follows; `_pydiff_pairs` are their names."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The original's forward, its pairs folded while it runs."""
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if first is None or torch.compiler.is_compiling() or not ready(self, first):
            return super().forward(*args, **kwargs)  # a compiler fuses the two by itself
        before: frozenset[int] = getattr(_running, "folded", frozenset())
        _running.folded = before | frozenset(self._pairs_now())
        try:
            if "torch._dynamo" in sys.modules:  # without which nothing is compiled
                return _eagerly()(super().forward, *args, **kwargs)
            return super().forward(*args, **kwargs)
        finally:
            _running.folded = before

    def _pairs_now(self: Any) -> Iterator[int]:
        """The ids of the norms and activations that are still what they were when the forward was traced."""
        for names in self._pydiff_pairs:
            norm, activation = (self.get_submodule(name) for name in names)
            swapped = isinstance(norm, FusedGroupNorm) and isinstance(activation, FoldedActivation)
            if swapped and _is_pair([norm, activation]) and not norm.training:
                yield id(norm)
                yield id(activation)


@functools.cache
def _eagerly() -> Callable[..., Any]:
    """Calls a function with nothing in it compiled: of a pair, either both parts know that they are folded or none."""
    return torch.compiler.disable(lambda function, *args, **kwargs: function(*args, **kwargs))


class FusedMultiheadAttention(Fused):
    """nn.MultiheadAttention in the backend measured fastest, where no weights and no attention mask are asked for."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, L, C], key and value [B, T, C], key_padding_mask [B, T]; the attended tokens and the weights."""
        simple = not need_weights and attn_mask is None and not is_causal and query.ndim == 3 and self._plain()
        mask = key_padding_mask
        if not simple or not (mask is None or mask.dtype in (torch.bool, query.dtype)) or not ready(self, query):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in self._projections(query, key, value))
        if mask is not None:
            mask = (~mask if mask.dtype == torch.bool else mask)[:, None, None, :]
        out = attention(q, k, v, mask=mask).transpose(1, 2).flatten(2)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), None

    def _projections(self: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, dim=-1)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(*layer) for layer in zip((query, key, value), weight.chunk(3), biases))

    def _plain(self: Any) -> bool:
        return plain_weight(self.in_proj_weight) and plain_weight(self.out_proj.weight) and unhooked(self.out_proj)


def _refuse_attention(module: Any) -> str | None:
    if not module.batch_first or not module._qkv_same_embed_dim:
        return "its batch is not first, or its keys and values have other widths than its queries"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys and values of its own (add_bias_kv, add_zero_attn)"
    return None


NORM = Rule(("GroupNorm",), FusedGroupNorm, "one kernel that reads channels-last images")
LAYER_NORM = Rule(("LayerNorm",), FusedLayerNorm, "one kernel")
SILU = Rule(("SiLU",), FoldedActivation, "applied by the norm before it")
SEQUENTIAL = Rule(("Sequential",), FusedSequential, "GroupNorm+SiLU as one operation")
PAIRS = Rule(("",), FusedPairs, "GroupNorm+SiLU as one operation while its forward runs")
ATTENTION = Rule(
    ("MultiheadAttention",),
    FusedMultiheadAttention,
    "the fastest attention backend where no weights and masks are asked for",
    _refuse_attention,
)


Pairs = tuple[tuple[str, str], ...]


class Swaps(NamedTuple):
    """Modules by name with the rules that replace them, and what was seen that no rule takes."""

    chosen: list[tuple[str, nn.Module, Rule]]
    """Names, modules and their rules."""
    left: list[Entry]
    """What was seen and is left, and why."""


def plan(model: nn.Module, already: set[int]) -> Swaps:
    """What to swap in the parts of a model that no rule knows, and what was seen and is left.

    Args:
        already: ids of the modules that rules of a family replace. The layers that such a module owns, directly or in a
            container, are its own affair.
    """
    chosen: list[tuple[str, nn.Module, Rule]] = []
    left: list[Entry] = []
    owned = set(_owned(model, already))
    free = {
        m: name
        for name, m in model.named_modules()
        if not (id(m) in already or is_fused(m) or (id(m) in owned and _is_layer(m)))
    }
    places = Counter(m for _, m in model.named_modules(remove_duplicate=False))
    foldable = {m for m in free if places[m] == 1 and not refusal(m)}
    folded: set[nn.Module] = set()
    for module, name in free.items():
        names, reasons = _pairs(module, foldable)
        left += [Entry(name, type(module).__name__, reason) for reason in reasons]
        if names:
            chosen.append((name, module, PAIRS._replace(prepare=functools.partial(_remember, names=names))))
            folded |= {module.get_submodule(activation) for _, activation in names}
    for module, name in free.items():
        rule = SILU if module in folded else _rule(module)
        reason = None if rule is None else refusal(module) or rule.refuse(module)
        if reason:
            left.append(Entry(name, type(module).__name__, reason))
        elif rule is not None:
            chosen.append((name, module, rule))
    return Swaps(chosen, left)


def _remember(module: nn.Module, names: Pairs) -> None:
    object.__setattr__(module, "_pydiff_pairs", names)


def _owned(model: nn.Module, already: set[int]) -> Iterator[int]:
    """Ids of what fused modules may use otherwise than by calling it: all that is in them.

    Of the whole model, if that is fused: its layers and those of its parts, but not what is deeper in unknown parts.
    """
    for owner in model.modules():
        if owner is not model and (id(owner) in already or is_fused(owner)):
            yield from map(id, owner.modules())
    if id(model) in already or is_fused(model):
        for part in _own_layers(model):
            yield id(part)
            yield from map(id, _own_layers(part))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, CONTAINERS) or type(module).__module__.startswith("torch.nn.")


def _rule(module: Any) -> Rule | None:
    kind = type(module)
    if kind is nn.GroupNorm:
        return NORM
    if kind is nn.LayerNorm and len(module.normalized_shape) == 1:
        return LAYER_NORM
    if kind is nn.MultiheadAttention:
        return ATTENTION
    if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
        layers = list(module.children())
        if any(type(a) is nn.GroupNorm and type(b) is nn.SiLU for a, b in zip(layers, layers[1:])):
            return SEQUENTIAL
    return None


def _pairs(module: nn.Module, foldable: set[nn.Module]) -> tuple[Pairs, list[str]]:
    """The (norm, activation) names that a module's forward runs one after the other, and what it has that is left."""
    kind: Any = type(module)
    code = getattr(kind.forward, "__code__", None)
    if _is_layer(module) or code is None or refusal(module):
        return (), []
    left = (
        ["its scaled_dot_product_attention is a function call, which no class replaces"]
        if "scaled_dot_product_attention" in code.co_names
        else []
    )
    own = list(_own_layers(module))
    if not any(type(m) is nn.GroupNorm for m in own) or not ("silu" in code.co_names or nn.SiLU in map(type, own)):
        return (), left
    if _branches(kind.forward, kind, set()):
        return (), [*left, "its forward has branches, loops or effects, so that what follows a norm may change"]
    try:
        graph = _traced(module)
    except Exception as error:  # whatever a forward does to what is no tensor
        return (), [*left, f"its forward cannot be traced, so that what follows a norm is not known ({error})"]
    pairs, more = _pairs_in(graph, module, foldable)
    return pairs, left + more


def _own_layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield child
        if isinstance(child, CONTAINERS):
            yield from _own_layers(child)


EFFECTS = ("FOR_", "SEND", "STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "STORE_DEREF", "DELETE_", "YIELD")


def _branches(function: Any, kind: type, seen: set[Any]) -> bool:
    """Whether a function, or one it calls, decides anything or changes objects: one trace would not tell all then."""
    if function in seen:
        return False
    seen.add(function)
    if function.__closure__:  # decorated, or calls super()
        return True
    codes, k = [function.__code__], 0
    while k < len(codes):
        if any("JUMP" in i.opname or i.opname.startswith(EFFECTS) for i in dis.get_instructions(codes[k])):
            return True
        codes += [constant for constant in codes[k].co_consts if isinstance(constant, types.CodeType)]
        k += 1
    for name in {name for code in codes for name in code.co_names}:
        for called in (getattr(kind, name, None), function.__globals__.get(name)):
            known = getattr(called, "__module__", "") or ""
            own = isinstance(called, types.FunctionType) and not known.startswith("torch.")
            if own and _branches(called, kind, seen):
                return True
    return False


def _traced(module: nn.Module) -> fx.Graph:
    """What a module's own forward does, found out without leaving a trace: in its lists, buffers and generators."""
    twin = object.__new__(type(module))
    containers = (list, dict, set, collections.deque)
    twin.__dict__ = {k: copy.copy(v) if isinstance(v, containers) else v for k, v in vars(module).items()}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        return _Tracer().trace(twin)


class _Tracer(fx.Tracer):
    """Follows a module's own forward and no further."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _pairs_in(graph: fx.Graph, module: nn.Module, foldable: set[nn.Module]) -> tuple[Pairs, list[str]]:
    calls = {n: module.get_submodule(n.target) for n in graph.nodes if n.op == "call_module"}
    times = Counter(calls.values())
    pairs, left = [], []
    for node, norm in calls.items():
        if type(norm) is not nn.GroupNorm or len(node.users) != 1:
            continue
        (user,) = node.users
        if user.op == "call_function" and user.target is F.silu:
            left.append(f"the SiLU after its {node.target} is a function call, which no class replaces")
        activation = calls.get(user)
        if type(activation) is not nn.SiLU:
            continue
        if times[norm] > 1 or times[activation] > 1 or not {norm, activation} <= foldable:
            left.append(f"its {node.target} or {user.target} is used elsewhere too")
        else:
            pairs.append((node.target, user.target))
    return tuple(pairs), left
