import copy

import pytest
import torch
from tiny import LATENT, LLAMA, create_kv_caches, in_chunks, tiny_gpt

import litgpt.model
from litgpt import adapter_v2, lora
from litgpt.lora import (
    GPT,
    Config,
    LoRALinear,
    LoRAQKVLinear,
    add_lora,
    finish_lora,
    lora_filter,
    mark_only_lora_as_trainable,
    merge_lora_weights,
    unwrap_lora,
)
from litgpt.model import GPT as BaseModel
from litgpt.runners.packed_weights import PackedLinear, can_pack, pack_linears, unpack_linears
from litgpt.runners.quantized_weights import quantize_model

ALL = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp", "head")}
FAMILIES = {
    "llama": {},
    "neox": {"mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm", "bias": True, "parallel_residual": True},
    "gemma": {
        "mlp_class_name": "GemmaMLP",
        "sliding_window_size": 6,
        "sliding_window_indices": [1, 0],
        "attention_logit_softcapping": 5.0,
        "norm_qk": True,
        "post_attention_norm": True,
    },
    "moe": {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
}


def lora_gpt(**kwargs):
    """A small model with random weights, LoRA's too."""
    model = GPT(Config(**{**LLAMA, "lora_r": 3, "lora_alpha": 7, **kwargs}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


def merged_by_hand(model):
    """A plain model whose weights are W + (alpha / r) B A, part by part for queries, keys and values."""
    config = model.config
    scale = config.lora_alpha / config.lora_r
    heads = (config.n_head, config.n_query_groups, config.n_query_groups)
    ends = torch.tensor(heads).mul(config.head_size).cumsum(0).tolist()
    weights = model.state_dict()
    plain = {name.replace("linear.", ""): x.clone() for name, x in weights.items() if not lora_filter(name, x)}
    for name in [name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A")]:
        A, B, W = weights[f"{name}.lora_A"], weights[f"{name}.lora_B"], plain[f"{name}.weight"]
        if name.endswith("qkv"):
            first = 0
            for part, which in enumerate(("query", "key", "value")):
                if getattr(config, f"lora_{which}"):
                    rows = slice(([0] + ends)[part], ends[part])
                    size = rows.stop - rows.start
                    W[rows] += scale * B[first : first + size] @ A[: config.lora_r]
                    A, first = A[config.lora_r :], first + size
            assert first == len(B)
            assert len(A) == 0
        else:
            W += scale * B @ A
    base = BaseModel(model.config)
    base.load_state_dict(plain)
    return base.eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "parts", [("query", "value"), ("key",), ("query", "key", "value"), ("mlp", "head"), tuple(ALL)]
)
def test_logits_are_those_of_the_merged_weights(family, parts):
    parts = [part.removeprefix("lora_") for part in parts]
    model = lora_gpt(**FAMILIES[family], **{f"lora_{part}": True for part in parts})
    idx = torch.randint(0, 100, (2, 20))
    expected = merged_by_hand(model)(idx)
    torch.testing.assert_close(model(idx), expected, atol=1e-5, rtol=1e-5)
    merge_lora_weights(model)
    torch.testing.assert_close(model(idx), expected, atol=1e-5, rtol=1e-5)
    merge_lora_weights(model)  # again: nothing is added twice
    torch.testing.assert_close(model(idx), expected, atol=1e-5, rtol=1e-5)
    unwrap_lora(model)
    assert not [module for module in model.modules() if isinstance(module, LoRALinear)]
    torch.testing.assert_close(model(idx), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(20,), (1, 19), (7, 1, 7, 5)])
def test_caches_and_chunks_change_nothing(family, lengths):
    model = lora_gpt(**FAMILIES[family], **ALL)
    idx = torch.randint(0, 100, (2, 20))
    model.set_kv_caches(2)
    torch.testing.assert_close(in_chunks(model, idx, lengths), model(idx), atol=1e-5, rtol=1e-5)


def test_an_evicting_cache_gives_what_it_gives_with_merged_weights():
    model = lora_gpt(**ALL)
    plain, idx = merged_by_hand(model), torch.randint(0, 100, (1, 40))
    for gpt in (model, plain):
        gpt.assign_kv_caches(create_kv_caches("lastrec", gpt.config, 1, 8, n_sink=2))
    lengths = (12, 1, *(3,) * 9)
    torch.testing.assert_close(in_chunks(model, idx, lengths), in_chunks(plain, idx, lengths), atol=1e-5, rtol=1e-5)


def test_a_new_model_computes_what_the_plain_one_does():
    base = tiny_gpt()
    model = GPT(Config(**LLAMA, lora_r=3, **ALL)).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    idx = torch.randint(0, 100, (1, 9))
    torch.testing.assert_close(model(idx), base(idx))


def test_unused_layers_are_unwrapped_and_used_ones_stay():
    model = lora_gpt(lora_query=True, lora_value=True)
    idx = torch.randint(0, 100, (1, 9))
    before = model(idx)
    unwrap_lora(model)
    assert {type(m) for m in model.modules() if isinstance(m, LoRALinear)} == {LoRAQKVLinear}
    assert torch.equal(model(idx), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_litgpt(family):
    names = set(lora_gpt(**FAMILIES[family], lora_query=True, lora_mlp=True).state_dict())
    plain = set(tiny_gpt(**FAMILIES[family]).state_dict())
    wrapped = {name for name in plain if ".attn." in name or ".mlp." in name or name.startswith("lm_head")}
    wrapped -= {name for name in wrapped if "norm" in name}
    base = {name for name in names if not lora_filter(name, None)}
    assert base == (plain - wrapped) | {".linear.".join(name.rsplit(".", 1)) for name in wrapped}
    matrices = {name.rsplit(".", 1)[0] for name in names - base}
    assert matrices == {
        name.rsplit(".", 1)[0] for name in wrapped if name.endswith("weight") and (".qkv." in name or ".mlp." in name)
    }


def test_shapes_are_those_of_litgpt():
    model = lora_gpt(lora_query=True, lora_value=True, lora_projection=True)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if "h.0.attn" in name}
    assert shapes == {
        "transformer.h.0.attn.qkv.lora_A": (6, 64),
        "transformer.h.0.attn.qkv.lora_B": (96, 3),
        "transformer.h.0.attn.qkv.linear.weight": (128, 64),
        "transformer.h.0.attn.proj.lora_A": (3, 64),
        "transformer.h.0.attn.proj.lora_B": (64, 3),
        "transformer.h.0.attn.proj.linear.weight": (64, 64),
    }


def test_plain_and_old_names_load():
    model, base = lora_gpt(lora_query=True), tiny_gpt()
    matrices = {name: x.clone() for name, x in model.state_dict().items() if lora_filter(name, x)}
    model.load_state_dict(base.state_dict() | matrices)
    assert torch.equal(model.transformer.h[1].mlp.fc_1.linear.weight, base.transformer.h[1].mlp.fc_1.weight)
    expected = model.state_dict()
    old = dict(expected)
    qkv = old.pop("transformer.h.0.attn.qkv.linear.weight")
    q, k, v = qkv.view(8, 16, 64).split((4, 2, 2))  # 4 heads of queries, and 2 of keys and of values
    old["transformer.h.0.attn.attn.linear.weight"] = torch.cat((q[:2], k[:1], v[:1], q[2:], k[1:], v[1:])).flatten(0, 1)
    expected = {name: x.clone() for name, x in expected.items()}
    qkv = qkv.clone()
    model.transformer.h[0].attn.qkv.linear.weight.zero_()
    model.load_state_dict(old)
    assert torch.equal(model.transformer.h[0].attn.qkv.linear.weight, qkv)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_lora_matrices_only_and_are_those_of_the_formula(family):
    model = lora_gpt(**FAMILIES[family], **ALL)
    mark_only_lora_as_trainable(model)
    idx = torch.randint(0, 100, (2, 20))
    model(idx).square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name in dict(model.named_parameters()) if lora_filter(name, None)}
    base = merged_by_hand(model).requires_grad_(True)
    base(idx).square().mean().backward()
    layer, dW = model.transformer.h[0].attn.proj, base.transformer.h[0].attn.proj.weight.grad  # dA = s B^T dW
    torch.testing.assert_close(layer.lora_A.grad, 7 / 3 * layer.lora_B.T @ dW, atol=1e-6, rtol=1e-4)
    layer, dW = model.transformer.h[0].attn.qkv, base.transformer.h[0].attn.qkv.weight.grad[96:]
    torch.testing.assert_close(layer.lora_B.grad[96:], 7 / 3 * dW @ layer.lora_A[6:].T, atol=1e-6, rtol=1e-4)


def test_training_learns():
    model = lora_gpt(lora_query=True, lora_mlp=True)
    mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    idx, losses = torch.randint(0, 100, (2, 16)), []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5


def test_biases_are_trained_as_asked():
    model = lora_gpt(**FAMILIES["neox"], lora_query=True)

    def trained(bias):
        mark_only_lora_as_trainable(model, bias)
        return {name for name, p in model.named_parameters() if p.requires_grad and not lora_filter(name, p)}

    assert trained("none") == set()
    assert trained("all") == {name for name in dict(model.named_parameters()) if name.endswith("bias")}
    assert trained("lora_only") == {f"transformer.h.{i}.attn.qkv.linear.bias" for i in range(2)}
    with pytest.raises(ValueError, match="'some'"):
        trained("some")


def test_dropout_is_for_training():
    layer = LoRALinear(8, 5, r=2, lora_dropout=0.9)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(64, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    model = tiny_gpt()
    add_lora(model, Config(**LLAMA, lora_r=2, lora_dropout=0.5, lora_query=True))
    assert not any(module.training for module in model.modules())


def test_layers_can_be_made_alone():
    x = torch.randn(3, 8)
    layer = LoRAQKVLinear(8, 16, 2, 4, 2, r=2, lora_alpha=4, enable_lora=(False, True, False), bias=True)
    torch.nn.init.normal_(layer.lora_B)
    expected = layer.linear(x)
    expected[:, 8:12] += 2 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", [lora, adapter_v2])
@pytest.mark.parametrize("name", ["GptNeoxMLP", "LLaMAMLP", "GemmaMLP", "LLaMAMoE"])
def test_mlps_can_be_made_alone_and_are_those_in_a_model(name, kind):
    experts = {"n_expert": 2, "n_expert_per_token": 1} if name == "LLaMAMoE" else {}
    flags = {"lora_r": 2, "lora_mlp": True} if kind is lora else {}
    config = kind.Config(n_layer=1, n_embd=8, n_head=2, intermediate_size=12, mlp_class_name=name, **experts, **flags)
    alone, plain = getattr(kind, name)(config), getattr(litgpt.model, name)(config)
    assert isinstance(alone, type(plain))
    assert alone.state_dict().keys() == kind.GPT(config).transformer.h[0].mlp.state_dict().keys()
    alone.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(alone(x), plain(x))


def test_merging_leaves_the_embedding_that_the_head_shares_alone():
    model = lora_gpt(**ALL)
    model.lm_head.linear.weight = model.transformer.wte.weight
    embedding, idx = model.transformer.wte.weight.clone(), torch.randint(0, 100, (1, 9))
    before = model(idx)
    merge_lora_weights(model)
    assert torch.equal(model.transformer.wte.weight, embedding)
    torch.testing.assert_close(model(idx), before, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    not can_pack(torch.empty(1, 1, dtype=torch.bfloat16)), reason="no packed bfloat16 products on this machine"
)
def test_packed_layers_inside_give_the_same_logits():
    model = lora_gpt(lora_query=True, lora_mlp=True, lora_head=True).to(torch.bfloat16)
    idx = torch.randint(0, 100, (2, 9))
    before, weights = model(idx), copy.deepcopy(model.state_dict())
    pack_linears(model)
    assert isinstance(model.transformer.h[0].attn.qkv.linear, PackedLinear)
    torch.testing.assert_close(model(idx), before, atol=0.05, rtol=0.05)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    with pytest.raises(ValueError, match="PackedLinear: the layer must be a plain one"):
        merge_lora_weights(model)
    unpack_linears(model)
    merge_lora_weights(model)
    merged = model.transformer.h[0].attn.qkv.linear.weight
    assert not torch.equal(merged, weights["transformer.h.0.attn.qkv.linear.weight"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_r": -1}, "lora_r = -1"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0"),
        ({"lora_rank": 4}, "lora_rank"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**{**LLAMA, **fields})


@pytest.mark.parametrize(
    ("fields", "trains"),
    [
        ({"lora_query": True}, True),
        ({"lora_query": True, "lora_r": 0}, False),
        ({}, False),
        ({**LATENT, "lora_query": True, "lora_value": True}, False),  # as there are no such layers
        ({**LATENT, "lora_query": True, "lora_mlp": True}, True),
    ],
)
def test_what_has_matrices(fields, trains):
    model = lora_gpt(**fields)
    assert any(lora_filter(name, value) for name, value in model.named_parameters()) is trains


def test_other_layers_of_latent_attention_are_adapted():
    model = lora_gpt(**LATENT, lora_projection=True, lora_mlp=True)
    idx = torch.randint(0, 100, (1, 9))
    expected = merged_by_hand(model)(idx)
    torch.testing.assert_close(model(idx), expected, atol=1e-5, rtol=1e-5)
    model.set_kv_caches(1)
    torch.testing.assert_close(in_chunks(model, idx, (4, 1, 4)), expected, atol=1e-5, rtol=1e-5)


def test_a_named_model():
    model = GPT.from_name("pythia-14m", n_layer=1, lora_r=2, lora_query=True)
    assert isinstance(model.transformer.h[0].attn.qkv, LoRAQKVLinear)
    model.apply(model._init_weights)
    assert not model.transformer.h[0].attn.qkv.lora_B.any()
    assert model.transformer.h[0].attn.qkv.lora_A.any()


# --- rsLoRA, DoRA, all linear layers


def merged_weight(W, A, B, scale, m=None):
    """The weight with LoRA, and with magnitudes DoRA, as the papers have it."""
    V = W + scale * B @ A
    return V if m is None else m[:, None] * V / V.norm(dim=1, keepdim=True).detach()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rslora", "dora"), [(True, False), (False, True), (True, True)])
def test_outputs_and_gradients_are_those_of_the_formula(rslora, dora, bias):
    torch.manual_seed(0)
    layer = LoRALinear(6, 5, r=4, lora_alpha=3, rslora=rslora, dora=dora, bias=bias, dtype=torch.float64)
    layer.linear.requires_grad_(False)
    for parameter in (layer.lora_A, layer.lora_B):
        torch.nn.init.normal_(parameter)
    names = ["lora_A", "lora_B"] + ["lora_magnitude"] * dora
    if dora:
        torch.testing.assert_close(layer.lora_magnitude.data, layer.linear.weight.norm(dim=1))
        torch.nn.init.uniform_(layer.lora_magnitude, 0.5, 2)
    x = torch.randn(3, 6, dtype=torch.float64)
    free = {name: getattr(layer, name).detach().clone().requires_grad_() for name in names}
    scale = 3 / 2 if rslora else 3 / 4
    weight = merged_weight(layer.linear.weight, free["lora_A"], free["lora_B"], scale, free.get("lora_magnitude"))
    expected = torch.nn.functional.linear(x, weight, layer.linear.bias)
    found = layer(x)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    d_y = torch.randn_like(expected)
    expected.backward(d_y)
    found.backward(d_y)
    for name in names:
        torch.testing.assert_close(getattr(layer, name).grad, free[name].grad, atol=1e-12, rtol=1e-12)
    layer.merge()
    torch.testing.assert_close(layer(x), found, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", [("query", "value"), tuple(p.removeprefix("lora_") for p in ALL)])
def test_a_model_with_magnitudes_merges_exactly(family, parts):
    flags = {f"lora_{part}": True for part in parts}
    model = lora_gpt(**FAMILIES[family], **flags, lora_dora=True, lora_rslora=True).double()
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    idx = torch.randint(0, 100, (2, 20))
    expected = model(idx)
    finish_lora(model)
    torch.testing.assert_close(model(idx), expected, atol=1e-10, rtol=1e-10)
    model.set_kv_caches(2)
    torch.testing.assert_close(in_chunks(model, idx, (7, 1, 12)), expected, atol=1e-5, rtol=1e-5)
    model.clear_kv_caches()
    merge_lora_weights(model)
    torch.testing.assert_close(model(idx), expected, atol=1e-10, rtol=1e-10)


def test_magnitudes_begin_as_the_norms_of_the_weights_that_are_loaded():
    base, idx = tiny_gpt(), torch.randint(0, 100, (1, 9))
    model = GPT(Config(**LLAMA, lora_r=3, **ALL, lora_dora=True)).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    torch.testing.assert_close(model(idx), base(idx))
    model.load_state_dict({name: 2 * x for name, x in base.state_dict().items()}, strict=False)
    norms = model.transformer.h[0].attn.proj.linear.weight.norm(dim=1)
    torch.testing.assert_close(model.transformer.h[0].attn.proj.lora_magnitude.data, norms)


def test_all_linear_layers_but_the_head():
    config = Config(**LLAMA, lora_r=3, lora_all=True)
    assert config.lora_options() == {
        **{"lora_r": 3, "lora_alpha": 1, "lora_dropout": 0.0},
        **dict.fromkeys(ALL, True),
        "lora_head": False,
    }
    layers = [layer for layer in GPT(config).modules() if isinstance(layer, LoRALinear)]
    assert [layer.r for layer in layers].count(0) == 1


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_gradients_next_to_quantised_weights_are_those_next_to_what_they_stand_for(mode, dora):
    torch.manual_seed(0)
    base = tiny_gpt()
    quantize_model(base, mode)
    plain = tiny_gpt()
    layers = {name: layer for name, layer in base.named_modules() if hasattr(layer, "dequantized")}
    plain.load_state_dict(
        {name: x for name, x in plain.state_dict().items()}
        | {f"{name}.weight": layer.dequantized(torch.float32) for name, layer in layers.items()}
    )
    config = Config(**LLAMA, lora_r=3, lora_all=True, lora_head=True, lora_dora=dora)
    idx, found = torch.randint(0, 100, (2, 40)), []
    for model in (base, plain):
        add_lora(model, config)
        mark_only_lora_as_trainable(model)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                torch.nn.init.normal_(parameter, std=0.1)
        logits = model(idx)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-6)
