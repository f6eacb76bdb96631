"""Parts of a training step by kernels, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litgpt.kernels import training
from litgpt.kernels.library import library
from litgpt.model import RMSNorm
from litgpt.rope import rotate

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels")
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCES)


def check(ours, inputs, exactly):
    """Outputs and gradients of a function of tensors, which are leaves."""
    dtype = inputs[0].dtype
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = ours(*inputs), exactly(*exact)
    assert y.dtype == dtype
    d_y = torch.randn(y.shape).to(dtype)
    found, wanted = torch.autograd.grad(y, inputs, d_y), torch.autograd.grad(expected, exact, d_y.double())
    for a, b in zip((y, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * max(1, b.abs().max().item())
        )


def leaf(*shape, dtype, scale=1.0):
    return (scale * torch.randn(shape)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", training.GATES)
@pytest.mark.parametrize("size", [1, 16, 37, 4096, 9001])
def test_gated_products(dtype, activation, size):
    torch.manual_seed(0)
    act = F.silu if activation == "silu" else lambda gate: F.gelu(gate, approximate="tanh")
    inputs = leaf(size, dtype=dtype, scale=4), leaf(size, dtype=dtype)
    check(lambda gate, x: training.gated(activation, None, gate, x), inputs, lambda gate, x: act(gate) * x)
    extreme = torch.tensor([-1e4, 1e4, -100.0, 0.0], dtype=dtype, requires_grad=True)
    y = training.gated(activation, None, extreme, torch.ones_like(extreme))
    torch.testing.assert_close(y, torch.tensor([0.0, 1e4, 0.0, 0.0], dtype=dtype), rtol=0, atol=1e-20)
    (gradient,) = torch.autograd.grad(y.sum(), extreme)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1.0, 0.0, 0.5], dtype=dtype), rtol=0, atol=1e-20)


def test_other_activations_are_left_to_torch():
    x = torch.randn(4)
    assert training.gated("clamped", lambda gate, x: "plain", x, x) == "plain"
    assert training.gated("silu", lambda gate, x: "plain", x.double(), x.double()) == "plain"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [False, True])
def test_norms(dtype, offset):
    torch.manual_seed(0)
    layer = RMSNorm(48, eps=1e-5, add_unit_offset=offset)
    layer.weight = nn.Parameter(leaf(48, dtype=dtype).detach())

    def ours(x, weight):
        layer.weight.data.copy_(weight)
        return training._Normed.apply(x, weight, layer.eps, float(offset))

    check(
        ours,
        (leaf(2, 7, 48, dtype=dtype, scale=3), leaf(48, dtype=dtype)),
        lambda x, w: F.rms_norm(x, (48,), w + offset, 1e-5),
    )
    x = leaf(5, 48, dtype=dtype)
    assert training.norm(layer, x).grad_fn.name().startswith("_Normed")
    torch.testing.assert_close(training.norm(layer, x), layer(x), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations(dtype):
    torch.manual_seed(0)
    angles = torch.rand(9, 32)
    cos = torch.cat((angles.cos(), angles.cos()), -1)[None, None].to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)[None, None].to(dtype)
    x = leaf(1, 9, 5 * 64, dtype=dtype)

    def heads(x):
        return x.view(1, 9, 5, 64).transpose(1, 2)[:, 1:4]

    assert training.can_rotate(heads(x), cos, sin)
    assert not training.can_rotate(heads(x.detach()), cos, sin)
    check(lambda x: rotate(heads(x), (cos, sin)), (x,), lambda x: rotate(heads(x), (cos.double(), sin.double())))


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_of_logits(dtype):
    torch.manual_seed(0)
    logits, labels = (5 * torch.randn(7, 64)).to(dtype), torch.randint(0, 64, (7,))
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    losses = training.next_token_losses(logits, labels, 0.5)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), 0.5 * gradient, rtol=1e-2, atol=1e-5)
    assert training.next_token_losses(torch.zeros(2, 63), labels[:2], 1.0) is None


def test_logits_that_something_has_kept_are_not_lost_unseen():
    x = torch.randn(2, 16, requires_grad=True)
    logits = x.tanh()  # keeps what it gives
    training.next_token_losses(logits.detach(), torch.tensor([1, 2]), 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(dtype):
    torch.manual_seed(0)
    layer, x = nn.Dropout(0.05), torch.ones(1000, 1003, dtype=dtype, requires_grad=True)
    y = training.dropout(layer, x)
    dropped = y == 0
    assert torch.equal(y[~dropped], torch.full_like(y[~dropped], 1 / 0.95))
    assert abs(dropped.double().mean() - 0.05) < 0.001  # 4.6 standard deviations
    rate = (0.05 * 0.95 / 1000) ** 0.5
    for dim in (0, 1):
        assert 0.9 * rate < dropped.double().mean(dim).std() < 1.1 * rate
    flat = dropped.flatten().double() - 0.05
    for distance in (1, 2, 16, 1003):
        assert abs((flat[:-distance] * flat[distance:]).mean() / 0.0475) < 0.005
    other = training.dropout(layer, x) == 0
    assert abs((dropped & other).double().mean() - 0.0025) < 0.0003
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)  # the same mask
    torch.manual_seed(0)
    assert torch.equal(training.dropout(layer, x), y)
    layer.eval()
    assert training.dropout(layer, x) is x
