import copy
import ctypes
import pickle

import pytest
import torch
from tiny import tiny_gpt

from litgpt.runners.packed_weights import PackedLinear, can_pack, pack_linears, unpack_linears

pytestmark = pytest.mark.skipif(
    not can_pack(torch.empty(1, 1, dtype=torch.bfloat16)), reason="no packed bfloat16 products on this machine"
)


def bf16_gpt(**kwargs):
    return tiny_gpt(**kwargs).to(torch.bfloat16)


@pytest.mark.parametrize(
    "flags",
    [{}, {"bias": True, "lm_head_bias": True}, {"mlp_class_name": "GptNeoxMLP"}, {"mlp_class_name": "GemmaMLP"}],
)
@pytest.mark.parametrize("T", [1, 7, 64])
def test_packed_layers_give_the_same_logits(flags, T):
    model, idx = bf16_gpt(**flags), torch.randint(0, 100, (2, T))
    plain = model(idx)
    pack_linears(model)
    assert isinstance(model.transformer.h[0].attn.qkv, PackedLinear)
    torch.testing.assert_close(model(idx), plain, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("bias", [False, True])
def test_the_state_dict_is_that_of_the_plain_model(bias):
    model = bf16_gpt(bias=bias)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    pack_linears(model)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_weights_are_not_held_twice_and_come_back_as_the_same_parameters():
    model = bf16_gpt()
    parameters = dict(model.named_parameters())
    before = {name: x.detach().clone() for name, x in parameters.items()}
    pack_linears(model)
    assert parameters["transformer.h.0.mlp.fc_1.weight"].numel() == 0
    unpack_linears(model)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, before[name])


def test_an_embedding_keeps_the_weight_that_it_shares_with_the_head():
    model = bf16_gpt()
    model.lm_head.weight = model.transformer.wte.weight
    idx = torch.randint(0, 100, (1, 5))
    plain, names = model(idx), set(model.state_dict())
    pack_linears(model)
    for length in (5, 1):  # one token takes a way of its own
        torch.testing.assert_close(model(idx[:, :length]), plain[:, :length], atol=0.05, rtol=0.05)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert set(model.state_dict()) == names
    unpack_linears(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model(idx), plain)


def test_what_cannot_be_packed_stays():
    model = tiny_gpt()
    pack_linears(model)
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_copy_has_packed_weights_of_its_own(is_tied, copied):
    model, idx = bf16_gpt(bias=True), torch.randint(0, 100, (1, 5))
    if is_tied:
        model.lm_head.weight = model.transformer.wte.weight
    pack_linears(model)
    expected, weights = model(idx), model.state_dict()
    other = copied(model)
    for start, end in (
        part for layer in model.modules() if isinstance(layer, PackedLinear) for part in layer.packed_ranges()
    ):
        ctypes.memset(start, 0, end - start)  # the copy is not to read these
    assert not torch.equal(model(idx), expected)
    assert torch.equal(other(idx), expected)
    unpack_linears(other)
    assert (other.lm_head.weight is other.transformer.wte.weight) == is_tied
    assert all(torch.equal(weight, weights[name]) for name, weight in other.state_dict().items())
