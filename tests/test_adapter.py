import math

import pytest
import torch
from tiny import LATENT, LLAMA, create_kv_caches, in_chunks, tiny_gpt

from litgpt.adapter import (
    GPT,
    CausalSelfAttention,
    Config,
    adapter_filter,
    add_prefixes,
    freeze_prefixes,
    mark_only_adapter_as_trainable,
)
from litgpt.model import CausalSelfAttention as PlainAttention
from litgpt.runners.packed_weights import can_pack, pack_linears

FAMILIES = {
    "llama": {},
    "neox": {"mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm", "bias": True, "parallel_residual": True},
    "gemma": {
        "mlp_class_name": "GemmaMLP",
        "sliding_window_size": 6,
        "sliding_window_indices": [1, 0, 1],
        "attention_logit_softcapping": 5.0,
        "attention_scores_scalar": 9,
        "norm_qk": True,
        "post_attention_norm": True,
    },
    "multi-query": {"n_query_groups": 1},
}


def adapter_gpt(**kwargs):
    """A small model with random weights, gates too; two of three layers have a prefix of 5."""
    fields = {"n_layer": 3, "adapter_prompt_length": 5, "adapter_start_layer": 1}
    model = GPT(Config(**{**LLAMA, **fields, **kwargs}))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def attention_by_hand(attn, x, rope):
    """softmax(q K) V + gate softmax(q K_p) V_p, head by head for a batch of one; x (1, T, E), before the projection."""
    config = attn.config
    H, G, D = config.n_head, config.n_query_groups, config.head_size
    T = x.shape[1]
    q, k, v = attn.qkv(x[0]).view(T, H + 2 * G, D).transpose(0, 1).split((H, G, G))
    if config.norm_qk:
        q, k = attn.norm_q(q), attn.norm_k(k)
    cos, sin = (table[0, 0] for table in rope)

    def turn(heads):
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat((second, first), -1) * sin  # the sine's first half has the minus

    q, k = turn(q), turn(k)
    learned = attn.qkv(attn.adapter_wte.weight).view(-1, G, H // G + 2, D)
    window = config.window(attn.block_idx) or T
    outputs = []
    for head in range(H):
        group = head // (H // G)
        scale = 1 / math.sqrt(config.attention_scores_scalar or D)

        def weights(keys, visible, scale=scale, head=head):
            scores = q[head] @ keys.T * scale
            if (cap := config.attention_logit_softcapping) is not None:
                scores = cap * torch.tanh(scores / cap)
            return scores.masked_fill(~visible, -math.inf).softmax(-1)

        distance = torch.arange(T)[:, None] - torch.arange(T)
        y = weights(k[group], (distance >= 0) & (distance < window)) @ v[group]
        keys, values = learned[:, group, -2], learned[:, group, -1]
        gate = attn.gating_factor[0, 0, head]
        outputs.append(y + gate * (weights(keys, torch.tensor(True)) @ values))
    return torch.cat(outputs, -1)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_the_formula(family):
    fields = {k: v for k, v in FAMILIES[family].items() if k != "mlp_class_name"}
    model = adapter_gpt(**{**fields, "rotary_percentage": 1.0})
    x, rope = torch.randn(1, 12, 64), model.rope_rows(0, 12)
    for block in model.transformer.h[1:]:
        expected = block.attn.proj(attention_by_hand(block.attn, x, rope[0]))
        torch.testing.assert_close(block.attn(x, rope), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(20,), (1, 19), (7, 1, 7, 5)])
def test_caches_chunks_and_frozen_prefixes_change_nothing(family, lengths, frozen):
    model = adapter_gpt(**FAMILIES[family])
    idx = torch.randint(0, 100, (2, 20))
    expected = model(idx)
    if frozen:
        freeze_prefixes(model)
    model.set_kv_caches(2)
    torch.testing.assert_close(in_chunks(model, idx, lengths), expected, atol=1e-5, rtol=1e-5)


def test_rows_of_a_batch_are_what_they_are_alone():
    model, idx = adapter_gpt(), torch.randint(0, 100, (3, 11))
    alone = torch.cat([model(row[None]) for row in idx])
    torch.testing.assert_close(model(idx), alone, atol=1e-5, rtol=1e-5)


def test_the_prefix_is_seen_also_when_the_cache_has_dropped_the_beginning():
    model = adapter_gpt(n_layer=2)
    model.assign_kv_caches(create_kv_caches("lastrec", model.config, 1, 8))
    idx = torch.randint(0, 100, (1, 30))
    cached = in_chunks(model, idx, [1] * 30)
    plain = adapter_gpt(n_layer=2, sliding_window_size=8, sliding_window_indices=[1, 1])
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(cached, plain(idx), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gates_begin_closed():
    base, model = tiny_gpt(n_layer=3), GPT(Config(**{**LLAMA, "n_layer": 3})).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    idx = torch.randint(0, 100, (1, 9))
    assert torch.equal(model(idx), base(idx))
    for block in model.transformer.h[2:]:
        block.attn.gating_factor.data.fill_(0.5)
    assert not torch.equal(model(idx), base(idx))


def test_names_and_shapes_are_those_of_litgpt():
    model, base = GPT(Config(**{**LLAMA, "n_layer": 4})), tiny_gpt(n_layer=4)
    added = {name: tuple(x.shape) for name, x in model.state_dict().items() if name not in base.state_dict()}
    expected = {}
    for layer in (2, 3):  # LitGPT begins in the third layer, and has ten tokens
        expected[f"transformer.h.{layer}.attn.gating_factor"] = (1, 1, 4, 1)
        expected[f"transformer.h.{layer}.attn.adapter_wte.weight"] = (10, 64)
    assert added == expected
    assert set(added) == {name for name in model.state_dict() if adapter_filter(name, None)}
    assert set(base.state_dict()) < set(model.state_dict())
    freeze_prefixes(model)
    assert set(model.state_dict()) == set(base.state_dict()) | set(added)


def test_gates_of_older_checkpoints_load():
    model = adapter_gpt()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    name = "transformer.h.1.attn.gating_factor"
    gates = weights[name].flatten()
    model.transformer.h[1].attn.gating_factor.zero_()
    model.load_state_dict({**weights, name: gates.view(1, 4, 1, 1)})
    assert torch.equal(model.transformer.h[1].attn.gating_factor, gates.view(1, 1, 4, 1))


def test_a_loaded_model_gets_prefixes_in_place():
    model, reference = tiny_gpt(n_layer=3), adapter_gpt()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    add_prefixes(model, reference.config)
    assert type(model.transformer.h[0].attn) is PlainAttention
    assert type(model.transformer.h[1].attn) is CausalSelfAttention
    assert {name: id(p) for name, p in model.named_parameters() if not adapter_filter(name, p)} == parameters
    model.load_state_dict(reference.state_dict())
    idx = torch.randint(0, 100, (2, 9))
    assert torch.equal(model(idx), reference(idx))


def test_gradients_reach_prefixes_only():
    model = adapter_gpt()
    mark_only_adapter_as_trainable(model)
    model(torch.randint(0, 100, (2, 9))).square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name in model.state_dict() if adapter_filter(name, None)}


def test_the_gradient_of_a_gate_is_its_slope():
    model = adapter_gpt().double()
    mark_only_adapter_as_trainable(model)
    idx, gate = torch.randint(0, 100, (1, 6)), model.transformer.h[1].attn.gating_factor
    model(idx).square().mean().backward()
    values = []
    with torch.no_grad():
        for step in (1e-4, -2e-4):
            gate[0, 0, 2] += step
            values.append(model(idx).square().mean())
    torch.testing.assert_close(gate.grad[0, 0, 2, 0], (values[0] - values[1]) / 2e-4, rtol=1e-4, atol=1e-7)


def test_training_opens_gates_that_begin_closed():
    model = GPT(Config(**{**LLAMA, "adapter_start_layer": 0}))
    model.apply(model._init_weights)
    mark_only_adapter_as_trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    idx, losses = torch.randint(0, 100, (2, 16)), []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01
    assert model.transformer.h[0].attn.gating_factor.any()


def test_frozen_prefixes_are_not_computed_again():
    model, idx = adapter_gpt(), torch.randint(0, 100, (1, 9))
    expected = model(idx)
    freeze_prefixes(model)
    model.transformer.h[1].attn.adapter_wte.weight.zero_()
    torch.testing.assert_close(model(idx), expected)


def test_frozen_prefixes_move_with_the_model():
    model = adapter_gpt()
    freeze_prefixes(model)
    idx = torch.randint(0, 100, (1, 9))
    expected = model(idx).double()
    torch.testing.assert_close(model.double()(idx), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(
    not can_pack(torch.empty(1, 1, dtype=torch.bfloat16)), reason="no packed bfloat16 products on this machine"
)
@pytest.mark.parametrize("frozen", [False, True])
def test_packed_layers_give_the_same_logits(frozen):
    model, idx = adapter_gpt().to(torch.bfloat16), torch.randint(0, 100, (2, 9))
    before = model(idx)
    if frozen:
        freeze_prefixes(model)
    pack_linears(model)
    torch.testing.assert_close(model(idx), before, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter_prompt_length": 0}, "adapter_prompt_length = 0"),
        ({"adapter_start_layer": -1}, "adapter_start_layer = -1"),
        (LATENT, "adapters need ordinary attention"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**{**LLAMA, **fields})


def test_a_named_model():
    model = GPT.from_name("pythia-14m", n_layer=3, adapter_prompt_length=4)
    assert model.transformer.h[2].attn.adapter_wte.weight.shape == (4, 128)
