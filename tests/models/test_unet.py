"""The shipped U-Net, through its public interface."""

import pytest
import torch

from pydiff.models import UNet

SMALL = {"channels": (8, 16, 16), "blocks": (1, 1, 1), "embedding_dim": 16, "head_dim": 8, "groups": 4}


@pytest.fixture
def model():
    """A narrow network with random weights everywhere: the zero-initialised ones would hide most of it."""
    torch.manual_seed(0)
    net = UNet(**SMALL)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return net.eval().requires_grad_(False)


def inputs(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 28, 28, generator=generator)
    return x, torch.rand(n, generator=generator), torch.randint(0, 10, (n,), generator=generator)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_output_has_the_shape_of_the_sample(model, n):
    x, t, labels = inputs(n)
    out = model(x, t, labels)
    assert out.shape == x.shape and out.dtype == torch.float32


def test_no_labels_means_the_null_label(model):
    x, t, labels = inputs(3)
    null = torch.full((3,), model.null_label)
    assert torch.equal(model(x, t), model(x, t, null))
    assert not torch.allclose(model(x, t), model(x, t, labels))


def test_one_time_serves_every_row(model):
    x, _, labels = inputs(3)
    one = model(x, torch.tensor(0.37), labels)
    assert torch.equal(one, model(x, torch.full((3,), 0.37), labels))
    assert not torch.allclose(one, model(x, torch.tensor(0.40), labels))


def test_a_row_does_not_depend_on_the_others(model):
    """Bit for bit at one batch size; across batch sizes the CPU libraries block sums differently: 1e-5 of the range."""
    x, t, labels = inputs(4)
    out = model(x, t, labels)
    other_x, other_t, other_labels = inputs(4, seed=1)
    other_x[2], other_t[2], other_labels[2] = x[2], t[2], labels[2]
    mixed = model(other_x, other_t, other_labels)
    assert torch.equal(mixed[2], out[2])
    alone = model(x[2:3], t[2:3], labels[2:3])[0]
    assert (alone - out[2]).abs().max() <= 1e-5 * out[2].abs().max()
    assert not torch.allclose(mixed[1], out[1])  # the comparison can fail


def test_bfloat16_stays_near_float32(model):
    x, t, labels = inputs(2)
    exact = model(x, t, labels)
    out = model.to(torch.bfloat16)(x.bfloat16(), t, labels)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_a_fresh_network_predicts_zero_and_learns():
    net = UNet(**SMALL)
    x, t, labels = inputs(2)
    out = net(x, t, labels)
    assert out.abs().max() == 0
    (out - 1).square().mean().backward()
    assert net.conv_out.bias.grad.abs().max() > 0


def test_parameter_budget_and_what_other_parts_read():
    assert sum(p.numel() for p in UNet().parameters()) <= 2_500_000
    assert UNet.schedule_config == {"schedule": "VPCosine", "s": 0.008}
    assert UNet.prediction == "v_prediction"
    assert UNet.sample_shape == (1, 28, 28)
    assert (UNet.num_classes, UNet.null_label) == (10, 10)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"channels": (8, 16)}, "channels"),
        ({"channels": (8, 16, 18)}, "groups"),
        ({"blocks": (1, 0, 1)}, "blocks"),
        ({"head_dim": 6}, "head_dim"),
        ({"embedding_dim": 15}, "embedding_dim"),
        ({"channels": (8,) * 4, "blocks": (1,) * 4, "attention": (False,) * 4}, "divisible by 8"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_by_name(change, word):
    with pytest.raises(ValueError, match=word):
        UNet(**{**SMALL, **change})


def test_forward_never_waits_for_the_device(model):
    """On the meta device there is no value to read: any branch on one raises."""
    meta = model.to("meta")
    x, t, labels = (a.to("meta") for a in inputs(2))
    assert meta(x, t, labels).shape == x.shape
    assert meta(x, t).shape == x.shape


def test_forward_is_one_graph(model):
    """No graph break anywhere in forward, with labels and without: tracing alone, so that it takes seconds."""
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x, t, labels = inputs(2)
    assert torch.equal(compiled(x, t, labels), model(x, t, labels))
    assert torch.equal(compiled(x, t), model(x, t))


@pytest.mark.slow
def test_compiled_agrees_with_eager(model):
    x, t, labels = inputs(2)
    expected = model(x, t, labels)
    out = torch.compile(model, fullgraph=True)(x, t, labels)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_the_cpu(model):
    x, t, labels = inputs(3)
    expected = model(x, t, labels)
    out = model.cuda()(x.cuda(), t.cuda(), labels.cuda()).cpu()
    assert (out - expected).square().mean().sqrt() < 2e-3 * expected.std()  # TF32 convolutions
