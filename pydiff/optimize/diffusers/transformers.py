"""What diffusers' diffusion transformers share: adaptive norms, gated residuals, feed-forwards, QKV projections.

An adaptive norm is one operation (LayerNorm, scale, shift), and so is the gated residual with the adaptive norm that
reads it. The projection of the embedding that gives scale, shift and gate can be hoisted: a norm that is handed every
norm's projections side by side takes its own columns. The tanh-GELU of a feed-forward sits in the epilogue of its
product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydiff.ops.layer_norm import layer_norm
from pydiff.ops.residual import residual_add
from pydiff.ops.rms_norm import qk_norm_rotary
from pydiff.optimize.hoisting import CannotHoist, assign, gathered, own_columns
from pydiff.optimize.parts import is_plain, packed, plain_weight, unhooked
from pydiff.optimize.swap import Fused, Rule, ready


def _rows(modulation: Tensor) -> Tensor:
    """[B, C] or [B, 1, C] as [B, 1, C], to be broadcast over tokens."""
    return modulation if modulation.ndim == 3 else modulation[:, None]


def modulated(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift for tokens x [B, L, C], scale and shift [B, C]."""
    n: Any = norm
    if is_plain(norm, nn.LayerNorm) and len(n.normalized_shape) == 1:
        return layer_norm(x, n.weight, n.bias, n.eps, scale=scale, shift=shift)
    return norm(x) * (1 + _rows(scale)) + _rows(shift)


def gated_norm(
    norm: nn.Module, x: Tensor, residual: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """(norm(s) * (1 + scale) + shift, s) with s = residual + gate * x; modulations [B, C]."""
    n: Any = norm
    if is_plain(norm, nn.LayerNorm) and len(n.normalized_shape) == 1 and x.dtype == residual.dtype:
        return layer_norm(x, n.weight, n.bias, n.eps, residual=residual, gate=gate, scale=scale, shift=shift)
    s = residual + (x if gate is None else _rows(gate) * x)
    return norm(s) * (1 + _rows(scale)) + _rows(shift), s


def gated_add(x: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    """residual + gate * x for tokens [B, L, C] and a gate [B, C]."""
    if x.dtype != residual.dtype:
        return residual + _rows(gate) * x
    return residual_add(x, residual, gate=gate, channel_dim=-1)


class _FusedAdaptiveNorm(Fused):
    """LayerNorm whose scale and shift, and gates for others, are a projection of the embedding [B, E]."""

    parts: int
    """Modulations [B, C] in the projection."""

    def _modulation(self: Any, embedding: Any) -> Tensor | None:
        """This norm's columns where `embedding` is every norm's projection side by side."""
        wide = isinstance(embedding, Tensor) and embedding.ndim == 2
        return own_columns(vars(self).get("_pydiff_modulation"), embedding) if wide else None

    def project(self: Any, embedding: Tensor) -> Tensor:
        """The modulation [B, n * C] of an embedding [B, E]."""
        return self.linear(self.silu(embedding))


class FusedAdaLayerNormZero(_FusedAdaptiveNorm):
    """AdaLayerNormZero, whose projection gives shift, scale and four for others."""

    parts = 6

    def forward(
        self: Any,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Tokens x [B, L, C]; timestep and class_labels [B], or their embedding emb [B, E], may be hoisted.

        Returns the normed tokens and four modulations [B, C]: gate, and shift, scale and gate of the feed-forward.
        """
        columns = self._modulation(emb if self.emb is None else timestep)
        if columns is None:
            if not ready(self, x):
                return super().forward(x, timestep, class_labels, hidden_dtype, emb)
            embedding = emb if self.emb is None else self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
            columns = self.project(embedding)
        shift, scale, *others = columns.chunk(self.parts, dim=1)
        return modulated(self.norm, x, scale, shift), *others


class FusedAdaLayerNormZeroSingle(_FusedAdaptiveNorm):
    """AdaLayerNormZeroSingle, whose projection gives shift, scale and a gate."""

    parts = 3

    def forward(self: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens x [B, L, C], emb [B, E] or hoisted; the normed tokens and the gate [B, C]."""
        columns = self._modulation(emb)
        if columns is None:
            if not ready(self, x):
                return super().forward(x, emb)
            columns = self.project(emb)
        shift, scale, gate = columns.chunk(self.parts, dim=1)
        return modulated(self.norm, x, scale, shift), gate


class FusedSD35AdaLayerNormZeroX(_FusedAdaptiveNorm):
    """SD35AdaLayerNormZeroX: one norm modulated twice, for the two attentions of a block."""

    parts = 9

    def forward(self: Any, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        """Tokens hidden_states [B, L, C], emb [B, E] or hoisted.

        Returns the normed tokens, gate, shift, scale and gate of the feed-forward, the tokens for the second attention,
        its gate.
        """
        columns = self._modulation(emb)
        if columns is None:
            if not ready(self, hidden_states):
                return super().forward(hidden_states, emb)
            columns = self.project(emb)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = columns.chunk(self.parts, dim=1)
        if is_plain(self.norm, nn.LayerNorm):
            first, second = (modulated(self.norm, hidden_states, a, b) for a, b in ((scale, shift), (scale2, shift2)))
        else:  # called once, as its hooks and wrappers expect
            normed = self.norm(hidden_states)
            first, second = (normed * (1 + a[:, None]) + b[:, None] for a, b in ((scale, shift), (scale2, shift2)))
        return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2


class FusedAdaLayerNormContinuous(_FusedAdaptiveNorm):
    """AdaLayerNormContinuous, the last norm: scale and shift alone."""

    parts = 2

    def forward(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """Tokens x [B, L, C], conditioning_embedding [B, E] or hoisted."""
        columns = self._modulation(conditioning_embedding)
        if columns is None:
            if not ready(self, x):
                return super().forward(x, conditioning_embedding)
            columns = self.linear(self.silu(conditioning_embedding).to(x.dtype))
        scale, shift = columns.chunk(self.parts, dim=1)
        return modulated(self.norm, x, scale, shift)


def assign_modulations(model: nn.Module, norms: Sequence[Any], channels: int, last: int = 0) -> None:
    """Give every adaptive norm of tokens [B, L, channels] its columns of the hoisted table, the model the `last` ones.

    Nothing is given, and the model cannot be hoisted, where one of the norms was left as it was.
    """
    if not all(isinstance(norm, _FusedAdaptiveNorm) for norm in norms):
        return
    widths = [norm.parts * channels for norm in norms]
    owners: list[nn.Module] = [*norms, model] if last else list(norms)
    total = assign("_pydiff_modulation", owners, [*widths, last], (channels,))
    object.__setattr__(model, "_pydiff_modulations", (list(norms), total))


def hoistable_norms(model: nn.Module) -> tuple[list[Any], int]:
    """The norms that have columns, and the table's width. Raises CannotHoist if some norm has none."""
    known = vars(model).get("_pydiff_modulations")
    if known is None:
        raise CannotHoist(
            f"some adaptive norms of {type(model).__name__} were not optimised; optimize(model, report=True) says why"
        )
    return known


def project_modulations(model: nn.Module, embedding: Tensor) -> Tensor:
    """The embedding [N, E] as every adaptive norm projects it, [N, width]."""
    norms, total = hoistable_norms(model)
    return gathered([norm.project(embedding) for norm in norms], total)


def unpatchified(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Tokens [B, height * width, patch * patch * C] as an image [B, C, height * patch, width * patch]."""
    image = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width)).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(image.shape[0], image.shape[1], height * patch, width * patch)


def linear_gelu(proj: nn.Module, x: Tensor) -> Tensor:
    """Linear and tanh-GELU of [..., C], in one kernel on a CUDA device.

    torch's `_addmm_activation` is the tanh-GELU in the epilogue on CUDA, but the exact GELU on a CPU: elsewhere than on
    CUDA the two operations are apart.
    """
    p: Any = proj
    grad = torch.is_grad_enabled() and x.requires_grad  # through the text alone; the operation has no derivative
    fast = x.device.type == "cuda" and not grad and is_plain(proj, nn.Linear)
    if not fast or p.bias is None or p.weight.dtype != x.dtype:
        return F.gelu(proj(x), approximate="tanh")
    y = torch.ops.aten._addmm_activation(p.bias, x.reshape(-1, x.shape[-1]), p.weight.t(), use_gelu=True)
    return y.view(*x.shape[:-1], -1)


class FusedGELU(Fused):
    """A linear layer and tanh-GELU, which sits in the epilogue of the product."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., in] -> [..., out]."""
        if not ready(self, hidden_states) or self.approximate != "tanh":
            return super().forward(hidden_states)
        return linear_gelu(self.proj, hidden_states)


def _refuse_gelu(module: Any) -> str | None:
    return None if module.approximate == "tanh" else "its GELU is exact, and the one in a product's epilogue is not"


class HeadNorm(NamedTuple):
    """RMSNorm of the heads as `qk_norm_rotary` takes it."""

    weight: Tensor
    """[D], one for each channel of a head."""
    eps: float
    """What is added to the mean square."""


RMS_NORMS = ("torch.nn.modules.normalization.RMSNorm", "diffusers.models.normalization.RMSNorm")


def head_norm(norm: Any) -> HeadNorm | None:
    """The RMSNorm (torch's or diffusers') that a module is, or None if it is something else, hooked or wrapped."""
    cls = getattr(norm, "_original", type(norm))
    if f"{cls.__module__}.{cls.__qualname__}" not in RMS_NORMS or not unhooked(norm) or norm.eps is None:
        return None
    plain = norm.weight is not None and norm.weight.ndim == 1 and plain_weight(norm.weight)
    return HeadNorm(norm.weight, norm.eps) if plain and getattr(norm, "bias", None) is None else None


Rotary = tuple[Tensor, Tensor] | None


def normed_heads(
    q: Tensor, k: Tensor, norm_q: Any, norm_k: Any, rotary: Rotary = None, *, heads_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, L, H, D] with their norms (modules or None), and turned by (cos, sin) [L, D].

    A norm that has to be called as a module gets [B, H, L, D] where the original model gives it that: `heads_first`.
    """
    cos, sin = (None, None) if rotary is None else (t.to(q.device) for t in rotary)
    first, second = head_norm(norm_q), head_norm(norm_k)
    if first is not None and second is not None and first.eps == second.eps:
        return qk_norm_rotary(q, k, first.weight, second.weight, cos, sin, eps=first.eps)
    q, k = (
        x if norm is None else norm(x.transpose(1, 2)).transpose(1, 2) if heads_first else norm(x)
        for x, norm in ((q, norm_q), (k, norm_k))
    )
    return (q, k) if cos is None else qk_norm_rotary(q, k, None, None, cos, sin)


def projected(owner: nn.Module, name: str, layers: Sequence[Any], x: Tensor) -> Tensor | None:
    """What several linear layers make of x [B, L, C], side by side, by one product; None if they cannot be packed.

    `name` tells the packs of one owner apart.
    """
    together = packed(owner, layers, name)
    return None if together is None else F.linear(x, *together)


def heads_of(together: Tensor | None, layers: Sequence[Any], x: Tensor, width: int) -> tuple[Tensor, ...]:
    """What each layer makes of x [B, L, C], as heads [B, L, H, width]: views of `together` where there is such."""
    each = [layer(x) for layer in layers] if together is None else together.chunk(len(layers), dim=-1)
    return tuple(t.unflatten(2, (-1, width)) for t in each)


_NORMS = "diffusers.models.normalization"
_WHAT = "LayerNorm, scale and shift in one operation"
RULES = (
    Rule((f"{_NORMS}.AdaLayerNormZero",), FusedAdaLayerNormZero, _WHAT),
    Rule((f"{_NORMS}.AdaLayerNormZeroSingle",), FusedAdaLayerNormZeroSingle, _WHAT),
    Rule((f"{_NORMS}.SD35AdaLayerNormZeroX",), FusedSD35AdaLayerNormZeroX, _WHAT),
    Rule((f"{_NORMS}.AdaLayerNormContinuous",), FusedAdaLayerNormContinuous, _WHAT),
    Rule(("diffusers.models.activations.GELU",), FusedGELU, "GELU in the epilogue of its matrix product", _refuse_gelu),
)
