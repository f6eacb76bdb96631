"""Products of linear layers by oneDNN against torch's own."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_gpt

from litgpt.lora import LoRALinear, LoRAQKVLinear
from litgpt.train import model as module
from litgpt.train.linear import linear, low_rank
from litgpt.train.model import TrainingModel, restore_forward

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24), (0, 24)])
def test_outputs_and_gradients_are_those_of_the_layer(bias, frozen, shape):
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=bias)
    layer.weight.requires_grad_(not frozen)
    x = torch.randn(shape, requires_grad=True)
    d_y = torch.randn(*shape[:-1], 40)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    ours, expected = linear(layer, x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours, expected)
    for own, plain in zip(
        torch.autograd.grad(ours, wanted, d_y), torch.autograd.grad(expected, wanted, d_y), strict=True
    ):
        torch.testing.assert_close(own, plain)


def test_other_precisions_are_left_to_torch():
    layer = torch.nn.Linear(24, 40)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(layer, x), layer(x))
    assert torch.equal(linear(layer.double(), x.double()), layer(x.double()))


def test_a_models_losses_and_gradients_stay(monkeypatch):
    found = []
    for faster in (False, True):
        monkeypatch.setattr(module, "replaces_torch", lambda faster=faster: faster)
        torch.manual_seed(0)
        model = tiny_gpt(bias=True).requires_grad_(True)
        ids = torch.randint(0, 100, (2, 20))
        loss = TrainingModel(model)(ids, ids)
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
        assert ("forward" in vars(model.lm_head)) == faster
        restore_forward(model)
        assert not any({"forward", "gated"} & set(vars(layer)) for layer in model.modules())
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qkv", "dora", "biased", "trained"])
def test_low_rank_layers_are_those_of_lora(dtype, kind):
    torch.manual_seed(0)
    sizes, options = (
        (24, 40),
        {"r": 3, "lora_alpha": 2, "bias": kind == "biased", "dtype": dtype, "dora": kind == "dora"},
    )
    if kind == "qkv":
        layer = LoRAQKVLinear(*sizes, 8, 3, 1, enable_lora=(True, False, True), **options)
    else:
        layer = LoRALinear(*sizes, **options)
    layer.linear.requires_grad_(kind == "trained")
    torch.nn.init.normal_(layer.lora_B)
    found = []
    for replaced in (False, True):
        if replaced:
            layer.with_matrices = partial(low_rank, layer)
        x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = layer(x)
        trained = [p for p in layer.parameters() if p.requires_grad]
        d_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        found.append([y, *torch.autograd.grad(y, [x, *trained], d_y)])
    error = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for plain, ours in zip(*found, strict=True):
        assert (plain - ours).norm() <= error * plain.norm()
