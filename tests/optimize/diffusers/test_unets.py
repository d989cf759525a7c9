"""diffusers' U-Nets under `optimize`, built from their real configurations at reduced width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pydiff
from pydiff.check.fake_cuda import fake_tensor_mode
from pydiff.check.launches import fake_cuda
from tests.optimize import checks

diffusers = pytest.importorskip("diffusers")

COMMON = dict(sample_size=16, in_channels=4, out_channels=4, norm_num_groups=8)


def sd15() -> nn.Module:
    """Stable Diffusion 1.5's layout: eight heads on every level, 1x1 convolutions around the transformers."""
    return diffusers.UNet2DConditionModel(
        **COMMON,
        layers_per_block=2,
        block_out_channels=(16, 32),
        cross_attention_dim=24,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def sd21() -> nn.Module:
    """Stable Diffusion 2.1's: linear projections, heads of one width, attention in float32 where asked."""
    return diffusers.UNet2DConditionModel(
        **COMMON,
        layers_per_block=1,
        block_out_channels=(16, 32),
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        upcast_attention=True,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def sdxl() -> nn.Module:
    """SDXL's: several blocks a transformer, text and size embeddings added to the time's."""
    return diffusers.UNet2DConditionModel(
        **COMMON,
        layers_per_block=1,
        block_out_channels=(16, 32),
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def ddpm() -> nn.Module:
    """The unconditional CIFAR-10 model's: attention as a block of its own, classes added."""
    return diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        norm_num_groups=8,
        layers_per_block=1,
        num_class_embeds=5,
        block_out_channels=(16, 32),
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def scale_shift() -> nn.Module:
    """ResNet blocks that resample and take the time as scale and shift."""
    return diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        norm_num_groups=8,
        layers_per_block=1,
        attention_head_dim=8,
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
    )


MODELS = {"sd15": sd15, "sd21": sd21, "sdxl": sdxl, "ddpm": ddpm, "scale_shift": scale_shift}


def condition(name: str, rows: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    make = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float32).to(dtype)

    if name in ("sd15", "sd21"):
        return {"encoder_hidden_states": randn(rows, 7, 24)}
    if name == "sdxl":
        added = {"text_embeds": randn(rows, 16), "time_ids": torch.arange(6.0).repeat(rows, 1)}
        return {"encoder_hidden_states": randn(rows, 7, 24), "added_cond_kwargs": added}
    return {"class_labels": torch.arange(rows) + 1} if name == "ddpm" else {}


def call(name: str, model: nn.Module, dtype: torch.dtype = torch.float32, size: tuple[int, int] = (8, 8)):
    channels = 3 if name in ("ddpm", "scale_shift") else 4
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(3)).to(dtype)
    return model(x, torch.tensor([500.0, 3.0]), **condition(name, dtype=dtype)).sample


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def calling(name: str):
    return lambda model: call(name, model)


def test_close(name: str) -> None:
    checks.assert_close_in_float32(MODELS[name], calling(name))


@pytest.mark.parametrize("size", [(10, 6), (9, 7)])
def test_sizes_that_do_not_halve(size: tuple[int, int]) -> None:
    checks.assert_close_in_float32(sd15, lambda model: call("sd15", model, size=size))


def test_low_precision(name: str) -> None:
    checks.assert_low_precision_error(MODELS[name], lambda model, dtype: call(name, model, dtype))


def test_restored(name: str) -> None:
    checks.assert_restored(MODELS[name], calling(name))


def test_copies(name: str) -> None:
    checks.assert_copies(MODELS[name], calling(name))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "ddpm"])
def test_compiles(name: str) -> None:
    checks.assert_compiles(MODELS[name], calling(name))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_follows_weights(name: str) -> None:
    block = "mid_block.attentions.0.transformer_blocks.0"
    layers = ("attn1.to_q", "attn1.to_v", "attn2.to_k", "ff.net.0.proj", "ff.net.2", "norm2")
    names = [f"{block}.{layer}.weight" for layer in layers]
    names += [
        "mid_block.resnets.0.conv1.weight",
        "up_blocks.0.resnets.0.conv_shortcut.weight",
        "mid_block.resnets.0.time_emb_proj.bias",
        "up_blocks.0.upsamplers.0.conv.weight",
    ]
    checks.assert_follows_weights(MODELS[name], calling(name), names)


def test_hooks_fire(name: str) -> None:
    checks.assert_hooks_fire(MODELS[name], calling(name), (nn.GroupNorm, nn.LayerNorm, nn.Conv2d, nn.Linear, nn.SiLU))


def test_pre_hooks_fire(name: str) -> None:
    model, seen = pydiff.optimize(checks.seeded(MODELS[name])), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, args: seen.append(m))
    call(name, model)
    unused = {id(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    assert {id(m) for m in seen} == {id(m) for m in model.modules()} - unused


def test_training_and_gradients(name: str) -> None:
    checks.assert_reference_path(MODELS[name], calling(name))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "ddpm"])
@pytest.mark.parametrize("rows", [1, 3])
def test_hoisting(name: str, rows: int) -> None:
    shape = (rows, 3 if name == "ddpm" else 4, 8, 8)
    schedule = pydiff.DiscreteBetas([1e-4 + 2e-5 * k for k in range(1000)])
    checks.assert_hoisting(MODELS[name], shape, condition(name, rows), schedule=schedule, prediction="epsilon")


def test_hoisting_with_guidance_and_a_plan_for_each_row() -> None:
    model = pydiff.optimize(checks.seeded(sdxl))
    schedule = pydiff.DiscreteBetas([1e-4 + 2e-5 * k for k in range(1000)])
    plans = [
        pydiff.make_plan(solver, schedule, steps, prediction="epsilon", guidance_scale=3.0)
        for solver, steps in (("dpmpp_2m", 3), ("euler", 5))
    ]
    x = 30 * torch.randn(2, 4, 8, 8)
    cond, uncond = condition("sdxl"), condition("sdxl")
    uncond["encoder_hidden_states"] = torch.zeros(2, 7, 24)
    arguments = dict(seed=0, cond=cond, uncond=uncond, check_finite=False)
    with_it, without = (pydiff.run_plan(plans, model, x, hoist=hoist, **arguments) for hoist in (True, False))
    assert checks.relative(with_it, without) < 2e-5


def test_report() -> None:
    model = checks.seeded(sd15)
    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1

    class Custom:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    attention.set_processor(Custom())
    expected = call("sd15", model)
    _, report = pydiff.optimize(model, report=True)
    assert checks.relative(call("sd15", model), expected) < 2e-5
    left, upsampler = report.left
    assert left.name.endswith("attn1") and "processor is Custom" in left.what
    assert upsampler.cls == "Upsample2D" and "fold_upsampling=True" in upsampler.what
    classes = {entry.cls for entry in report.replaced}
    assert {"ResnetBlock2D", "Attention", "GEGLU", "BasicTransformerBlock", "Transformer2DModel"} <= classes
    assert "processor is Custom" in str(report) and "parameters are on cpu" in str(report)


def test_upsampling_is_folded_on_request() -> None:
    expected = call("sd15", checks.seeded(sd15))
    model, report = pydiff.optimize(checks.seeded(sd15), report=True, fold_upsampling=True)
    assert not report.left and "Upsample2D" in {entry.cls for entry in report.replaced}
    assert checks.relative(call("sd15", model), expected) < 2e-5


def test_a_processor_set_later_is_used() -> None:
    model = pydiff.optimize(checks.seeded(sd15))
    expected = call("sd15", model)
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    assert checks.relative(call("sd15", model), expected) < 2e-5
    calls = []

    class Counting(diffusers.models.attention_processor.AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return super().__call__(*args, **kwargs)

    model.set_attn_processor(Counting())
    assert checks.relative(call("sd15", model), expected) < 2e-5
    assert len(calls) == len(model.attn_processors)


def test_calls_with_more_than_the_usual_go_to_the_original() -> None:
    plain, fused = checks.seeded(sd15), pydiff.optimize(checks.seeded(sd15))
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor(9), condition("sd15")["encoder_hidden_states"]
    with torch.no_grad():
        skips = [torch.randn(2, c, s, s) for c, s in ((16, 8), (16, 8), (16, 8), (16, 4), (32, 4), (32, 4))]
        extra = dict(down_block_additional_residuals=skips, mid_block_additional_residual=torch.randn(2, 32, 4, 4))
        mask = dict(encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7]))
        for arguments in (extra, mask, {"cross_attention_kwargs": {"scale": 1.0}}):
            expected = plain(x, t, text, **arguments).sample
            assert checks.relative(fused(x, t, text, **arguments).sample, expected) < 2e-5
        fused.enable_freeu(0.9, 0.2, 1.2, 1.4)
        plain.enable_freeu(0.9, 0.2, 1.2, 1.4)
        assert checks.relative(fused(x, t, text).sample, plain(x, t, text).sample) < 2e-5


def test_optimize_twice_is_optimize_once() -> None:
    model = pydiff.optimize(checks.seeded(sd15))
    expected, classes = call("sd15", model), [type(m) for m in model.modules()]
    _, report = pydiff.optimize(model, report=True)
    assert not report.replaced and [type(m) for m in model.modules()] == classes
    assert torch.equal(call("sd15", model), expected)


def test_moving_and_saving(tmp_path) -> None:
    model = pydiff.optimize(checks.seeded(sd15))
    expected = call("sd15", model)
    assert checks.relative(call("sd15", model.double(), torch.float64), expected) < 1e-5
    model.float()
    assert torch.equal(call("sd15", model), expected)
    model.save_pretrained(tmp_path)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert checks.relative(call("sd15", again.requires_grad_(False)), expected) < 2e-5
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True)
    again.load_state_dict(model.state_dict())
    assert checks.relative(call("sd15", model), call("sd15", again)) < 2e-5


def test_inference_mode_leaves_parameters_that_can_be_trained() -> None:
    model = checks.seeded(sd15)
    with torch.inference_mode():
        pydiff.optimize(model, memory_format=torch.channels_last)
        call("sd15", model)
        pydiff.restore(model)
    call("sd15", model.requires_grad_(True)).sum().backward()
    assert model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.grad is not None


def test_a_lora_wrapper_put_in_later_is_called() -> None:
    class LoRA(nn.Module):
        def __init__(self, base: nn.Linear):
            super().__init__()
            self.base_layer = base
            self.down = nn.Parameter(torch.randn(2, base.in_features))
            self.up = nn.Parameter(torch.randn(base.out_features, 2))

        def forward(self, x):
            return self.base_layer(x) + x @ self.down.T @ self.up.T

    results = []
    for model in (checks.seeded(sd15), pydiff.optimize(checks.seeded(sd15))):
        torch.manual_seed(5)
        attention = model.mid_block.attentions[0].transformer_blocks[0].attn1
        call("sd15", model)
        attention.to_k = LoRA(attention.to_k).requires_grad_(False)
        model.mid_block.attentions[0].transformer_blocks[0].ff.net[0].proj = LoRA(
            model.mid_block.attentions[0].transformer_blocks[0].ff.net[0].proj
        ).requires_grad_(False)
        results.append(call("sd15", model))
    assert checks.relative(results[1], results[0]) < 2e-5


class Int8Linear(nn.Module):
    """A linear layer of a quantisation library's own class."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.scale = float(base.weight.abs().max()) / 127
        self.weight = nn.Parameter((base.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.float() * self.scale).T


class Int8Tensor(torch.Tensor):
    """A quantised weight as torchao makes them: a tensor subclass that only knows how to be multiplied with."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight: torch.Tensor):
        self.scale = float(weight.abs().max()) / 127
        self.integers = (weight.detach() / self.scale).round().to(torch.int8)

    def __tensor_flatten__(self):
        return ["integers"], self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, w, bias = (*args, None)[:3]
            return torch.nn.functional.linear(x, w.integers.float() * w.scale, bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} on a quantised weight")


class TestBadInput:
    def test_no_module(self) -> None:
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
            pydiff.optimize(lambda x: x)
        with pytest.raises(TypeError, match="must be a torch.nn.Module"):
            pydiff.restore("unet")

    def test_pipeline(self) -> None:
        class Pipeline:
            scheduler = None

        with pytest.raises(TypeError, match="pipe.unet and pipe.vae"):
            pydiff.optimize(Pipeline())

    def test_compiled(self) -> None:
        with pytest.raises(TypeError, match="optimize the module first, then compile it"):
            pydiff.optimize(torch.compile(nn.Linear(2, 2)))

    def test_memory_format(self) -> None:
        model = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="memory_format must be"):
            pydiff.optimize(model, memory_format="nhwc")
        assert type(model) is nn.Linear

    def test_quantised_weights_are_called(self) -> None:
        results = []
        for model in (checks.seeded(sd15), checks.seeded(sd15)):
            block = model.mid_block.attentions[0].transformer_blocks[0]
            block.attn1.to_q = Int8Linear(block.attn1.to_q)
            block.attn2.to_v.weight = nn.Parameter(Int8Tensor(block.attn2.to_v.weight), requires_grad=False)
            block.ff.net[0].proj.weight = nn.Parameter(Int8Tensor(block.ff.net[0].proj.weight), requires_grad=False)
            results.append(call("sd15", pydiff.optimize(model) if results else model))
        assert checks.relative(results[1], results[0]) < 2e-5

    def test_offloaded_module_stays(self) -> None:
        model = checks.seeded(sd15)
        block = model.mid_block.resnets[0]
        block.forward = block.forward
        expected = call("sd15", model)
        _, report = pydiff.optimize(model, report=True)
        left = {entry.name: entry.what for entry in report.left}
        assert "forward is replaced on the instance" in left["mid_block.resnets.0"]
        assert checks.relative(call("sd15", model), expected) < 2e-5


def test_a_compiler_sees_the_kernels_of_a_cuda_model() -> None:
    """Traced on fake CUDA tensors: one graph, and in it the operators that Inductor takes apart into kernels."""
    with torch.device("meta"):
        model = sd15().eval().requires_grad_(False)
    block = fake_cuda(pydiff.optimize(model, memory_format=torch.channels_last)).mid_block.attentions[0]
    text = fake_cuda(torch.empty(2, 7, 24, device="meta"))
    x = fake_cuda(torch.empty(2, 32, 8, 8, device="meta").to(memory_format=torch.channels_last))
    graphs = []
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad(), fake_tensor_mode():
        compiled = torch.compile(lambda *a: block(*a, return_dict=False)[0], fullgraph=True, backend=backend)
        assert compiled(x, text).shape == x.shape
    assert len(graphs) == 1
    called = {str(node.target) for node in graphs[0].graph.nodes}
    for name in ("group_norm", "attention", "add_layer_norm", "linear_geglu", "residual_add"):
        assert f"pydiff.{name}.default" in called


@pytest.mark.parametrize("why", ["mask", "processor", "offloaded", "unknown block"])
def test_what_cannot_be_hoisted_is_not(why: str) -> None:
    """The samples are those without hoisting, and a warning gives the reason."""
    model, cond = checks.seeded(sd15), condition("sd15")
    if why == "offloaded":
        model.mid_block.resnets[0].forward = model.mid_block.resnets[0].forward
    pydiff.optimize(model)
    if why == "mask":
        cond["encoder_attention_mask"] = torch.ones(2, 7)
    if why == "processor":
        attention = model.mid_block.attentions[0].transformer_blocks[0].attn2
        attention.set_processor(type("Custom", (type(attention.processor),), {})())
    if why == "unknown block":
        model.mid_block.__class__ = type("Mid", (type(model.mid_block),), {})
    sampler = pydiff.Sampler(model, steps=2, schedule=pydiff.DiscreteBetas([1e-3] * 1000), prediction="epsilon")
    arguments = dict(seed=0, cond=cond, check_finite=False)
    with pytest.warns(UserWarning, match="nothing is hoisted"):
        result = sampler((2, 4, 8, 8), **arguments)
    assert torch.equal(result, sampler((2, 4, 8, 8), hoist=False, **arguments))
