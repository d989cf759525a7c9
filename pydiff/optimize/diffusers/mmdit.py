"""diffusers' Stable Diffusion 3 and 3.5: joint attention over image and text, the blocks around it, and hoisting.

Q, K and V of a stream come from one matrix product. Without norms of the heads the two streams' products are joined by
one concatenation, and Q, K, V are views of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pydiff.ops.attention import attention
from pydiff.optimize.diffusers.transformers import (
    assign_modulations,
    gated_add,
    gated_norm,
    heads_of,
    normed_heads,
    project_modulations,
    projected,
    unpatchified,
)
from pydiff.optimize.hoisting import Hoistable
from pydiff.optimize.swap import Fused, Rule, fused_class, ready, refusal

PROCESSOR = "JointAttnProcessor2_0"
CONDITION = ("encoder_hidden_states", "pooled_projections")


class FusedJointAttention(Fused):
    """diffusers' Attention with a JointAttnProcessor2_0."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Image tokens [B, L, C] and text tokens [B, T, C]: both attended, or the image's alone where there is no text.

        The processor ignores a mask.
        """
        if kwargs or attention_mask is not None or refuse_joint_attention(self) or not ready(self, hidden_states):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        q, k, v = (t.transpose(1, 2) for t in self._heads(hidden_states, encoder_hidden_states))
        out, length = attention(q, k, v).transpose(1, 2).flatten(2), hidden_states.shape[1]
        if encoder_hidden_states is None:
            return self.to_out[1](self.to_out[0](out))
        text = out[:, length:]
        if not self.context_pre_only:
            text = self.to_add_out(text.contiguous())
        return self.to_out[1](self.to_out[0](out[:, :length].contiguous())), text

    def _heads(self: Any, image: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        """Queries, keys and values [B, L + T, H, D], the image's tokens first."""
        width = self.inner_dim // self.heads
        own, added = (self.to_q, self.to_k, self.to_v), (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        of_image = projected(self, "own", own, image)
        if text is None:
            q, k, v = heads_of(of_image, own, image, width)
            return *normed_heads(q, k, self.norm_q, self.norm_k, heads_first=True), v
        of_text = projected(self, "added", added, text)
        normless = not any((self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k))
        if normless and of_image is not None and of_text is not None:
            return heads_of(torch.cat([of_image, of_text], dim=1), own, image, width)
        q, k, v = heads_of(of_image, own, image, width)
        q, k = normed_heads(q, k, self.norm_q, self.norm_k, heads_first=True)
        text_q, text_k, text_v = heads_of(of_text, added, text, width)
        text_q, text_k = normed_heads(text_q, text_k, self.norm_added_q, self.norm_added_k, heads_first=True)
        return torch.cat([q, text_q], 1), torch.cat([k, text_k], 1), torch.cat([v, text_v], 1)


def refuse_joint_attention(attn: Any) -> str | None:
    """Why a joint attention is left as it is, or None; asked at every call, for a processor can be set at any time."""
    if type(attn.processor).__name__ != PROCESSOR:
        return f"its processor is {type(attn.processor).__name__}, not {PROCESSOR}"
    if attn.inner_kv_dim != attn.inner_dim:
        return "its queries and keys differ in width"
    return None


class FusedJointTransformerBlock(Fused):
    """JointTransformerBlock: gates and residuals inside LayerNorm, its attention joint."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Image tokens [B, L, C], text tokens [B, T, C]; temb [B, E] or every norm's hoisted modulation."""
        if joint_attention_kwargs or not ready(self, hidden_states) or refuse_joint_block(self):
            return super().forward(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        x, text = hidden_states, encoder_hidden_states
        y, gate, shift, scale, gate_mlp, *dual = self.norm1(x, emb=temb)
        if self.context_pre_only:
            text_y, modulations = self.norm1_context(text, temb), []
        else:
            text_y, *modulations = self.norm1_context(text, emb=temb)
        y, text_y = self.attn(hidden_states=y, encoder_hidden_states=text_y)
        if dual:
            x = gated_add(y, x, gate)
            y, gate = self.attn2(hidden_states=dual[0]), dual[1]
        y, x = gated_norm(self.norm2, y, x, gate, scale, shift)
        x = gated_add(self.ff(y), x, gate_mlp)
        if self.context_pre_only:
            return None, x
        gate, shift, scale, gate_mlp = modulations
        y, text = gated_norm(self.norm2_context, text_y, text, gate, scale, shift)
        return gated_add(self.ff_context(y), text, gate_mlp), x


def refuse_joint_block(block: Any) -> str | None:
    """Why a JointTransformerBlock is left as it is, or None; asked at every call."""
    return None if block._chunk_size is None else "its feed-forward is chunked"


def _prepare_block(block: Any) -> None:
    """Attention has a rule of its own for the plain processors, so that a joint one is found from its block."""
    for attn in (block.attn, block.attn2):
        is_attention = type(attn).__qualname__ == "Attention" and not isinstance(attn, Fused)
        if is_attention and not (refusal(attn) or refuse_joint_attention(attn)):
            attn.__class__ = fused_class(FusedJointAttention, type(attn))


class FusedSD3Transformer2DModel(Hoistable):
    """SD3: `forward` is the original's, around fused blocks; every block's modulation and the text's embedding can be
    hoisted."""

    hoisted_arguments = CONDITION

    def hoist_times(self: Any, times: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return project_modulations(self, self.time_text_embed(times, cond["pooled_projections"]))

    def hoist_condition(self: Any, cond: Mapping[str, Any]) -> dict[str, Any]:
        missing = [name for name in CONDITION if cond.get(name) is None]
        if missing:
            raise ValueError(f"cond must hold {' and '.join(CONDITION)}, got no {' and no '.join(missing)}")
        return {"text": self.context_embedder(cond["encoder_hidden_states"])}

    def embedding_condition(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        return {"pooled_projections": cond["pooled_projections"]}

    def hoisted_forward(self: Any, x: Tensor, embedding: Tensor, cond: Mapping[str, Any]) -> Tensor:
        height, width = (size // self.config.patch_size for size in x.shape[-2:])
        tokens, text = self.pos_embed(x).contiguous(), cond["text"]
        for block in self.transformer_blocks:
            text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, temb=embedding)
        return unpatchified(self.proj_out(self.norm_out(tokens, embedding)), height, width, self.config.patch_size)


def _prepare_model(model: Any) -> None:
    norms = [norm for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    assign_modulations(model, [*norms, model.norm_out], model.inner_dim)


RULES = (
    Rule(
        ("diffusers.models.attention.JointTransformerBlock",),
        FusedJointTransformerBlock,
        "joint attention with one product for Q, K and V of each stream; gates and residuals inside LayerNorm",
        refuse_joint_block,
        _prepare_block,
    ),
    Rule(
        ("diffusers.models.transformers.transformer_sd3.SD3Transformer2DModel",),
        FusedSD3Transformer2DModel,
        "modulations and text embedding can be hoisted",
        prepare=_prepare_model,
    ),
)
