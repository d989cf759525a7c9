"""diffusers' DiT: transformer blocks modulated by time and label, and the model as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from pydiff.optimize.diffusers.transformers import (
    assign_modulations,
    gated_add,
    gated_norm,
    hoistable_norms,
    modulated,
    unpatchified,
)
from pydiff.optimize.hoisting import Hoistable, gathered, own_columns
from pydiff.optimize.parts import layer_norm_of
from pydiff.optimize.swap import Rule


def ada_norm_zero_forward(
    block: Any,
    x: Tensor,
    mask: Tensor | None = None,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    timestep: Any = None,
    class_labels: Any = None,
) -> Tensor:
    """BasicTransformerBlock with norm_type "ada_norm_zero" on tokens x [B, L, C].

    `timestep` [B] goes through the block's own embedding, or is every block's hoisted modulation [B, width].
    """
    y, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
    y = block.attn1(y, context if block.only_cross_attention else None, mask)
    if block.attn2 is not None:
        x = gated_add(y, x, gate)
        y, gate = block.attn2(layer_norm_of(block.norm2, x)[0], context, context_mask), None
    y, x = gated_norm(block.norm3, y, x, gate, scale_mlp, shift_mlp)
    return gated_add(block.ff(y), x, gate_mlp)


def ada_norm_single_forward(
    block: Any,
    x: Tensor,
    mask: Tensor | None = None,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    timestep: Any = None,
    class_labels: Any = None,
) -> Tensor:
    """BasicTransformerBlock with norm_type "ada_norm_single" (PixArt) on tokens x [B, L, C], timestep [B, 6 * C]."""
    modulations = block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulations.chunk(6, dim=1)
    y = block.attn1(modulated(block.norm1, x, scale, shift), context if block.only_cross_attention else None, mask)
    if block.attn2 is not None:
        x = gated_add(y, x, gate)
        y, gate = block.attn2(x, context, context_mask), None
    y, x = gated_norm(block.norm2, y, x, gate, scale_mlp, shift_mlp)
    return gated_add(block.ff(y), x, gate_mlp)


ADAPTIVE: dict[str, Callable[..., Tensor]] = {
    "ada_norm_zero": ada_norm_zero_forward,
    "ada_norm_single": ada_norm_single_forward,
}


class FusedDiTTransformer2DModel(Hoistable):
    """DiT: `forward` is the original's, around fused blocks; a block's embedding of time and label can be hoisted."""

    hoisted_arguments = ("class_labels",)

    def hoist_times(self: Any, times: Tensor, cond: Mapping[str, Any]) -> Tensor:
        norms, total = hoistable_norms(self)
        labels = cond.get("class_labels")
        if labels is None:
            raise ValueError("cond must hold class_labels (one a row) for a DiT, got None")
        embeddings = [norm.emb(times, labels, hidden_dtype=self.dtype) for norm in norms]
        parts = [norm.project(embedding) for norm, embedding in zip(norms, embeddings)]
        return gathered([*parts, self.proj_out_1(nn.functional.silu(embeddings[0]))], total)

    def hoisted_forward(self: Any, x: Tensor, embedding: Tensor, cond: Mapping[str, Any]) -> Tensor:
        tokens = self.pos_embed(x).contiguous()
        for block in self.transformer_blocks:
            tokens = block(tokens, timestep=embedding)
        shift, scale = own_columns(self._pydiff_modulation, embedding).chunk(2, dim=1)  # type: ignore[union-attr]
        tokens = self.proj_out_2(modulated(self.norm_out, tokens, scale, shift))
        side = int(tokens.shape[1] ** 0.5)  # as the original has it: DiT's images are square
        return unpatchified(tokens, side, side, self.patch_size)


def _prepare(model: Any) -> None:
    assign_modulations(model, [block.norm1 for block in model.transformer_blocks], model.inner_dim, 2 * model.inner_dim)


RULES = (
    Rule(
        ("diffusers.models.transformers.dit_transformer_2d.DiTTransformer2DModel",),
        FusedDiTTransformer2DModel,
        "time and label embeddings of every block can be hoisted",
        prepare=_prepare,
    ),
)
