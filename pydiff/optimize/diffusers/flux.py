"""diffusers' Flux: attention with rotary embeddings over text and image, both kinds of block, and hoisting.

Q, K and V of a stream come from one matrix product; RMSNorm of the heads and their rotation are one operation a stream.
The single-stream blocks work on one tensor [text; image], which the model joins once, and the product after attention
and feed-forward reads the two where they are instead of from their concatenation.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydiff.ops.attention import attention
from pydiff.optimize.diffusers.transformers import (
    Rotary,
    assign_modulations,
    gated_add,
    gated_norm,
    heads_of,
    linear_gelu,
    normed_heads,
    project_modulations,
    projected,
)
from pydiff.optimize.hoisting import Hoistable, given
from pydiff.optimize.parts import is_plain, unhooked
from pydiff.optimize.swap import Fused, Rule, ready

PROCESSOR = "FluxAttnProcessor"
CONDITION = ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids")


class FusedFluxAttention(Fused):
    """FluxAttention: one product for Q, K and V of each stream; RMSNorm and rotation in one operation."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary = None,
        **kwargs: Any,
    ) -> Any:
        """Image tokens [B, L, C] and text tokens [B, T, C], or [text; image] alone; (cos, sin) [T + L, D]."""
        both = encoder_hidden_states is not None
        suits = attention_mask is None and not kwargs and both == (self.added_kv_proj_dim is not None)
        if not suits or refuse_flux_attention(self) or not ready(self, hidden_states):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs)
        q, k, v = self._heads(hidden_states, encoder_hidden_states, image_rotary_emb)
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        length = encoder_hidden_states.shape[1]
        image = self.to_out[1](self.to_out[0](out[:, length:].contiguous()))
        return image, self.to_add_out(out[:, :length].contiguous())

    def _heads(self: Any, image: Tensor, text: Tensor | None, rotary: Rotary) -> tuple[Tensor, ...]:
        """Queries, keys and values [B, T + L, H, D], the text's tokens first."""
        own = (self.to_q, self.to_k, self.to_v)
        q, k, v = heads_of(projected(self, "own", own, image), own, image, self.head_dim)
        if text is None:
            return *normed_heads(q, k, self.norm_q, self.norm_k, rotary), v
        added = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        text_q, text_k, text_v = heads_of(projected(self, "added", added, text), added, text, self.head_dim)
        of_text, of_image = _split(rotary, text.shape[1])
        q, k = normed_heads(q, k, self.norm_q, self.norm_k, of_image)
        text_q, text_k = normed_heads(text_q, text_k, self.norm_added_q, self.norm_added_k, of_text)
        return torch.cat([text_q, q], 1), torch.cat([text_k, k], 1), torch.cat([text_v, v], 1)


def _split(rotary: Rotary, length: int) -> tuple[Rotary, Rotary]:
    """The tables [T + L, D] of the first `length` tokens, and of the others."""
    if rotary is None:
        return None, None
    cos, sin = rotary
    return (cos[:length], sin[:length]), (cos[length:], sin[length:])


def refuse_flux_attention(attn: Any) -> str | None:
    """Why a FluxAttention is left as it is, or None; asked at every call, for a processor can be set at any time."""
    processor = attn.processor
    if type(processor).__name__ != PROCESSOR:
        return f"its processor is {type(processor).__name__}, not {PROCESSOR}"
    if processor._attention_backend is not None or processor._parallel_config is not None or _backend_is_chosen():
        return "an attention backend or a parallel configuration was chosen for it"
    if getattr(attn, "fused_projections", False):
        return "it uses fused_projections"
    return None


def _backend_is_chosen() -> bool:
    """Whether diffusers was told which attention to use, by an environment variable or its context manager."""
    registry = getattr(sys.modules.get("diffusers.models.attention_dispatch"), "_AttentionBackendRegistry", None)
    return getattr(registry, "_active_backend", "native") != "native"


class FusedFluxTransformerBlock(Fused):
    """FluxTransformerBlock: gates and residuals inside LayerNorm."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [B, L, C], text tokens [B, T, C]; temb [B, E] or every norm's hoisted modulation."""
        if joint_attention_kwargs or not ready(self, hidden_states):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        x, text = hidden_states, encoder_hidden_states
        y, gate, shift, scale, gate_mlp = self.norm1(x, emb=temb)
        text_y, *modulations = self.norm1_context(text, emb=temb)
        y, text_y = self.attn(hidden_states=y, encoder_hidden_states=text_y, image_rotary_emb=image_rotary_emb)
        y, x = gated_norm(self.norm2, y, x, gate, scale, shift)
        x = gated_add(self.ff(y), x, gate_mlp)
        gate, shift, scale, gate_mlp = modulations
        y, text = gated_norm(self.norm2_context, text_y, text, gate, scale, shift)
        return _clipped(gated_add(self.ff_context(y), text, gate_mlp)), x


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class FusedFluxSingleTransformerBlock(Fused):
    """FluxSingleTransformerBlock: attention and feed-forward joined without concatenation."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [B, L, C], text tokens [B, T, C]; temb [B, E] or every norm's hoisted modulation."""
        if joint_attention_kwargs or not ready(self, hidden_states):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        joined = self.joined(torch.cat([encoder_hidden_states, hidden_states], dim=1), temb, image_rotary_emb)
        length = encoder_hidden_states.shape[1]
        return joined[:, :length], joined[:, length:]

    def joined(self: Any, x: Tensor, temb: Tensor, rotary: Rotary) -> Tensor:
        """The block on [text; image] tokens x [B, T + L, C]."""
        y, gate = self.norm(x, emb=temb)
        simple = type(self.act_mlp) is nn.GELU and self.act_mlp.approximate == "tanh" and unhooked(self.act_mlp)
        hidden = linear_gelu(self.proj_mlp, y) if simple else self.act_mlp(self.proj_mlp(y))
        attended = self.attn(hidden_states=y, image_rotary_emb=rotary)
        return _clipped(gated_add(_joint_linear(self.proj_out, attended, hidden), x, gate))


def _joint_linear(layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """A linear layer on [a; b], joined in the last dimension, the concatenation never made."""
    l: Any = layer  # noqa: E741
    if not is_plain(layer, nn.Linear) or a.dtype != l.weight.dtype:
        return layer(torch.cat([a, b], dim=2))
    split = a.shape[-1]
    y = F.linear(a.reshape(-1, split), l.weight[:, :split], l.bias)
    y.addmm_(b.reshape(-1, b.shape[-1]), l.weight[:, split:].t())
    return y.view(*a.shape[:-1], -1)


class FusedFluxTransformer2DModel(Hoistable):
    """Flux: the single-stream blocks on one tensor; modulations, text embedding and rotary tables can be hoisted."""

    hoisted_arguments = (*CONDITION, "guidance")

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        pooled_projections: Any = None,
        timestep: Any = None,
        img_ids: Any = None,
        txt_ids: Any = None,
        guidance: Any = None,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """hidden_states [B, L, C] packed latents, encoder_hidden_states [B, T, E] text, timestep [B] in [0, 1]."""
        simple = not args and not any(map(given, kwargs.values())) and not _three_dimensional(img_ids, txt_ids)
        if not simple or not ready(self, hidden_states):
            if not args:
                kwargs["return_dict"] = return_dict
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                pooled_projections,
                timestep,
                img_ids,
                txt_ids,
                guidance,
                *args,
                **kwargs,
            )
        tokens = self.x_embedder(hidden_states)
        temb = self._embed(timestep, guidance, pooled_projections, tokens.dtype)
        text = self.context_embedder(encoder_hidden_states)
        out = self._trunk(tokens, text, temb, self.pos_embed(torch.cat((txt_ids, img_ids))))
        if not return_dict:
            return (out,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=out)

    def _embed(self: Any, timestep: Tensor, guidance: Tensor | None, pooled: Tensor, dtype: torch.dtype) -> Tensor:
        time = timestep.to(dtype) * 1000
        if guidance is None:
            return self.time_text_embed(time, pooled)
        return self.time_text_embed(time, guidance.to(dtype) * 1000, pooled)

    def _trunk(self: Any, tokens: Tensor, text: Tensor, temb: Tensor, rotary: Rotary) -> Tensor:
        for block in self.transformer_blocks:
            text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
        length, blocks = text.shape[1], list(self.single_transformer_blocks)
        if all(isinstance(block, FusedFluxSingleTransformerBlock) and unhooked(block) for block in blocks):
            x = torch.cat([text, tokens], dim=1)
            for block in blocks:
                x = block.joined(x, temb, rotary)
            tokens = x[:, length:]
        else:
            for block in blocks:
                text, tokens = block(
                    hidden_states=tokens, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary
                )
        return self.proj_out(self.norm_out(tokens, temb))

    def hoist_times(self: Any, times: Tensor, cond: Mapping[str, Any]) -> Tensor:
        temb = self._embed(times, cond.get("guidance"), cond["pooled_projections"], self.dtype)
        return project_modulations(self, temb)

    def hoist_condition(self: Any, cond: Mapping[str, Any]) -> dict[str, Any]:
        missing = [name for name in CONDITION if cond.get(name) is None]
        if missing:
            raise ValueError(f"cond must hold {', '.join(CONDITION)}, got no {', no '.join(missing)}")
        ids = [t[0] if t.ndim == 3 else t for t in (cond["txt_ids"], cond["img_ids"])]
        return {"text": self.context_embedder(cond["encoder_hidden_states"]), "rotary": self.pos_embed(torch.cat(ids))}

    def embedding_condition(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        return {k: cond[k] for k in ("pooled_projections", "guidance") if cond.get(k) is not None}

    def hoisted_forward(self: Any, x: Tensor, embedding: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return self._trunk(self.x_embedder(x), cond["text"], embedding, cond["rotary"])


def _three_dimensional(*ids: Any) -> bool:
    """Ids with a batch dimension, of which the original warns that they are deprecated."""
    return any(isinstance(t, Tensor) and t.ndim == 3 for t in ids)


def _prepare_model(model: Any) -> None:
    norms = [norm for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    norms += [block.norm for block in model.single_transformer_blocks]
    assign_modulations(model, [*norms, model.norm_out], model.inner_dim)


_FLUX = "diffusers.models.transformers.transformer_flux"
RULES = (
    Rule(
        (f"{_FLUX}.FluxAttention",),
        FusedFluxAttention,
        "one product for Q, K and V of each stream; RMSNorm and rotation in one operation",
        refuse_flux_attention,
    ),
    Rule((f"{_FLUX}.FluxTransformerBlock",), FusedFluxTransformerBlock, "gates and residuals inside LayerNorm"),
    Rule(
        (f"{_FLUX}.FluxSingleTransformerBlock",),
        FusedFluxSingleTransformerBlock,
        "attention and feed-forward joined without concatenation",
    ),
    Rule(
        (f"{_FLUX}.FluxTransformer2DModel",),
        FusedFluxTransformer2DModel,
        "single-stream blocks on one tensor; modulations, text embedding and rotary tables can be hoisted",
        prepare=_prepare_model,
    ),
)
