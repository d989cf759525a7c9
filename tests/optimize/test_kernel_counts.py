"""How many kernels the optimised models launch, at their real sizes, counted on tensors without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pydiff
from pydiff.check.launches import Launches, count_launches, fake_cuda
from pydiff.optimize.hoisting import HoistedModel

diffusers = pytest.importorskip("diffusers")


def sd15() -> nn.Module:
    return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sdxl() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        cross_attention_dim=2048,
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 10),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return fake_cuda(torch.empty(shape, device="meta", dtype=dtype))


def inputs(name: str) -> tuple[torch.Tensor, dict[str, Any]]:
    if name == "sd15":
        return empty(2, 4, 64, 64), {"encoder_hidden_states": empty(2, 77, 768)}
    added = {"text_embeds": empty(2, 1280), "time_ids": empty(2, 6, dtype=torch.float32)}
    return empty(2, 4, 128, 128), {"encoder_hidden_states": empty(2, 77, 2048), "added_cond_kwargs": added}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def counts(request: pytest.FixtureRequest) -> tuple[str, dict[str, Launches]]:
    with torch.device("meta"):
        model = {"sd15": sd15, "sdxl": sdxl}[request.param]().eval().requires_grad_(False).bfloat16()
    x, cond = inputs(request.param)
    times = empty(2, dtype=torch.float32)
    found = {"eager": count_launches(fake_cuda(model), x, times, **cond)}
    fused = fake_cuda(pydiff.optimize(model, memory_format=torch.channels_last, fold_upsampling=True))
    count_launches(fused, x, times, **cond)  # packs Q, K and V
    found["fused"] = count_launches(fused, x, times, **cond)
    made: list[HoistedModel] = []
    plan_times = empty(20, dtype=torch.float32)
    count_launches(lambda *args: made.append(HoistedModel(*args, 2)), fused, plan_times, cond)
    found["hoisted"] = count_launches(made[0], x, empty(1, dtype=torch.int32))
    return request.param, found


def test_far_fewer_than_eager(counts: tuple[str, dict[str, Launches]]) -> None:
    name, found = counts
    assert found["fused"].total <= LIMITS[name]["fused"] < 0.6 * found["eager"].total
    assert found["hoisted"].total <= LIMITS[name]["hoisted"] < found["fused"].total


def test_what_hoisting_takes_out_of_the_loop(counts: tuple[str, dict[str, Launches]]) -> None:
    """79 launches in SD1.5, 180 in SDXL, of the model as it was: keys and values, time projections, SiLU on them."""
    name, found = counts
    transformers = {"sd15": 16, "sdxl": 70}[name]
    resnets = {"sd15": 22, "sdxl": 17}[name]
    embeddings = {"sd15": 1, "sdxl": 2}[name]  # two products and a SiLU each
    predicted = 2 * transformers + (resnets + 2 * embeddings) + (resnets + embeddings)
    assert predicted == {"sd15": 79, "sdxl": 180}[name]
    products = lambda launches: launches.by_name["mm"] + launches.by_name["addmm"]  # noqa: E731
    packed = transformers  # keys and values are one product already
    assert products(found["fused"]) - products(found["hoisted"]) == packed + resnets + 2 * embeddings
    assert found["fused"].by_name["silu"] - found["hoisted"].by_name["silu"] == resnets + embeddings
    assert found["fused"].total - found["hoisted"].total >= predicted - transformers


def test_no_needless_operation_is_left(counts: tuple[str, dict[str, Launches]]) -> None:
    _, found = counts
    left = found["hoisted"].by_name
    for name in ("div", "cat", "silu", "gelu", "native_group_norm", "native_layer_norm", "clone", "copy_", "_to_copy"):
        assert left[name] == 0, (name, left)


def test_decoding_a_large_image() -> None:
    """All of the autoencoder's decoder at 1024 x 1024 in bf16, channels-last: nothing is upcast, nothing converted."""
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            force_upcast=True,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )
    vae = vae.eval().requires_grad_(False).bfloat16()
    latents = empty(1, 4, 128, 128)
    eager = count_launches(lambda v, z: v.decode(z).sample, fake_cuda(vae), latents)
    fused = fake_cuda(pydiff.optimize(vae, memory_format=torch.channels_last, fold_upsampling=True))
    count_launches(lambda v, z: pydiff.decode(v, z), fused, latents)
    ours = count_launches(lambda v, z: pydiff.decode(v, z), fused, latents)
    assert ours.total <= 130 < 0.6 * eager.total
    assert not {"div", "silu", "native_group_norm", "clone", "upsample_nearest2d"} & set(ours.by_name) - {"div"}
    assert ours.by_name["_to_copy"] <= 3  # the latents in float32 and back, the image to float32


# As counted. A model in which every pointwise operation stood in an epilogue would have 366 and 970.
LIMITS = {"sd15": {"fused": 525, "hoisted": 430}, "sdxl": {"fused": 1132, "hoisted": 984}}
