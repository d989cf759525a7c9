"""diffusers' UNet2DConditionModel and UNet2DModel as wholes: the last norm with its activation, and hoisting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pydiff.optimize.diffusers.attention import FusedAttention, refuse_attention
from pydiff.optimize.diffusers.blocks import FusedResnetBlock2D
from pydiff.optimize.hoisting import CannotHoist, Hoistable, assign, gathered
from pydiff.optimize.parts import norm_act
from pydiff.optimize.swap import Rule, ready

ADDED = ("text_embeds", "time_ids", "image_embeds")
SIMPLE = ("class_labels", "timestep_cond", "added_cond_kwargs")  # arguments that the fused forward takes too

BLOCKS = {f"{kind}{name}Block2D" for kind in ("", "CrossAttn", "Attn", "Resnet") for name in ("Down", "Up")}
BLOCKS |= {"ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"}


def unfused_reader(model: Any) -> str:
    """A module that would read what is hoisted without knowing its columns, or ""."""
    blocks = [b for b in (*model.down_blocks, model.mid_block, *model.up_blocks) if b is not None]
    for block in blocks:
        if type(block).__name__ not in BLOCKS:
            return f"a {type(block).__name__}, whose layers are not known"
        resamplers = [*(getattr(block, "downsamplers", None) or ()), *(getattr(block, "upsamplers", None) or ())]
        readers = [*block.resnets, *(m for m in resamplers if hasattr(m, "time_emb_proj"))]
        for module in readers:
            if not isinstance(module, FusedResnetBlock2D):
                return f"a {type(module).__name__} that was not optimised"
    return ""


def context_readers(model: nn.Module) -> list[Any]:
    """The attention layers that are handed the text."""
    transformers: list[Any] = [m for m in model.modules() if hasattr(m, "transformer_blocks")]
    blocks = [b for transformer in transformers for b in transformer.transformer_blocks]
    return [a for b in blocks for a in ((b.attn1,) if b.only_cross_attention else ()) + (b.attn2,) if a is not None]


def unfused_context_reader(model: nn.Module) -> str:
    """Cross-attention that would read the hoisted text without knowing its columns, or ""."""
    for attention in context_readers(model):
        if not isinstance(attention, FusedAttention) or "_pydiff_context" not in vars(attention):
            return "cross-attention that was not optimised"
        reason = refuse_attention(attention)
        if reason:
            return f"cross-attention that is not as it was when it was optimised: {reason}"
    return ""


def assign_time_slots(model: nn.Module) -> None:
    """Give every fused ResNet block with a time projection its columns of the hoisted table."""
    every: list[Any] = [m for m in model.modules() if isinstance(m, FusedResnetBlock2D)]
    blocks = [m for m in every if m.time_emb_proj is not None]
    widths = [b.out_channels * (2 if b.time_embedding_norm == "scale_shift" else 1) for b in blocks]
    narrow = {getattr(b.time_emb_proj, "in_features", 0) for b in blocks}
    total = assign("_pydiff_time", blocks, widths, narrow)
    object.__setattr__(model, "_pydiff_time_blocks", (blocks, total))


def project_times(model: Any, embedding: Tensor) -> Tensor:
    """The embedding [N, E] as every block projects it, [N, width]."""
    blocks, total = model._pydiff_time_blocks
    active = [b for b in blocks if not b.skip_time_act]
    activated = active[0].nonlinearity(embedding) if active else None
    return gathered([b.hoisted_columns(embedding if b.skip_time_act else activated) for b in blocks], total)


class _FusedUNet(Hoistable):
    def _trunk(self: Any, sample: Tensor, emb: Tensor, context: dict[str, Any]) -> Tensor:
        """From the input image and what the blocks are told to the output image."""
        factor = 2 ** max(len(self.up_blocks) - 1, 0)
        forced = any(n % factor for n in sample.shape[-2:])
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0
        h = self.conv_in(sample)
        skips: tuple[Tensor, ...] = (h,)
        for block in self.down_blocks:
            h, more = block(hidden_states=h, temb=emb, **_for_block(block, context))
            skips += more
        if self.mid_block is not None:
            h = self.mid_block(h, emb, **_for_block(self.mid_block, context))
        for i, block in enumerate(self.up_blocks):
            count = len(block.resnets)
            own, skips = skips[-count:], skips[:-count]
            size = skips[-1].shape[2:] if forced and i < len(self.up_blocks) - 1 else None
            h = block(
                hidden_states=h, temb=emb, res_hidden_states_tuple=own, upsample_size=size, **_for_block(block, context)
            )
        if self.conv_norm_out is not None:
            h = norm_act(self.conv_norm_out, self.conv_act, h)
        return self.conv_out(h)

    def _check_readers(self: Any) -> None:
        """Asked for every run, for an attention processor or a layer can be exchanged at any time."""
        reason = unfused_reader(self) or unfused_context_reader(self)
        if reason:
            raise CannotHoist(f"it has {reason}")

    def embedding_condition(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        entering = {k: cond[k] for k in ("class_labels", "timestep_cond") if cond.get(k) is not None}
        added = cond.get("added_cond_kwargs") or {}
        return entering | {k: added[k] for k in ADDED if added.get(k) is not None}


def _for_block(block: Any, context: dict[str, Any]) -> dict[str, Any]:
    return context if getattr(block, "has_cross_attention", False) else {}


class FusedUNet2DConditionModel(_FusedUNet):
    """UNet2DConditionModel: the last norm with SiLU; time projections and the text's keys and values can be hoisted."""

    hoisted_arguments = ("encoder_hidden_states", "class_labels", "timestep_cond", "added_cond_kwargs")

    def forward(
        self: Any,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Any = None,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """sample [B, C, H, W], timestep a number or [B], encoder_hidden_states [B, T, E]."""
        simple = {k: kwargs.get(k) for k in SIMPLE}
        others = (*args, *(v for k, v in kwargs.items() if k not in SIMPLE))
        if any(v is not None for v in others) or not self._simple() or not ready(self, sample):
            if not return_dict:  # or it was given by its place
                kwargs["return_dict"] = False
            return super().forward(sample, timestep, encoder_hidden_states, *args, **kwargs)
        emb = self._embed(sample, timestep, encoder_hidden_states, **simple)
        context = self.process_encoder_hidden_states(encoder_hidden_states, simple["added_cond_kwargs"])
        out = self._trunk(sample, emb, {"encoder_hidden_states": context})
        if not return_dict:
            return (out,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=out)

    def _simple(self: Any) -> bool:
        """Whether the trunk here is this model's: its rare variants are left to diffusers."""
        special = self.config.addition_embed_type == "image_hint" or self.config.addition_embed_type == "text"
        return not special and self.config.encoder_hid_dim_type is None

    def _embed(
        self: Any,
        sample: Tensor,
        timestep: Any,
        context: Any,
        class_labels: Any = None,
        timestep_cond: Any = None,
        added_cond_kwargs: Any = None,
    ) -> Tensor:
        emb = self.time_embedding(self.get_time_embed(sample, timestep), timestep_cond)
        labels = self.get_class_embed(sample, class_labels)
        if labels is not None:
            emb = torch.cat([emb, labels], dim=-1) if self.config.class_embeddings_concat else emb + labels
        added = self.get_aug_embed(emb, context, added_cond_kwargs)
        emb = emb if added is None else emb + added
        return emb if self.time_embed_act is None else self.time_embed_act(emb)

    def hoist_times(self: Any, times: Tensor, cond: Mapping[str, Any]) -> Tensor:
        like = times.new_empty(times.shape[0], dtype=self.dtype)  # for its size, dtype and device
        added = {k: cond[k] for k in ADDED if k in cond} or None
        emb = self._embed(like, times, None, cond.get("class_labels"), cond.get("timestep_cond"), added)
        return project_times(self, emb)

    def hoist_condition(self: Any, cond: Mapping[str, Any]) -> dict[str, Any]:
        if not self._simple() or not isinstance(cond.get("encoder_hidden_states"), Tensor):
            raise CannotHoist("its condition is more than a text and what is added to the time embedding")
        self._check_readers()
        text = cond["encoder_hidden_states"].to(self.dtype)
        blocks, total = self._pydiff_context_blocks
        return {"encoder_hidden_states": gathered([t for b in blocks for t in b.keys_values(text)], total)}

    def hoisted_forward(self, x: Tensor, embedding: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return self._trunk(x, embedding, dict(cond))


def _prepare_condition_model(model: Any) -> None:
    assign_time_slots(model)
    cross: list[Any] = [a for a in context_readers(model) if isinstance(a, FusedAttention) and not a.norm_cross]
    total = assign(
        "_pydiff_context",
        cross,
        [2 * a.inner_kv_dim for a in cross],
        {getattr(a.to_k, "in_features", 0) for a in cross},
    )
    object.__setattr__(model, "_pydiff_context_blocks", (cross, total))


class FusedUNet2DModel(_FusedUNet):
    """UNet2DModel: the last norm with SiLU; time projections can be hoisted."""

    hoisted_arguments = ("class_labels",)

    def forward(self: Any, sample: Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        """sample [B, C, H, W], timestep a number or [B], class_labels [B]."""
        if not self._simple() or not ready(self, sample):
            return super().forward(sample, timestep, class_labels, return_dict)
        if not isinstance(timestep, Tensor):
            timestep = int(timestep)  # as the original has it
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
        out = self._trunk(sample, self._embed(times, class_labels), {})
        if not return_dict:
            return (out,)
        from diffusers.models.unets.unet_2d import UNet2DOutput

        return UNet2DOutput(sample=out)

    def _simple(self: Any) -> bool:
        blocks = (*self.down_blocks, *self.up_blocks)
        return not any(hasattr(b, "skip_conv") for b in blocks) and self.config.time_embedding_type != "fourier"

    def _embed(self: Any, times: Tensor, class_labels: Any) -> Tensor:
        emb = self.time_embedding(self.time_proj(times).to(self.dtype))
        if (self.class_embedding is None) != (class_labels is None):
            raise ValueError(
                f"class_labels must be given exactly where the model has a class embedding, got {class_labels!r:.60}"
            )
        if class_labels is None:
            return emb
        labels = self.time_proj(class_labels) if self.config.class_embed_type == "timestep" else class_labels
        return emb + self.class_embedding(labels).to(self.dtype)

    def hoist_times(self: Any, times: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return project_times(self, self._embed(times, cond.get("class_labels")))

    def hoist_condition(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        if not self._simple():
            raise CannotHoist("it has skip convolutions or Fourier features of the time")
        self._check_readers()
        return {}

    def hoisted_forward(self, x: Tensor, embedding: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return self._trunk(x, embedding, {})


_UNETS = "diffusers.models.unets"
RULES = (
    Rule(
        (f"{_UNETS}.unet_2d_condition.UNet2DConditionModel",),
        FusedUNet2DConditionModel,
        "last norm with SiLU; time projections and text keys and values can be hoisted",
        prepare=_prepare_condition_model,
    ),
    Rule(
        (f"{_UNETS}.unet_2d.UNet2DModel",),
        FusedUNet2DModel,
        "last norm with SiLU; time projections can be hoisted",
        prepare=assign_time_slots,
    ),
)
