import pytest
import torch
from tiny import LLAMA, create_kv_caches, in_chunks, tiny_gpt

from litgpt.adapter import GPT as AdapterGPT
from litgpt.adapter import freeze_prefixes
from litgpt.adapter_v2 import (
    GPT,
    AdapterV2Linear,
    Config,
    adapter_filter,
    add_adapter_v2,
    mark_only_adapter_v2_as_trainable,
)
from litgpt.runners.packed_weights import PackedLinear, can_pack, pack_linears

FAMILIES = {
    "llama": {},
    "neox": {"mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm", "bias": True, "parallel_residual": True},
    "gemma": {"mlp_class_name": "GemmaMLP", "sliding_window_size": 6, "post_attention_norm": True},
    "moe": {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
}
FIELDS = {"n_layer": 3, "adapter_prompt_length": 5, "adapter_start_layer": 1}


def v2_gpt(**kwargs):
    """A small model with random weights, those of adapters too; two of three layers have a prefix of 5."""
    model = GPT(Config(**{**LLAMA, **FIELDS, **kwargs}))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    return model.eval().requires_grad_(False)


def folded_by_hand(model):
    """The same model without scales: linear layers have the weights scale W and the biases scale (b + bias)."""
    weights = model.state_dict()
    folded = {name: x for name, x in weights.items() if ".linear." not in name and "adapter_" not in name}
    folded |= {name: x for name, x in weights.items() if "adapter_wte" in name}
    for name in [name.removesuffix(".adapter_scale") for name in weights if name.endswith(".adapter_scale")]:
        scale, shift = weights[f"{name}.adapter_scale"], weights[f"{name}.adapter_bias"]
        folded[f"{name}.weight"] = scale[:, None] * weights[f"{name}.linear.weight"]
        folded[f"{name}.bias"] = scale * (shift + weights.get(f"{name}.linear.bias", torch.zeros(len(shift))))
    fields = {f: getattr(model.config, f) for f in Config.__dataclass_fields__ if f not in ("bias", "lm_head_bias")}
    plain = AdapterGPT(Config(**fields, bias=True, lm_head_bias=True))
    if "transformer.h.0.mlp.gate.weight" in folded:
        for block in plain.transformer.h:
            block.mlp.gate.bias = torch.nn.Parameter(torch.empty(model.config.n_expert))
    plain.load_state_dict(folded)
    return plain.eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_scaled_and_shifted_layers(family):
    model, idx = v2_gpt(**FAMILIES[family]), torch.randint(0, 100, (2, 20))
    torch.testing.assert_close(model(idx), folded_by_hand(model)(idx), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(20,), (1, 19), (7, 1, 7, 5)])
def test_caches_chunks_and_frozen_prefixes_change_nothing(family, lengths):
    model, idx = v2_gpt(**FAMILIES[family]), torch.randint(0, 100, (2, 20))
    expected = model(idx)
    freeze_prefixes(model)
    model.set_kv_caches(2)
    torch.testing.assert_close(in_chunks(model, idx, lengths), expected, atol=1e-5, rtol=1e-4)


def test_an_evicting_cache_gives_what_it_gives_with_folded_weights():
    model, idx = v2_gpt(), torch.randint(0, 100, (1, 40))
    plain = folded_by_hand(model)
    for gpt in (model, plain):
        gpt.assign_kv_caches(create_kv_caches("lastrec", gpt.config, 1, 8, n_sink=2))
    lengths = (12, 1, *(3,) * 9)
    torch.testing.assert_close(in_chunks(model, idx, lengths), in_chunks(plain, idx, lengths), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_new_model_computes_what_the_plain_one_does():
    base, model = tiny_gpt(n_layer=3), GPT(Config(**{**LLAMA, **FIELDS})).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    idx = torch.randint(0, 100, (1, 9))
    assert torch.equal(model(idx), base(idx))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_litgpt(family):
    names = set(v2_gpt(**FAMILIES[family]).state_dict())
    plain = set(tiny_gpt(n_layer=3, **FAMILIES[family]).state_dict())
    wrapped = {name for name in plain if ".attn." in name or ".mlp." in name or name.startswith("lm_head")}
    modules = {name.rsplit(".", 1)[0] for name in wrapped}
    expected = (plain - wrapped) | {".linear.".join(name.rsplit(".", 1)) for name in wrapped}
    expected |= {f"{module}.adapter_{kind}" for module in modules for kind in ("bias", "scale")}
    for layer in (1, 2):
        expected |= {f"transformer.h.{layer}.attn.{name}" for name in ("gating_factor", "adapter_wte.weight")}
    assert names == expected


def test_plain_and_old_names_load():
    model, base = v2_gpt(), tiny_gpt(n_layer=3)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    old = {name: x for name, x in weights.items() if ".linear." not in name} | base.state_dict()
    qkv = old.pop("transformer.h.0.attn.qkv.weight")
    q, k, v = qkv.view(8, 16, 64).split((4, 2, 2))  # 4 heads of queries, and 2 of keys and of values
    old["transformer.h.0.attn.attn.linear.weight"] = torch.cat((q[:2], k[:1], v[:1], q[2:], k[1:], v[1:])).flatten(0, 1)
    model.load_state_dict(old)
    assert torch.equal(model.transformer.h[0].attn.qkv.linear.weight, base.transformer.h[0].attn.qkv.weight)
    assert torch.equal(model.lm_head.linear.weight, base.lm_head.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_adapters_and_norms_only(family):
    model = v2_gpt(**FAMILIES[family])
    mark_only_adapter_v2_as_trainable(model)
    model(torch.randint(0, 100, (2, 20))).square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    expected = {name for name in model.state_dict() if adapter_filter(name, None)}
    assert reached == expected
    assert {"transformer.h.0.norm_1.weight", "transformer.ln_f.weight", "lm_head.adapter_scale"} < reached
    assert not any(".linear." in name or "wte" in name and "adapter" not in name for name in reached)


def test_the_gradient_of_bias_and_scale_is_that_of_the_formula():
    layer, x = AdapterV2Linear(6, 4, bias=True), torch.randn(5, 6)
    torch.nn.init.normal_(layer.adapter_bias)
    torch.nn.init.normal_(layer.adapter_scale)
    y = layer(x)
    torch.testing.assert_close(y, layer.adapter_scale * (layer.linear(x) + layer.adapter_bias))
    dy = torch.randn(5, 4)
    y.backward(dy)
    torch.testing.assert_close(layer.adapter_bias.grad, (dy * layer.adapter_scale).sum(0))
    torch.testing.assert_close(layer.adapter_scale.grad, (dy * (layer.linear(x) + layer.adapter_bias)).sum(0))


def test_what_is_trained_is_what_litgpt_saves():
    trained = ("attn.adapter_wte.weight", "attn.gating_factor", "mlp.fc.adapter_bias", "norm_1.weight", "norm_2.bias")
    assert all(adapter_filter(f"transformer.h.0.{name}", None) for name in trained)
    frozen = ("attn.qkv.linear.bias", "attn.norm_q.weight", "post_attention_norm.weight", "post_mlp_norm.weight")
    assert not any(adapter_filter(f"transformer.h.0.{name}", None) for name in frozen)
    assert adapter_filter("transformer.ln_f.weight", None)
    assert not adapter_filter("lm_head.linear.weight", None)


def test_a_loaded_model_gets_adapters_in_place():
    model, reference = tiny_gpt(n_layer=3), v2_gpt()
    add_adapter_v2(model, reference.config)
    model.load_state_dict(reference.state_dict())
    idx = torch.randint(0, 100, (2, 9))
    assert torch.equal(model(idx), reference(idx))


@pytest.mark.skipif(
    not can_pack(torch.empty(1, 1, dtype=torch.bfloat16)), reason="no packed bfloat16 products on this machine"
)
def test_packed_layers_inside_give_the_same_logits():
    model, idx = v2_gpt().to(torch.bfloat16), torch.randint(0, 100, (2, 9))
    before = model(idx)
    freeze_prefixes(model)
    pack_linears(model)
    assert isinstance(model.transformer.h[0].attn.qkv.linear, PackedLinear)
    torch.testing.assert_close(model(idx), before, atol=0.25, rtol=0.1)


def test_a_named_model():
    model = GPT.from_name("pythia-14m", n_layer=3, adapter_prompt_length=4)
    model.apply(model._init_weights)
    assert model.transformer.h[2].attn.adapter_wte.weight.shape == (4, 128)
    assert model.lm_head.adapter_scale.eq(1).all()
