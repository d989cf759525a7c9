"""diffusers' attention and transformer blocks, fused.

Q, K and V come from one matrix product (K and V, for cross-attention, or from the hoisted context and no product at
all); attention runs in the backend measured fastest; GEGLU sits in the epilogue of its product; each residual addition
is made by the LayerNorm that reads its result. A transformer's 1x1 convolutions are matrix products over channels-last
pixels, which makes the change of layout between image and tokens a view.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pydiff.ops.attention import attention
from pydiff.ops.geglu import linear_geglu
from pydiff.ops.residual import residual_add
from pydiff.optimize.diffusers.dit import ADAPTIVE
from pydiff.optimize.hoisting import own_columns
from pydiff.optimize.parts import is_nhwc, is_plain, layer_norm_of, norm_act, packed, unhooked
from pydiff.optimize.swap import Fused, Rule, ready

PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


class FusedAttention(Fused):
    """Attention: one product for Q, K and V, and the attention backend measured fastest."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """diffusers' Attention on tokens [B, L, C] or an image [B, C, H, W]; the context may be hoisted."""
        extra = [name for name, value in kwargs.items() if value is not None and name != "temb"]
        if extra or refuse_attention(self) or not ready(self, hidden_states):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        residual = hidden_states
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if self.group_norm is not None:
            hidden_states = norm_act(self.group_norm, None, hidden_states.transpose(1, 2)).transpose(1, 2)
        out = self.to_out[1](self.to_out[0](self._attend(hidden_states, encoder_hidden_states, attention_mask)))
        if residual.ndim == 4:
            out = _as_image(out, residual)
        scale = 1.0 / self.rescale_output_factor
        if self.residual_connection:
            return residual_add(out, residual, scale=scale, channel_dim=1 if residual.ndim == 4 else -1)
        return out if scale == 1.0 else out * scale

    def _attend(self: Any, tokens: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Tokens [B, L, C] before the output projection."""
        q, k, v = self._projections(tokens, context)
        batch, length = q.shape[0], k.shape[1]
        if mask is not None:
            mask = self.prepare_attention_mask(mask, length, batch).view(batch, self.heads, -1, length)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.norm_q is not None:
            q = self.norm_q(q)
        if self.norm_k is not None:
            k = self.norm_k(k)
        return attention(q, k, v, mask=mask).transpose(1, 2).flatten(2)

    def _projections(self: Any, tokens: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        hoisted = own_columns(vars(self).get("_pydiff_context"), context)
        if hoisted is not None:
            return self.to_q(tokens), *hoisted.chunk(2, dim=-1)
        if context is None:
            together = packed(self, [self.to_q, self.to_k, self.to_v])
            if together is not None:
                return F.linear(tokens, *together).chunk(3, dim=-1)
            return self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        if self.norm_cross:
            context = self.norm_encoder_hidden_states(context)
        return self.to_q(tokens), *self.keys_values(context)

    def keys_values(self: Any, context: Tensor) -> tuple[Tensor, ...]:
        """Keys and values [B, T, width] of a context [B, T, C], which hoisting computes before the loop."""
        together = packed(self, [self.to_k, self.to_v])
        if together is not None:
            return F.linear(context, *together).chunk(2, dim=-1)
        return self.to_k(context), self.to_v(context)


def _as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens [B, HW, C] as an image of the shape and layout of `like`: a view, where that is channels-last."""
    image = tokens.transpose(1, 2).unflatten(2, like.shape[2:])
    return image if is_nhwc(like) else image.contiguous()


def refuse_attention(attn: Any) -> str | None:
    """Why an Attention is left as it is, or None; asked again at every call, for a processor can be set at any time."""
    if type(attn.processor).__name__ not in PROCESSORS:
        return f"its processor is {type(attn.processor).__name__}, not one of {', '.join(PROCESSORS)}"
    if type(attn.processor).__name__ == "AttnProcessor" and (attn.upcast_attention or attn.norm_q or attn.norm_k):
        return "AttnProcessor is asked for attention in float32 (upcast_attention), or has norms it does not apply"
    for name in ("spatial_norm", "added_kv_proj_dim", "fused_projections"):
        if getattr(attn, name, None):
            return f"it uses {name}"
    if attn.to_k is None or attn.inner_kv_dim != attn.inner_dim:
        return "its queries and keys differ in width"
    if attn.scale != (attn.inner_dim // attn.heads) ** -0.5:
        return "its scale is not head_dim ** -0.5"
    return None


class FusedGEGLU(Fused):
    """GEGLU in the epilogue of its product."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [..., in] -> [..., out]."""
        if args or kwargs or not is_plain(self.proj, nn.Linear) or not ready(self, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        return linear_geglu(hidden_states, self.proj.weight, self.proj.bias)


class FusedBasicTransformerBlock(Fused):
    """BasicTransformerBlock: each residual addition is made by the LayerNorm that reads it."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Any = None,
        added_cond_kwargs: Any = None,
    ) -> Tensor:
        """Tokens hidden_states [B, L, C]; the rest as `ada_norm_zero_forward` has it."""
        if cross_attention_kwargs or not ready(self, hidden_states) or refuse_transformer_block(self):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        if self.norm_type in ADAPTIVE:
            return ADAPTIVE[self.norm_type](
                self,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                class_labels,
            )
        x = hidden_states
        y, x = layer_norm_of(self.norm1, x)
        y = self.attn1(y, encoder_hidden_states if self.only_cross_attention else None, attention_mask)
        if self.attn2 is not None:
            y, x = layer_norm_of(self.norm2, y, residual=x)
            y = self.attn2(y, encoder_hidden_states, encoder_attention_mask)
        last = _last_product(self.ff)
        if last is None:
            y, x = layer_norm_of(self.norm3, y, residual=x)
            return residual_add(self.ff(y), x, channel_dim=-1)
        y, x = layer_norm_of(self.norm3, y, residual=x, total_bias=last.bias)
        y = self.ff.net[0](y)
        x.view(-1, x.shape[-1]).addmm_(y.flatten(0, -2), last.weight.t())  # x is the norm's own result
        return x


def _last_product(ff: Any) -> Any:
    """The linear layer that ends a feed-forward, where its product can be accumulated into the residual."""
    net: Any = getattr(ff, "net", ())
    if len(net) != 3 or not all(map(unhooked, (ff, *net))) or type(net[1]) is not nn.Dropout or net[1].training:
        return None
    return net[2] if is_plain(net[2], nn.Linear) else None


def refuse_transformer_block(block: Any) -> str | None:
    """Why a BasicTransformerBlock is left as it is, or None."""
    if block.norm_type != "layer_norm" and block.norm_type not in ADAPTIVE:
        return f"its norm_type is {block.norm_type!r}, not one of 'layer_norm', {str([*ADAPTIVE])[1:-1]}"
    if block.pos_embed is not None or block._chunk_size is not None or hasattr(block, "fuser"):
        return "it has positional embeddings, a chunked feed-forward or GLIGEN's fuser"
    return None


class FusedTransformer2DModel(Fused):
    """A transformer over an image [B, C, H, W]: GroupNorm, projection, blocks, projection, residual."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """hidden_states [B, C, H, W], the text encoder_hidden_states [B, T, E], which may be hoisted."""
        simple = not any(value is not None for value in (*args, *kwargs.values()))
        if not simple or not ready(self, hidden_states) or not self._plain():
            return super().forward(hidden_states, encoder_hidden_states, *args, return_dict=return_dict, **kwargs)
        residual = hidden_states
        tokens = norm_act(self.norm, None, hidden_states).flatten(2).transpose(1, 2)
        tokens = F.linear(tokens, self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=encoder_hidden_states)
        tokens = F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias)
        output = residual_add(_as_image(tokens, residual), residual)
        if not return_dict:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)

    def _plain(self: Any) -> bool:
        kind = nn.Linear if self.use_linear_projection else nn.Conv2d
        return is_plain(self.proj_in, kind) and is_plain(self.proj_out, kind)


def _refuse_transformer(module: Any) -> str | None:
    return None if module.is_input_continuous else "its input is no image of continuous values"


_MODELS = "diffusers.models"
RULES = (
    Rule(
        (f"{_MODELS}.attention_processor.Attention",),
        FusedAttention,
        "one product for Q, K and V; the fastest attention backend",
        refuse_attention,
    ),
    Rule((f"{_MODELS}.activations.GEGLU",), FusedGEGLU, "GEGLU in the epilogue of its matrix product"),
    Rule(
        (f"{_MODELS}.attention.BasicTransformerBlock",),
        FusedBasicTransformerBlock,
        "residual additions inside LayerNorm",
        refuse_transformer_block,
    ),
    Rule(
        (f"{_MODELS}.transformers.transformer_2d.Transformer2DModel",),
        FusedTransformer2DModel,
        "projections without a change of layout",
        _refuse_transformer,
    ),
)
