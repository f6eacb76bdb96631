"""Training through caches: layer by layer against autograd through the calls of serving (guarantee G12)."""

from itertools import pairwise

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt

from litgpt.kernels import row_attention
from litgpt.kernels.library import training_library
from litgpt.kernels.row_attention import attend_rows, attention_of_rows
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.testing import KV_CACHE_NAMES
from litgpt.lora import Config as LoRAConfig
from litgpt.lora import add_lora, mark_only_lora_as_trainable
from litgpt.train import by_position, cache_calls, gradients_only
from litgpt.train.cached_layers import CachedLayers

MODELS = {
    "llama": {},
    "gemma": {
        "sliding_window_size": 5,
        "sliding_window_indices": [1, 0],
        "attention_logit_softcapping": 20.0,
        "post_attention_norm": True,
        "norm_qk": True,
        "scale_embeddings": True,
    },
    "parallel": {"parallel_residual": True, "shared_attention_norm": True, "rotary_percentage": 0.5, "bias": True},
    "experts": {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 16},
    "latent": {
        "latent_attention": {
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        "n_query_groups": 4,
    },
    "sinks": {"attention_sinks": True},
}

TRAINABLE = [name for name in KV_CACHE_NAMES if not name.startswith("kvzip")]
# every policy, and every storage with a policy of each kind
FEWER = [name for name in TRAINABLE if name.split("-")[0] in ("dense", "lastrec", "h2o") or name.endswith("-default")]


def make(kind="llama", n_layer=2):
    torch.manual_seed(0)
    model = tiny_gpt(**MODELS[kind], n_layer=n_layer, block_size=64, **VOCABULARY).double().requires_grad_(True).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    return model


def serving(model, spec, rows, chunk, first=None):
    """Final-norm outputs of every row, by calls with caches as the engine makes them, under autograd."""
    outputs = []
    for row in rows:
        model.clear_kv_caches(assigned=True)
        model.assign_kv_caches(spec.create(model, 1))
        starts = [0, *range(first or chunk, len(row), chunk), len(row)]
        calls = [(start, row[start:stop]) for start, stop in pairwise(starts)]
        outputs.append(torch.cat([model(part[None], input_pos=start, skip_lm_head=True) for start, part in calls], 1))
    model.clear_kv_caches(assigned=True)
    return torch.cat(outputs, 1)


def gradients(model, outputs, weight):
    params = [p for name, p in model.named_parameters() if "lm_head" not in name]
    return torch.autograd.grad((outputs * weight[:, : outputs.shape[1]]).sum(), params, allow_unused=True)


def compare(model, spec, lengths, chunk, first=None):
    rows = [torch.randint(0, 100, (length,)) for length in lengths]
    weight = torch.randn(1, sum(lengths), model.config.n_embd, dtype=torch.float64)
    expected = serving(model, spec, rows, chunk, first)
    wanted = gradients(model, expected, weight)
    layers = CachedLayers(model, spec, chunk, first_chunk=first)
    outputs = layers(torch.cat(rows)[None], lengths if len(lengths) > 1 else None)
    found = gradients(model, outputs, weight)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
    for own, other in zip(found, wanted, strict=True):
        if own is None or other is None:
            assert own is other is None
        else:
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "lengths", "chunk"),
    [*((name, [17], 4) for name in TRAINABLE), *((name, *how) for name in FEWER for how in (([14], 1), ([13, 5], 7)))],
)
def test_G12_every_cache(name, lengths, chunk):
    spec = CacheSpec.parse(name)
    spec = CacheSpec.parse(spec, cache_length=9 if spec.evicts else 20)
    compare(make(n_layer=2 if chunk == 4 else 1), spec, lengths, chunk)


@pytest.mark.parametrize(("lengths", "chunk", "first"), [([30], 5, 13), ([13, 27], 3, None), ([17, 2], 1, 17)])
@pytest.mark.parametrize("name", ["dense-kivi", "h2o-int8", "lastrec"])
def test_G12_any_first_chunk_and_tokens_in_two_bits(name, lengths, chunk, first):
    args = {"window": 4, "group": 2} if name == "dense-kivi" else {"cache_length": 9}
    compare(make(n_layer=1), CacheSpec.parse(name, **args), lengths, chunk, first)


@pytest.mark.parametrize("name", FEWER)
def test_G12_every_cache_with_dropout(name, monkeypatch):
    """The calls of serving draw what the chunks of a layer do: by the seeds that the pass through caches was given."""
    model = make(n_layer=2)
    add_lora(model, LoRAConfig.extending(model.config, lora_r=2, lora_alpha=4, lora_dropout=0.3, lora_all=True))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    model.double().train()
    spec = CacheSpec.parse(name)
    spec = CacheSpec.parse(spec, cache_length=9 if spec.evicts else 20)
    idx, weight = torch.randint(0, 100, (1, 17)), torch.randn(1, 17, 64, dtype=torch.float64)
    torch.manual_seed(5)
    outputs = CachedLayers(model, spec, 4)(idx)
    found = gradients(model, outputs, weight)
    torch.manual_seed(5)
    seeds = [int(torch.randint(2**62, ())) for _ in model.transformer.h]
    for seed, block in zip(seeds, model.transformer.h, strict=True):
        monkeypatch.setattr(block, "forward", _seeded_by_call(block.forward, seed))
    expected = serving(model, spec, list(idx), 4)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
    for own, other in zip(found, gradients(model, expected, weight), strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def _seeded_by_call(forward, seed):
    calls = iter(range(1000))

    def seeded(*args, **kwargs):
        torch.manual_seed((seed + next(calls)) % 2**63)
        return forward(*args, **kwargs)

    return seeded


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["dense", "lastrec", "h2o"])
def test_G12_every_kind_of_layer(kind, name):
    compare(make(kind), CacheSpec(name, cache_length=30 if name == "dense" else 8), [21], 4)


@pytest.mark.parametrize("chunk", [4, 11])
@pytest.mark.parametrize("name", ["dense", "lastrec", "knorm", "h2o"])
def test_G12_rows_of_their_own_lengths(name, chunk):
    args = {} if name == "dense" else {"n_sink": 2}
    compare(make(), CacheSpec(name, cache_length=30 if name == "dense" else 8, **args), [21, 3, 13, 8], chunk)


@pytest.mark.parametrize("budget", [[1, 2], [3, 1]])
@pytest.mark.parametrize("name", ["tova-int4", "lastrec"])
def test_G12_layers_have_the_slots_of_their_budgets(name, budget):
    compare(make(), CacheSpec.parse(name, cache_length=20, budget=budget), [26, 9], 5)


def test_an_impossible_budget_is_refused():
    with pytest.raises(ValueError, match="budget"):
        CachedLayers(make(), CacheSpec("h2o", cache_length=8, budget=[1, 2, 3]), 4)


@pytest.mark.parametrize("kind", ["llama", "parallel"])
@pytest.mark.parametrize(("name", "chunk"), [("dense", 8), ("lastrec", 4), ("h2o", 7)])
def test_G12_with_the_MLP_of_a_layer_some_rows_at_a_time(kind, name, chunk, monkeypatch):
    monkeypatch.setattr(gradients_only, "ROWS", 3)
    spec = CacheSpec.parse(name)
    compare(make(kind), CacheSpec.parse(spec, cache_length=9 if spec.evicts else 20), [17, 6], chunk)


@pytest.mark.parametrize(("lora_mlp", "computed"), [(False, 2), (True, 4)])
def test_the_last_product_of_a_layer_is_computed_once_where_it_is_frozen(lora_mlp, computed, monkeypatch):
    model, calls = make(), []
    add_lora(model, LoRAConfig.extending(model.config, lora_r=2, lora_dropout=0.3, lora_query=True, lora_mlp=lora_mlp))
    mark_only_lora_as_trainable(model.double().train())
    for block in model.transformer.h:
        last = block.mlp.proj.linear
        monkeypatch.setattr(last, "forward", lambda x, last=last: calls.append(x) or type(last).forward(last, x))
    CachedLayers(model, CacheSpec(), 10)(torch.randint(0, 100, (1, 20))).sum().backward()
    assert len(calls) == computed


@pytest.mark.skipif(training_library() is None, reason="no compiled kernels")
@pytest.mark.parametrize(("options", "times"), [({}, 2), ({"keep_inputs": 1}, 4)])
def test_the_attention_of_rows_that_run_whole_is_computed_once(options, times, monkeypatch):
    model, calls = make().float(), []
    for module in (by_position, row_attention):
        monkeypatch.setattr(
            module, "attention_of_rows", lambda *args, **kw: calls.append(args) or attention_of_rows(*args, **kw)
        )
    CachedLayers(model, CacheSpec(), 20, **options)(torch.randint(0, 100, (1, 20))).sum().backward()
    assert len(calls) == times


def test_without_evictions_it_is_plain_training():
    model = make()
    idx = torch.randint(0, 100, (1, 23))
    weight = torch.randn(1, 23, model.config.n_embd, dtype=torch.float64)
    plain = model(idx, skip_lm_head=True)
    ours = CachedLayers(model, CacheSpec("lastrec", cache_length=32), 5)(idx)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    for own, other in zip(gradients(model, ours, weight), gradients(model, plain, weight), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def test_dropout_is_the_same_in_both_passes():
    model = make()
    config = LoRAConfig.extending(model.config, lora_r=4, lora_alpha=8, lora_dropout=0.3, lora_all=True)
    add_lora(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.double().train()
    idx, weight = torch.randint(0, 100, (1, 20)), torch.randn(1, 20, 64, dtype=torch.float64)
    layers = CachedLayers(model, CacheSpec("lastrec", cache_length=8), 4)

    def loss():
        torch.manual_seed(1)
        return (layers(idx) * weight).sum()

    params = [p for p in model.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in params]
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss(), params), direction, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(params, direction, strict=True):
                p.add_(d, alpha=step)
            values.append(loss())
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("chunk", "words"), [(0, "at least one token")])
def test_impossible_chunks_are_refused(chunk, words):
    with pytest.raises(ValueError, match=words):
        CachedLayers(make(), CacheSpec(), chunk)


@pytest.mark.parametrize("length", [0, -1, 65, 10**20])
def test_impossible_lengths_are_refused(length):
    with pytest.raises(ValueError, match=f"cache_length must be in 1..64, the model's context, got {length}"):
        CachedLayers(make(), CacheSpec("h2o", cache_length=length), 4)


def test_under_autocast_outputs_and_gradients_are_about_those_of_plain_training():
    model, idx = make().float(), torch.randint(0, 100, (1, 23))
    weight, found = torch.randn(1, 23, model.config.n_embd), []
    for run in (lambda: model(idx, skip_lm_head=True), lambda: CachedLayers(model, CacheSpec(), 5)(idx)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = run()
        found.append([outputs, *gradients(model, outputs, weight)])
    for plain, ours in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        assert (ours - plain).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize("place", ["cpu", "disk", 1, 2, 5])
def test_inputs_kept_elsewhere_or_not_at_all_give_the_same_gradients(place):
    model, idx = make(n_layer=4), torch.randint(0, 100, (1, 23))
    add_lora(model, LoRAConfig.extending(model.config, lora_r=2, lora_dropout=0.3, lora_query=True))
    model.double().train()
    weight, found = torch.randn(1, 23, model.config.n_embd), []
    for kept in ("device", place):
        layers = CachedLayers(model, CacheSpec("h2o", cache_length=8), 4, kept)
        torch.manual_seed(3)
        found.append(gradients(model, layers(idx, [15, 8]), weight))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("keep_inputs", "kept"), [("device", 8), (1, 8), ("disk", 0), (3, 3), (20, 1)])
def test_between_the_passes_the_inputs_of_so_many_layers_are_in_memory(keep_inputs, kept):
    model, N = make(n_layer=8), 57
    layers = CachedLayers(model, CacheSpec("lastrec", cache_length=8), 4, keep_inputs)
    outputs = layers(torch.randint(0, 100, (1, N)))
    assert kept == sum(_tokens_kept(outputs.grad_fn, N))


def _tokens_kept(node, N):
    """For every tensor with N rows that passes through caches hold: 1."""
    while node is not None:
        inputs = getattr(getattr(node, "inputs", None), "x", None)
        yield int(inputs is not None and len(inputs) == N)
        node = next((earlier for earlier, _ in node.next_functions if earlier is not None), None)


@pytest.mark.parametrize("place", ["tape", 0, -3])
def test_an_unknown_place_for_inputs_is_refused(place):
    with pytest.raises(ValueError, match=f"keep_inputs must be device, cpu, disk or a number of layers, got {place!r}"):
        CachedLayers(make(), CacheSpec(), 4, place)


def test_a_policy_that_reads_texts_twice_is_refused():
    with pytest.raises(ValueError, match="kvzip cannot be trained through: it reads a text a second time"):
        CachedLayers(make(), CacheSpec("kvzip", cache_length=8), 4)


@pytest.mark.skipif(training_library() is None, reason="no compiled kernels")
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize(
    ("name", "options", "used"),  # in two layers, forwards and backwards: for each of 5 chunks, or once for 4
    [
        ("dense", {}, 20),
        ("dense", {"chunk": 10}, 4),
        ("lastrec", {}, 20),
        ("lastrec", {"chunk": 10}, 4),
        ("lastrec", {"n_sink": 3}, 20),
        ("lastrec", {"n_sink": 3, "chunk": 10}, 4),
        ("lastrec", {"sliding_window_size": 6}, 20),
        ("lastrec", {"n_sink": 3, "sliding_window_size": 6}, 0),
        ("lastrec-int8", {}, 0),
    ],
)
def test_attention_by_kernels_has_the_gradients_of_float64(name, options, used, dtype, error, monkeypatch):
    calls = []
    monkeypatch.setattr(by_position, "attend_rows", lambda *args, **kw: calls.append(args) or attend_rows(*args, **kw))
    sinks, chunk = {key: value for key, value in options.items() if key == "n_sink"}, options.get("chunk", 9)
    options = {key: value for key, value in options.items() if key not in ("n_sink", "chunk")}
    spec, found = CacheSpec.parse(name, cache_length=40 if name == "dense" else 17, **sinks), []
    for kind in (torch.float64, dtype):
        torch.manual_seed(0)
        model = tiny_gpt(block_size=64, **options, **VOCABULARY).requires_grad_(True).to(dtype).to(kind)
        idx, weight = torch.randint(0, 100, (1, 37)), torch.randn(1, 37, 64)
        outputs = CachedLayers(model, spec, chunk)(idx)
        found.append([outputs, *gradients(model, outputs, weight.to(kind))])
    assert len(calls) == used
    for exact, own in zip(*found, strict=True):
        assert own is exact is None or (own.double() - exact).norm() <= error * exact.norm()


@pytest.mark.skipif(training_library() is None, reason="no compiled kernels")
@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_in_float32_a_kernel_attends_to_what_each_token_of_a_chunk_found(name, monkeypatch):
    torch.manual_seed(0)
    model, calls, found = tiny_gpt(block_size=64, **VOCABULARY).requires_grad_(True), [], []
    idx, weight = torch.randint(0, 100, (1, 37)), torch.randn(1, 37, 64)
    monkeypatch.setattr(cache_calls, "attend_rows", lambda *args, **kw: calls.append(kw) or attend_rows(*args, **kw))
    for _ in range(2):
        outputs = CachedLayers(model, CacheSpec(name, cache_length=17), 9)(idx)
        found.append(gradients(model, outputs, weight))
        monkeypatch.setattr(cache_calls, "can_attend_rows", lambda *args: False)
    assert len(calls) > 0
    assert all(not call["mask"].all() for call in calls)
    for own, torchs in zip(*found, strict=True):
        assert own is torchs is None or (own - torchs).norm() <= 1e-4 * torchs.norm()
