"""Kernels are counted by the rules of `pydiff.check.launches`, and whole models come out as counted by hand.

952 kernels of an SD1.5 U-Net call (2 latents of 64x64, bfloat16), 1972 of SDXL's and 229 of its VAE decoder are sums
over their layers, with 3 for a GroupNorm, 2 for a convolution with its bias and 1 for everything else. What such a list
leaves out is counted here as well, and named in the tests.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import unet_models
from pydiff.check import launches
from pydiff.check.launches import count_launches, fake_cuda

META = torch.device("meta")
with META:  # torch lists its constructors at the first use of a device context: before the tests replace torch.empty
    torch.empty(1)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return fake_cuda(meta(*shape, dtype=dtype))


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last)


def counted(function, *args, **kwargs) -> dict[str, int]:
    return dict(count_launches(function, *args, **kwargs).by_name)


# ---------------------------------------------------------------------------- the rules


def test_views_allocations_and_metadata_launch_nothing():
    x = fake(2, 8, 4, 4)

    def function(x):
        y = x.view(2, 8, 16).transpose(1, 2).unflatten(2, (2, 4))[:, None, ..., 1:].detach()
        torch.empty_like(x), x.new_empty(3), x.stride(), x.shape, y.chunk(2), x.contiguous(), x.to(x.dtype)

    assert counted(function, x) == {}


def test_what_computes_launches_one_kernel_each():
    x = fake(2, 8, 4, 4)
    assert counted(lambda x: F.silu(x + 1) * x, x) == {"add": 1, "silu": 1, "mul": 1}
    assert counted(lambda x: torch.cat([x, x], 1), x) == {"cat": 1}
    assert counted(lambda x: x.float(), x) == {"_to_copy": 1}
    assert counted(lambda x: x.mT.contiguous(), x) == {"clone": 1}
    assert counted(lambda x: x.mT.reshape(2, -1), x) == {"clone": 1}
    assert counted(lambda x: F.interpolate(x, scale_factor=2.0), x) == {"upsample_nearest2d": 1}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout, converted", [("NCHW", 0), ("NHWC", 0), ("mixed", 1)])
def test_a_convolution_pays_for_its_bias_and_for_a_layout_that_differs(bias, layout, converted):
    conv = nn.Conv2d(8, 16, 3, bias=bias, device=META)
    x = meta(2, 8, 6, 6, dtype=torch.float32)
    if layout != "NCHW":
        conv = nhwc(conv)
    x = fake_cuda(nhwc(x) if layout == "NHWC" else x)
    seen = []
    found = counted(lambda conv, x: seen.append(conv(x)), fake_cuda(conv), x)
    assert found == {"convolution": 1 + bias + converted}
    assert seen[0].shape == (2, 16, 4, 4)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) == (layout != "NCHW")


def test_a_group_norm_is_three_kernels_and_a_copy_for_channels_last():
    norm = fake_cuda(nn.GroupNorm(4, 8, device=META))
    x = meta(2, 8, 4, 4, dtype=torch.float32)
    assert counted(norm, fake_cuda(x)) == {"native_group_norm": 3}
    seen = []
    assert count_launches(lambda x: seen.append(norm(x)), fake_cuda(nhwc(x))).total == 4
    assert seen[0].is_contiguous()
    plain = fake_cuda(nn.GroupNorm(4, 8, affine=False, device=META))
    assert counted(plain, fake_cuda(x)) == {"native_group_norm": 2}


def test_a_layer_norm_is_one_kernel_two_for_odd_widths_and_a_copy_for_a_transposed_input():
    def norm(width):
        return fake_cuda(nn.LayerNorm(width, device=META))

    assert counted(norm(8), fake(2, 3, 8, dtype=torch.float32)) == {"native_layer_norm": 1}
    assert counted(norm(9), fake(2, 3, 9, dtype=torch.float32)) == {"native_layer_norm": 2}
    assert counted(lambda x: norm(8)(x.mT), fake(2, 8, 3, dtype=torch.float32)) == {"native_layer_norm": 2}


def test_a_linear_layer_is_one_kernel_with_its_bias_unless_its_input_has_to_be_copied():
    linear = fake_cuda(nn.Linear(8, 16, device=META))
    for shape in ((5, 8), (2, 5, 8)):
        assert counted(linear, fake(*shape, dtype=torch.float32)) == {"addmm": 1}
    transposed = count_launches(lambda x: linear(x.mT), fake(2, 8, 5, dtype=torch.float32))
    assert transposed.total == 3 and transposed.by_name["clone"] == transposed.by_name["mm"] == 1
    x = fake(4, 4)
    assert counted(torch.addmm, x, x, x) == {"addmm": 2}  # its addend is copied into the result
    assert counted(lambda x: torch.baddbmm(x, x, x, beta=0), fake(2, 4, 4)) == {"baddbmm": 1}


@pytest.mark.parametrize("device", ["fake", "cpu"])
def test_attention_is_one_kernel_and_its_output_needs_no_copy_to_join_the_heads(device):
    make = fake if device == "fake" else (lambda *shape: torch.zeros(shape))
    q, k = make(2, 5, 4, 8).transpose(1, 2), make(2, 7, 4, 8).transpose(1, 2)
    seen = []
    found = counted(lambda q, k: seen.append(F.scaled_dot_product_attention(q, k, value=k)), q, k)
    assert found == {"scaled_dot_product_attention": 1} and seen[0].shape == (2, 4, 5, 8)
    if device == "fake":
        joined = counted(lambda q: F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(2, 5, 32), q)
        assert joined == {"scaled_dot_product_attention": 1}


def test_copies_from_the_host_and_work_on_the_host_are_no_launches_of_the_device():
    x = fake(3, dtype=torch.float32)
    assert counted(lambda x: x + torch.linspace(0, 1, 3).exp().to(x.device), x) == {"add": 1}


def test_an_operator_of_the_package_counts_what_its_module_says(monkeypatch):
    library = torch.library.Library("pydiff", "FRAGMENT")
    library.define("launch_test(Tensor x, int parts, bool twice=False) -> Tensor")
    library.define("launch_test_silent(Tensor x) -> Tensor")
    for name, function in (
        ("launch_test", lambda x, parts, twice=False: x * parts + parts),
        ("launch_test_silent", lambda x: x * 2 + 1),
    ):
        library.impl(name, function, "CompositeExplicitAutograd")
    monkeypatch.setattr(launches, "_launch_functions", dict)
    assert counted(torch.ops.pydiff.launch_test_silent, fake(3)) == {"pydiff::launch_test_silent": 1}  # nobody says
    said = {"launch_test": lambda x, parts, twice=False: parts * (1 + twice), "other": lambda: 3}
    monkeypatch.setattr(launches, "_launch_functions", lambda: said)
    op, silent = torch.ops.pydiff.launch_test, torch.ops.pydiff.launch_test_silent
    for x in (fake(3), torch.zeros(3)):
        assert counted(lambda x: op(x, 2, True), x) == {"pydiff::launch_test": 4}
    said["launch_test"] = lambda: 3  # takes no arguments
    assert counted(lambda x: op(x, 2), fake(3)) == {"pydiff::launch_test": 3}
    assert counted(silent, fake(3)) == {"pydiff::launch_test_silent": 3}  # a form of the other


# ---------------------------------------------------------------------------- fake and real tensors


@pytest.mark.parametrize(
    "index",
    [
        None,
        1,
        -1,
        slice(1, 3),
        Ellipsis,
        (slice(None), None),
        (..., None),
        (0, ..., 2),
        (None, ..., slice(0, 4, 2)),
        (slice(None), [0, 2]),
        (slice(None), 1, None, ..., -1),
        (slice(None), None, None, [1, 0, 1]),
    ],
)
def test_indexing_a_fake_tensor_gives_the_shape_and_strides_of_indexing(index):
    x = torch.zeros(4, 5, 6)
    seen = []
    count_launches(lambda x: seen.append(x[index]), fake_cuda(x))
    wanted = x[index]
    assert seen[0].shape == wanted.shape and seen[0].stride() == wanted.stride()
    assert seen[0].device == torch.device("cuda", 0)


def test_fake_copies_leave_the_original_alone_and_keep_its_layout():
    model = nhwc(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))).eval()
    shared = model[0].weight
    copied, inputs = fake_cuda((model, {"x": [torch.zeros(1, 4, 5, 5), 3]}))
    assert model[0].weight is shared and shared.device.type == "cpu" and torch.isfinite(shared).all()
    assert copied[0].weight.device.type == "cuda" and copied[0].weight.stride() == shared.stride()
    assert copied[1].running_mean.device.type == "cuda" and isinstance(copied[0].weight, nn.Parameter)
    assert inputs["x"][1] == 3 and inputs["x"][0].shape == (1, 4, 5, 5) and not copied.training
    assert count_launches(copied, *inputs["x"][:1]).total == 3 + 1  # channels_last weight: x is converted


def test_real_tensors_are_computed_and_counted_by_the_same_rules():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
    seen = []
    x = torch.randn(2, 4, 5, 5)
    real = count_launches(lambda x: seen.append(model(x)), x)
    assert torch.equal(seen[0], model(x).detach()) and not seen[0].requires_grad
    assert real.by_name == count_launches(fake_cuda(model), fake_cuda(x)).by_name and real.total == 6
    assert str(real).splitlines()[:2] == ["     6 kernels", "     3 native_group_norm"]


@pytest.mark.parametrize(
    "wrap", [lambda m, x: (m.forward, x), lambda m, x: (functools.partial(m, x),), lambda m, x: (lambda: m(x),)]
)
def test_fake_tensors_are_found_in_methods_partial_functions_and_closures(wrap):
    model, x = fake_cuda((nn.Linear(4, 4, device=META), meta(2, 4, dtype=torch.float32)))
    assert count_launches(*wrap(model, x)).total == 1


# ---------------------------------------------------------------------------- whole models


TIME = 12  # sinusoids of a time: two casts, arange, exp, sin, cos, two cat, three products and a quotient


def model_launches(name: str, channels_last: bool = False) -> launches.Launches:
    pytest.importorskip("diffusers")
    workload = unet_models.WORKLOADS[name]
    model, inputs = fake_cuda(workload.build(META, torch.bfloat16, channels_last=channels_last))
    return count_launches(model, **inputs)


@pytest.mark.parametrize("channels_last, layers", [(False, 952), (True, 1074)])
def test_sd15_has_as_many_kernels_as_its_layers_have(channels_last, layers):
    assert model_launches("sd15_512_b2", channels_last).total == layers + TIME


def test_sdxl_has_as_many_kernels_as_its_layers_have():
    joined = 2  # the micro-conditioning, to the text's embedding and to the time's
    assert model_launches("sdxl_1024_b2").total == 1972 + 2 * TIME + joined
    found = model_launches("sdxl_1024_b2", channels_last=True).by_name
    assert found["native_group_norm"] == 3 * 46 and found["scaled_dot_product_attention"] == 140


def test_the_vae_decoder_has_as_many_kernels_as_its_layers_have():
    separate = 2 * 3  # q, k and v: the tokens are not contiguous, so each copies them and adds its bias afterwards
    convolutions, norms = 3, 11  # the attention leaves a channels_last tensor behind: layouts are converted from there
    assert model_launches("vae_decode_1024_b1").total == 229 + separate + convolutions + norms
