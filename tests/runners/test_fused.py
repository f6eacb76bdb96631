"""One call for all layers gives what `GPT.run_layers` gives, and keeps away from what it does not know."""

import dataclasses
import gc
import itertools
import weakref
from contextlib import suppress

import pytest
import torch
from tiny import create_kv_caches, tiny_gpt
from torch import nn

from litgpt import lora
from litgpt.attention import MultiHeadSelfAttention
from litgpt.config import Config
from litgpt.engine.loading import slow_down_decode, speed_up_decode
from litgpt.kernels import ops
from litgpt.keys_and_values import DefaultKeysAndValues
from litgpt.kvcache import CacheSpec, KVCacheParams
from litgpt.kvcache.by_head import ByHeadKVCache, share_slots
from litgpt.kvcache.planned import PlannedKVCache
from litgpt.kvcache.storages import STORAGES
from litgpt.runners import fused
from litgpt.runners.fused import FusedLayers, fuse_layers
from litgpt.runners.quantized_weights import quantize_model

pytestmark = pytest.mark.skipif(not ops.available(), reason="no kernels on this machine")

LLAMA = {
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "parallel_residual": False,
    "bias": False,
    "rotary_percentage": 1.0,
    "intermediate_size": 128,
}
GEMMA = LLAMA | {
    "mlp_class_name": "GemmaMLP",
    "gelu_approximate": "tanh",
    "norm_unit_offset": True,
    "post_attention_norm": True,
    "post_mlp_norm": True,
    "scale_embeddings": True,
    "sliding_window_size": 6,
    "sliding_window_indices": [1, 0],
    "norm_qk": True,
    "rope_local_base_freq": 1000.0,
    "rope_indices": [1, 0],
}
FAMILIES = {
    "llama": LLAMA,
    "multi-query": LLAMA | {"n_query_groups": 1},
    "qkv bias": LLAMA | {"attn_bias": True},
    "partial rotary": LLAMA | {"rotary_percentage": 0.5},
    "interleaved": LLAMA | {"rope_interleave": True},
    "no rope": LLAMA | {"nope_indices": [1, 0]},
    "sinks": LLAMA | {"attention_sinks": True},
    "multipliers": LLAMA | {"residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "norms over all heads": LLAMA
    | {"norm_qk": True, "norm_qk_type": "olmo2", "norm_1": False, "norm_2": False}
    | {"post_attention_norm": True, "post_mlp_norm": True},
    "sizes and factors": LLAMA | {"head_size": 24, "attention_scores_scalar": 30, "norm_eps": 0.1},
    "gemma": GEMMA,
    "soft-capping": GEMMA | {"attention_logit_softcapping": 2.0, "norm_qk": False},
}


def bf16_gpt(**flags):
    model = tiny_gpt(**(LLAMA | flags)).to(torch.bfloat16).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_f" in name or "sinks" in name or "bias" in name:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model


def run(model, calls, batch_size=1, **caches):
    """Outputs for calls of so many tokens, one after the other."""
    model.clear_kv_caches(assigned=True)
    if caches:
        model.assign_kv_caches(
            create_kv_caches(config=model.config, batch_size=batch_size, dtype=model.dtype, **caches)
        )
    else:
        model.set_kv_caches(batch_size, max_seq_length=sum(calls) + 20)
    idx = torch.randint(0, 90, (batch_size, sum(calls)), generator=torch.Generator().manual_seed(1))
    outputs, position = [], 0
    with torch.inference_mode():
        for T in calls:
            outputs.append(model(idx[:, position : position + T], position))
            position += T
    return torch.cat(outputs, dim=1).float()


def count(model):
    """Notes which calls the fused layers were asked for and have done."""
    model.layer_runner = Counted(model.layer_runner)
    return model.layer_runner.done


class Counted:
    static_shapes = False

    def __init__(self, runner):
        self.runner, self.runs_head, self.done = runner, runner.runs_head, []

    def __call__(self, *args):
        x = self.runner(*args)
        self.done.append(x is not None)
        return x

    def runs_evictions(self, caches):
        return self.runner.runs_evictions(caches)


def assert_same(found, expected, tolerance=1.0):
    """Up to roundings of bfloat16, which layers may enlarge."""
    scale = tolerance * expected.abs().max()
    assert (found - expected).abs().max() < 0.06 * scale
    assert (found - expected).abs().mean() < 0.01 * scale


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_outputs_are_those_of_the_layers_one_by_one(family, batch_size):
    model = bf16_gpt(**FAMILIES[family])
    calls = [5, 1, 1, 4, 1, 1, 1, 1]
    expected = run(model, calls, batch_size)
    speed_up_decode(model)
    assert isinstance(model.layer_runner, FusedLayers)
    done = count(model)
    assert_same(run(model, calls, batch_size), expected)
    assert done == [ops.multiplies_fast()] + [True] * 7


@pytest.mark.parametrize("family", FAMILIES)
def test_models_in_float32(family):
    """Few tokens of one row and of several, with caches that grow and that evict."""
    model = bf16_gpt(**FAMILIES[family]).float()
    for batch_size, caches in ((1, {}), (3, {}), (2, {"name": "lastrec", "cache_length": 8})):
        calls = [5, 1, 1, 4, 1] if not caches else [5, *(1,) * 6]
        expected = run(model, calls, batch_size, **caches)
        speed_up_decode(model)
        done = count(model)
        found = run(model, calls, batch_size, **caches)
        slow_down_decode(model)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        assert done == [False, *(True for _ in calls[1:])]


@pytest.mark.parametrize("family", ["llama", "qkv bias", "gemma"])
@pytest.mark.parametrize("parts", [("query", "value"), ("key", "projection", "mlp"), ("query", "head")])
def test_few_tokens_with_lora_matrices(family, parts):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.06)):
        model = bf16_gpt(**FAMILIES[family]).to(dtype)
        speed_up_decode(model, join=False)
        model.layer_runner = None
        flags = {f"lora_{part}": True for part in parts} | {"lora_r": 3, "lora_alpha": 2}
        config = {field.name: getattr(model.config, field.name) for field in dataclasses.fields(model.config)}
        lora.add_lora(model, lora.Config(**config, **flags))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
        calls = [5, 1, 1, 4, 1]
        expected = run(model.requires_grad_(False), calls, 3)
        assert fuse_layers(model)
        done = count(model)
        found = run(model, calls, 3)
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        assert done == [False, *(True for _ in calls[1:])]
    model = bf16_gpt(**FAMILIES[family]).float()
    lora.add_lora(model, lora.Config(**config, **flags, lora_dora=True))
    assert not fuse_layers(model)


def test_what_is_not_all_in_float32_is_left_to_the_layers():
    model = bf16_gpt().float()
    speed_up_decode(model)
    done = count(model)
    run(model, [3, 1], name="dense-int8", cache_length=20)
    assert done == [False, False]
    slow_down_decode(model)
    quantize_model(model, "int8")
    assert not fuse(model)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantised_layers(mode):
    model = bf16_gpt()
    quantize_model(model, mode)
    calls = [5] + [1] * 8
    expected = run(model, calls)
    speed_up_decode(model)
    done = count(model)
    assert_same(run(model, calls), expected)
    assert all(done[1:])


needs_fast_products = pytest.mark.skipif(not ops.multiplies_fast(), reason="many tokens are torch's on this machine")


@needs_fast_products
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", [None, "int8", "int4", "int4 in groups of 64"])
def test_many_tokens(family, mode):
    """In calls that begin sequences or go on, of more tokens than are a block of products, with windows and without."""
    model = bf16_gpt(**FAMILIES[family], block_size=800)
    if mode is not None:
        quantize_model(model, mode[:4], 64 if "64" in mode else 32)
    calls = [300, 1, 40, 20, 2]
    expected = run(model, calls, batch_size=2)
    speed_up_decode(model)
    done = count(model)
    assert_same(run(model, calls, batch_size=2), expected)
    assert all(done)


@needs_fast_products
def test_last_tokens_alone_are_the_same_to_the_last_bit():
    model = bf16_gpt(block_size=400)
    speed_up_decode(model)
    model.set_kv_caches(3)
    idx = torch.randint(0, 90, (3, 340))
    done = count(model)
    for tokens, call in (
        (idx[:, :300], {"input_pos": 0}),
        (idx[:, 300:], {"input_pos": 300}),
        (idx[:, :4].reshape(1, 12), {"input_pos": 0, "rows": [2, 0, 1], "row_sizes": [3, 8, 1]}),
    ):
        with torch.inference_mode():
            expected = model(tokens, **call)
            model.caches.crop(call["input_pos"])
            if "rows" in call:
                model.caches.start(3)
            found = model(tokens, **call, last_token_only=True)
        ends = [2, 10, 11] if "rows" in call else [T * tokens.shape[1] - 1 for T in (1, 2, 3)]
        assert torch.equal(found[:, 0], expected.flatten(0, 1)[ends])
    assert done == [True] * 6


@needs_fast_products
def test_single_tokens_of_many_rows_do_not_have_whole_caches_laid_out():
    model = bf16_gpt()
    expected = run(model, [3, 1, 1], batch_size=ops.MAX_ROWS + 4)
    speed_up_decode(model)
    done = count(model)
    assert_same(run(model, [3, 1, 1], batch_size=ops.MAX_ROWS + 4), expected)
    assert done == [True, False, False]


@needs_fast_products
@pytest.mark.parametrize("sinks", [0, 3])
def test_prefill_of_more_tokens_than_an_evicting_cache_holds(sinks):
    model = bf16_gpt()
    caches = {"name": "lastrec", "cache_length": 8, "n_sink": sinks}
    expected = run(model, [30, 1, 1, 1], **caches)
    speed_up_decode(model)
    done = count(model)
    assert_same(run(model, [30, 1, 1, 1], **caches), expected)
    assert all(done)


@needs_fast_products
@pytest.mark.parametrize(
    ("name", "family", "slots", "sinks"),
    [
        ("lastrec", "llama", 24, 0),
        ("lastrec", "sinks", 90, 70),  # more than a block of keys
        ("lastrec", "soft-capping", 40, 3),
        ("lastrec-int8", "sizes and factors", 24, 2),
        ("lastrec-int4", "llama", 24, 0),
        ("dense", "gemma", 200, 0),  # layers with a window have rings
    ],
)
def test_new_tokens_replace_others_that_they_still_see(name, family, slots, sinks):
    flags = FAMILIES[family] | ({"sliding_window_size": 6} if family == "gemma" else {"sliding_window_size": None})
    model = bf16_gpt(**flags, block_size=256)
    caches = {"name": name, "cache_length": slots} | ({"n_sink": sinks} if sinks else {})
    calls = [20, 19, 24, 24, 1, 20, 17] if slots <= 24 else [20, 40, 35, 1, 40, 20]
    expected, states = run(model, calls, 2, **caches), [cache.state() for cache in model.kv_caches()]
    speed_up_decode(model)
    done = count(model)
    assert_same(run(model, calls, 2, **caches), expected, tolerance=3.0 if "4" in name else 1.0)
    assert all(done)
    for cache, state in zip(model.kv_caches(), states, strict=True):
        side = "key_scales" if "int" in name else "keys"
        torch.testing.assert_close(cache.state()[side].float(), state[side].float(), atol=0.2, rtol=0.1)


def without_and_with_fused_layers(name, rows, calls):
    """Outputs of calls, each with some more tokens of every row, and the positions that the caches then have, twice; and whether
    the fused layers ran the calls."""
    model, kept = bf16_gpt(sliding_window_size=None), []
    idx = [torch.randint(0, 90, (T,), generator=torch.Generator().manual_seed(T)) for T in rows]
    for fuse in (False, True):
        if fuse:
            speed_up_decode(model)
        done = count(model) if fuse else []
        model.clear_kv_caches(assigned=True)
        model.assign_kv_caches(create_kv_caches(name, model.config, 2, 40, torch.bfloat16, tail=8))
        outputs, start = [], 0
        with torch.inference_mode():
            model.caches.start(len(rows))
            for sizes in calls:
                tokens = torch.cat([own[start : start + size] for own, size in zip(idx, sizes, strict=True)])
                outputs.append(model(tokens[None], start, rows=list(range(len(rows))), row_sizes=sizes).float())
                start += sizes[0]
        kept.append((outputs, [cache.token_positions() for cache in model.kv_caches()]))
    return *kept, done


@needs_fast_products
@pytest.mark.parametrize(
    "prompts", [[36], [70], [30, 70]], ids=str
)  # fewer tokens than slots, more, and both beside each other
@pytest.mark.parametrize("name", ["h2o", "lazy", "expected", "compactor", "snapkv", "h2o-int8", "h2o-int4"])
def test_policies_look_at_prompts_between_layers(name, prompts):
    (expected, positions), (found, fused_positions), done = without_and_with_fused_layers(name, prompts, [prompts])
    assert_same(found[0], expected[0], tolerance=3.0 if "4" in name else 1.0)
    for one, other in zip(positions, fused_positions, strict=True):
        assert (one == other).float().mean() > (
            0.5 if "int" in name else 0.8
        )  # what is nearly as good depends on roundings
    assert done == [True]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["knorm", "tova", "snapkv", "h2o"])
def test_caches_that_score_their_tokens(name, batch_size):
    """Their queries are kept as the layers keep them; the calls that begin with an eviction are no others."""
    model = bf16_gpt()
    caches = {"name": name, "cache_length": 40, "tail": 8}
    calls = [20, *(1,) * 20, 3, *(1,) * 30, 5]
    kept = []
    for fuse in (False, True):
        if fuse:
            speed_up_decode(model)
        done = count(model) if fuse else []
        outputs = run(model, calls, batch_size, **caches)
        kept.append((outputs, [cache.kept_queries() for cache in model.kv_caches()]))
    (expected, queries), (found, fused_queries) = kept
    assert_same(found[:, :40], expected[:, :40])
    # roundings may decide which of two tokens is evicted then
    assert (found[:, 40:46] - expected[:, 40:46]).abs().mean() < 0.01 * expected.abs().max()
    for one, other in zip(queries, fused_queries, strict=True):
        assert (one is None) == (name == "knorm")
        if one is not None:
            assert_same(other[:batch_size].float(), one[:batch_size].float())
    assert done[0] == ops.multiplies_fast()
    assert sum(done[1:]) >= len(calls) - 3, "a call within which tokens are evicted is left to the layers"


@needs_fast_products
def test_rows_of_a_call_keep_the_queries_of_their_last_tokens():
    model, prompts = bf16_gpt(), [torch.randint(0, 90, (T,)) for T in (3, 25, 7)]
    kept = []
    for fuse in (False, True):
        if fuse:
            speed_up_decode(model)
        model.clear_kv_caches(assigned=True)
        model.assign_kv_caches(create_kv_caches("snapkv", model.config, 4, 40, torch.bfloat16, tail=8, window=6))
        done = count(model) if fuse else []
        with torch.inference_mode():
            model.caches.start(4)
            model(torch.arange(9)[None], 0, rows=[1])
            model(torch.cat(prompts)[None], 0, rows=[3, 0, 2], row_sizes=[3, 25, 7])
            for t in range(4):
                model(torch.arange(4)[:, None] + t, 25 + t)
        kept.append([cache.kept_queries().float() for cache in model.kv_caches()])
    for one, other in zip(*kept, strict=True):
        assert one.count_nonzero() == one.numel()
        assert_same(other, one)
    assert all(done)


@needs_fast_products
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_rows_one_after_the_other(family):
    """Prompts of several lengths in one call, into rows of their own, beside one that is there already."""
    model = bf16_gpt(**FAMILIES[family])
    prompts = [torch.randint(0, 90, (T,)) for T in (3, 25, 7)]

    def packed():
        model.set_kv_caches(4, max_seq_length=50)
        with torch.inference_mode():
            model.caches.start(4)
            model(torch.arange(9)[None], 0, rows=[1])
            first = model(torch.cat(prompts)[None], 0, rows=[3, 0, 2], row_sizes=[3, 25, 7])
            assert first.shape[:2] == (1, 35)
            more = [model(torch.arange(4)[:, None] + t, 25 + t)[:, 0] for t in range(4)]
            return torch.cat([first[0], *more]).float()

    expected = packed()
    speed_up_decode(model)
    done = count(model)
    assert_same(packed(), expected)
    assert all(done)


@pytest.mark.parametrize("sinks", [0, 2])
def test_caches_that_evict(sinks):
    model = bf16_gpt()
    caches = {"name": "lastrec", "cache_length": 8, "n_sink": sinks}
    calls = [5] + [1] * 20
    expected = run(model, calls, **caches)
    speed_up_decode(model)
    done = count(model)
    assert_same(run(model, calls, **caches), expected)
    assert all(done[1:])


def test_rows_of_different_lengths():
    model = bf16_gpt(**GEMMA)
    prompts = [torch.randint(0, 90, (T,)) for T in (3, 12, 7)]

    def ragged():
        model.set_kv_caches(3, max_seq_length=40)
        model.caches.start(3)
        with torch.inference_mode():
            for row, prompt in enumerate(prompts):
                model(prompt[None], 0, rows=[row])
            return torch.cat([model(torch.full((3, 1), t), 12 + t) for t in range(6)], dim=1).float()

    expected = ragged()
    speed_up_decode(model)
    done = count(model)
    assert_same(ragged(), expected)
    assert done == [ops.multiplies_fast()] * 3 + [True] * 6


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_some_rows_of_the_caches(family):
    model = bf16_gpt(**FAMILIES[family])

    def some_rows():
        model.set_kv_caches(4, max_seq_length=50)
        with torch.inference_mode():
            model.caches.start(4)
            for row, length in enumerate((20, 3, 11, 14)):
                model(torch.arange(length)[None], 0, rows=[row])
            ragged = [model(torch.tensor([[t], [7]]), 11 + t, rows=[2, 1])[:, 0] for t in range(3)]
            alike = model(torch.tensor([[3], [7]]), 14, rows=[3, 2])[:, 0]  # rows that are equally long by now
            all_rows = model(torch.arange(4)[:, None], 20)[:, 0]
            return torch.cat([*ragged, alike, all_rows]).float()

    expected = some_rows()
    speed_up_decode(model)
    done = count(model)
    assert_same(some_rows(), expected)
    assert done[-5:] == [True] * 5


@pytest.mark.parametrize(
    "flags",
    [
        {"parallel_residual": True},
        {"norm_class_name": "LayerNorm"},
        {"mlp_class_name": "GptNeoxMLP"},
        {"bias": True},
        {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
    ],
)
def test_other_layers_are_left_alone(flags):
    model = bf16_gpt(**flags, block_size=256)
    speed_up_decode(model)
    assert model.layer_runner is None


def test_every_field_of_a_configuration_is_known():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert fused.HANDLED | fused.OUTSIDE | fused.REQUIRED.keys() == fields
    assert len(fused.HANDLED) + len(fused.OUTSIDE) + len(fused.REQUIRED) == len(fields)


def test_every_field_that_is_handled_is_compared_in_some_family():
    default = Config()
    compared = [tiny_gpt(**(LLAMA | flags)).config for flags in FAMILIES.values()]
    for name in fused.HANDLED:
        assert any(getattr(config, name) != getattr(default, name) for config in compared), name


def test_a_field_that_is_not_known_must_have_its_default(monkeypatch):
    monkeypatch.setattr(fused, "OUTSIDE", fused.OUTSIDE - {"logits_divisor"})
    assert fused.knows_config(bf16_gpt().config)
    assert not fuse(bf16_gpt(logits_divisor=2.0))
    monkeypatch.undo()
    assert fuse(bf16_gpt(logits_divisor=2.0))


def fuse(model):
    speed_up_decode(model)
    return model.layer_runner is not None


def test_a_model_and_its_runner_are_freed_when_they_are_dropped():
    model = bf16_gpt()
    speed_up_decode(model)
    run(model, [3, 1])
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_calls_that_are_not_known_are_left_alone():
    model = bf16_gpt()
    speed_up_decode(model)
    done = count(model)
    run(model, [5, 30], name="knorm", cache_length=8)  # within the second tokens are evicted by what comes before them
    assert done == [ops.multiplies_fast(), False]
    seen = []
    handle = model.transformer.h[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    run(model, [2, 1, 1])
    assert len(seen) == 3
    handle.remove()
    model.set_start_of_layer_hook(lambda *args: seen.append(args))
    run(model, [2, 1])
    assert len(seen) == 3 + 2 * (model.config.n_layer + 1)


@pytest.mark.parametrize("of_a_layer", [True, False])
def test_weights_that_were_replaced_are_noticed(of_a_layer):
    model = bf16_gpt()
    speed_up_decode(model)
    run(model, [2, 1])
    block = model.transformer.h[0]
    norm = block.norm_1 if of_a_layer else model.transformer.ln_f
    norm.weight = nn.Parameter(torch.zeros_like(norm.weight), requires_grad=False)
    expected = run(model, [2, 1])
    decode, model.layer_runner = model.layer_runner, None
    torch.testing.assert_close(run(model, [2, 1]), expected)
    model.layer_runner = decode
    slow_down_decode(model)
    assert model.layer_runner is None
    assert type(block.attn.qkv) is nn.Linear


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 1), (2, 4)])
def test_logits_of_a_step_are_those_of_the_head_to_the_last_bit(tied, B, T):
    model = bf16_gpt(lm_head_bias=not tied)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    speed_up_decode(model)
    assert model.layer_runner.runs_head
    model.set_kv_caches(B, max_seq_length=20)
    idx = torch.randint(0, 90, (B, 5 + T))
    found = []
    for skip in (False, True):
        model(idx[:, :5], 0)
        x = model(idx[:, 5:].int() if skip else idx[:, 5:], 5, skip_lm_head=skip)
        found.append(model.logits(x) if skip else x)
    assert found[0].shape == (B, T, model.config.padded_vocab_size)
    assert torch.equal(*found)


def test_outputs_of_steps_are_on_the_cpu_whatever_the_default_device():
    model = bf16_gpt()
    speed_up_decode(model)
    model.set_kv_caches(1, max_seq_length=20)
    idx = torch.tensor([[1, 2, 3]])
    for skip in (False, True):
        model(idx, 0)
        with torch.device("meta"):
            x = model(idx[:, :1], 3, skip_lm_head=skip)
        assert x.is_cpu
        assert x.isfinite().all()


def test_tokens_without_an_embedding_are_refused_as_by_torch():
    model = bf16_gpt(padded_vocab_size=96)
    speed_up_decode(model)
    for token in (-1, 96, 2**40):
        model.set_kv_caches(2, max_seq_length=20)
        model(torch.ones(2, 3, dtype=torch.int64), 0)
        with pytest.raises(IndexError, match="outside 0..95"):
            model(torch.tensor([[5], [token]]), 3)
        assert model.next_token_pos == 0


def double(model):
    model.lm_head.register_forward_hook(lambda module, args, y: y * 2)


def other_head(model):
    model.lm_head = nn.Linear(model.config.n_embd, model.config.padded_vocab_size, bias=False, dtype=torch.bfloat16)


def other_table(model):
    model.transformer["wte"] = nn.Embedding.from_pretrained(model.transformer.wte.weight.flip(0))


def other_weight(model):
    model.transformer.wte.weight.data = model.transformer.wte.weight.flip(0)


@pytest.mark.parametrize("change", [double, other_head, other_table, other_weight])
def test_a_table_or_head_that_is_another_is_noticed(change):
    model = bf16_gpt()
    speed_up_decode(model)
    before = run(model, [2, 1])
    change(model)
    found = run(model, [2, 1])
    model.layer_runner = None
    torch.testing.assert_close(run(model, [2, 1]), found)
    assert not torch.allclose(found, before)


def test_nothing_is_fused_without_packed_weights():
    assert not fuse_layers(bf16_gpt())


@pytest.mark.parametrize("family", ["llama", "sizes and factors", "soft-capping", "sinks"])
@pytest.mark.parametrize("name", ["dense-int8", "dense-k8v4", "dense-int4", "lastrec-int4"])
def test_caches_of_fewer_bits_are_read_and_written_as_they_are(family, name):
    model = bf16_gpt(**FAMILIES[family])
    calls = [40, 1, 1, 20, 1, 4, 1] if name.startswith("dense") else [40, 1, 1, 1]
    caches = {"name": name, "cache_length": 80 if name.startswith("dense") else 36}
    expected, states = run(model, calls, 2, **caches), [cache.state() for cache in model.kv_caches()]
    speed_up_decode(model)
    done = count(model)
    assert_same(
        run(model, calls, 2, **caches), expected, tolerance=3.0 if "4" in name else 1.0
    )  # codes may differ by 1
    assert all(done) or not ops.multiplies_fast()
    for cache, state in zip(model.kv_caches(), states, strict=True):
        for side in ("key", "value"):
            before, after = state[f"{side}_scales"].float(), cache.state()[f"{side}_scales"].float()
            torch.testing.assert_close(after, before, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("family", ["llama", "multi-query", "sizes and factors", "soft-capping", "sinks"])
@pytest.mark.parametrize("storage", ["default", "int8", "k8v4", "int4"])
def test_heads_with_slots_of_their_own(family, storage):
    model = bf16_gpt(**FAMILIES[family] | {"block_size": 512})
    spec = CacheSpec("kvzip", storage, 200, tail=40, budget="scores")
    outputs, states = zip(*(from_scores(model, spec, [1, 1, 20, 1, 4, 1]) for _ in range(2)), strict=True)
    assert torch.equal(*outputs)
    speed_up_decode(model)
    done = count(model)
    found, state = from_scores(model, spec, [1, 1, 20, 1, 4, 1])
    assert_same(found, outputs[0], tolerance=3.0 if "4" in storage else 1.0)
    assert done == [True, True, ops.multiplies_fast(), True, True, True]
    assert len({n for cache in model.kv_caches() for n in getattr(cache, "kept_by_head", ())}) > 1
    for own, other in zip(state, states[0], strict=True):
        names = [name for name, x in own.items() if isinstance(x, torch.Tensor) and x.dtype.is_floating_point]
        for name in names:
            assert (own[name].float() - other[name].float()).abs().mean() < 0.02 * other[
                name
            ].float().abs().mean() + 1e-6


def test_heads_with_slots_of_their_own_in_float32():
    model = tiny_gpt(**LLAMA | {"block_size": 512}).eval().requires_grad_(False)
    spec = CacheSpec("kvzip", cache_length=200, tail=40, budget="scores")
    expected, _ = from_scores(model, spec, [1, 4, 1])
    if not fuse_layers(model):
        pytest.skip("no kernels for float32")
    done = count(model)
    torch.testing.assert_close(from_scores(model, spec, [1, 4, 1])[0], expected, atol=1e-4, rtol=1e-4)
    assert done == [True] * 3


def from_scores(model, spec, calls):
    """Outputs of calls after 400 tokens of which heads have kept different numbers, and the states of the caches."""
    model.clear_kv_caches(assigned=True)
    caches, random = spec.create(model, 1), torch.Generator().manual_seed(2)
    sharing = [cache for cache in caches if isinstance(cache, ByHeadKVCache)]
    tokens = []
    for cache in caches:
        shape = 1, cache.n_query_groups, 400
        stored = (torch.randn(*shape, cache.head_size, generator=random).to(cache.dtype) for _ in range(2))
        if cache in sharing:
            scores = torch.rand(1, *shape, generator=random) * torch.arange(1, shape[1] + 1)[:, None]
            tokens.append(cache.tokens_read(DefaultKeysAndValues(*stored), scores))
        else:
            cache.take_over(DefaultKeysAndValues(*stored), 400)
    share_slots(sharing, tokens)
    for cache, own in zip(sharing, tokens, strict=True):
        cache.take_over(own)
    model.assign_kv_caches(caches)
    outputs, position = [], 400
    with torch.inference_mode():
        for T in calls:
            idx = torch.randint(0, 90, (1, T), generator=random)
            outputs.append(model(idx, position).float())
            position += T
    return torch.cat(outputs, 1), [cache.state() for cache in sharing]


@pytest.mark.parametrize("family", ["llama", "sizes and factors", "soft-capping"])
def test_caches_in_two_bits_are_read_as_they_are_and_new_tokens_as_they_came(family):
    model = bf16_gpt(**FAMILIES[family], block_size=600)
    calls = [
        258,
        1,
        125,
        1,
        1,
        140,
        4,
        1,
    ]  # 128 tokens come to be encoded at 256, 384 and 512, in calls and between them
    caches = {"name": "dense-kivi", "cache_length": 560, "group": 16}
    expected, states = run(model, calls, 2, **caches), [cache.state() for cache in model.kv_caches()]
    speed_up_decode(model)
    done = count(model)
    assert_same(run(model, calls, 2, **caches), expected, tolerance=3.0)
    assert all(done) or not ops.multiplies_fast()
    for cache, state in zip(model.kv_caches(), states, strict=True):
        for name, x in cache.state().items():
            if "scales" in name:
                torch.testing.assert_close(x.float(), state[name].float(), atol=0.1, rtol=0.1)
            elif "codes" in name:
                assert (x == state[name]).float().mean() > 0.9


def test_rows_of_different_lengths_in_two_bits_take_steps_together():
    """As each does alone: what it sees in 2 bits, and where its newest tokens are, is its own."""
    model, lengths = bf16_gpt(sliding_window_size=None, block_size=512), (140, 383, 420)
    speed_up_decode(model)
    done = count(model)
    idx = torch.randint(0, 90, (3, 430), generator=torch.Generator().manual_seed(1))

    def outputs(rows):
        caches = create_kv_caches("dense-kivi", model.config, len(rows), 430, torch.bfloat16)
        model.clear_kv_caches(assigned=True)
        model.assign_kv_caches(caches)
        with torch.inference_mode():
            model.caches.start(len(rows))
            for i, row in enumerate(rows):
                model(idx[row : row + 1, : lengths[row]], 0, rows=[i])
            done.clear()
            longest = max(lengths[row] for row in rows)
            new = [torch.stack([idx[row, lengths[row] + step] for row in rows])[:, None] for step in range(3)]
            return torch.cat([model(tokens, longest + step) for step, tokens in enumerate(new)], dim=1)

    together = outputs(range(3))
    assert done == [True] * 3
    torch.testing.assert_close(together, torch.cat([outputs([row]) for row in range(3)]), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("name", ["int8", "k8v4", "int4"])
@pytest.mark.parametrize(("H", "G", "D"), [(4, 2, 64), (3, 1, 32), (6, 1, 80), (2, 2, 24), (5, 1, 128)])
def test_attention_reads_codes_as_torch_decodes_them(name, H, G, D):
    params = KVCacheParams(2, G, 150, D, H, torch.device("cpu"), torch.bfloat16)
    storage = STORAGES[name](params)
    key, value, query = (torch.randn(2, heads, 150, D, dtype=torch.bfloat16) for heads in (G, G, H))
    storage.set(key, value, torch.arange(150), None)
    mha = MultiHeadSelfAttention(Config(n_head=H, n_embd=H * D, n_query_groups=G, attention_logit_softcapping=4.0))
    for T, N in ((1, 150), (3, 150), (1, 7)):
        stored, bias = storage.get(2, slice(0, N)), torch.zeros(2, 1, T, N, dtype=torch.bfloat16)
        bias[1, :, :, 3:5] = -torch.inf
        plain = DefaultKeysAndValues(stored.keys(), stored.values())
        expected, _ = mha.attend(
            query[:, :, :T].float(),
            DefaultKeysAndValues(plain.keys().float(), plain.values().float()),
            bias.float(),
            False,
        )
        assert ops.can_attend_encoded(query[:, :, :T], stored.for_kernels(), bias, None)
        found, _ = mha.attend(query[:, :, :T], stored, bias, False)
        torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("H", "G", "D", "group"), [(9, 3, 64, 32), (3, 1, 32, 16), (6, 1, 80, 64), (2, 2, 24, 32)])
def test_attention_reads_two_bits_as_torch_decodes_them(H, G, D, group):
    storage = STORAGES["kivi"](KVCacheParams(2, G, 700, D, H, torch.device("cpu"), torch.bfloat16), group=group)
    key, value, query = (torch.randn(2, heads, 450, D, dtype=torch.bfloat16) for heads in (G, G, H))
    for start in range(0, 450, 128):
        if start >= 256:
            storage.seal(start - 256, None, 2)
        new = slice(start, min(start + 128, 450))
        storage.set(key[:, :, new], value[:, :, new], torch.arange(new.start, new.stop), None)
    mha = MultiHeadSelfAttention(Config(n_head=H, n_embd=H * D, n_query_groups=G, attention_logit_softcapping=4.0))
    stored = storage.tokens(256, 450, 2, None)
    for T in (1, 4):
        bias = torch.zeros(2, 1, T, 450, dtype=torch.bfloat16)
        bias[1, :, :, 3:5] = bias[1, :, :, 400:] = -torch.inf
        plain = DefaultKeysAndValues(stored.keys().float(), stored.values().float())
        expected, _ = mha.attend(query[:, :, :T].float(), plain, bias.float(), False)
        assert ops.can_attend_encoded(query[:, :, :T], stored.for_kernels(), bias, None)
        found, _ = mha.attend(query[:, :, :T], stored, bias, False)
        torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)


def test_an_interrupt_while_layers_are_pointed_to_new_caches_leaves_none_at_the_old_ones(monkeypatch):
    model = bf16_gpt()
    idx, kept_queries = torch.randint(0, 90, (1, 6)), PlannedKVCache.kept_queries

    @torch.inference_mode()
    def outputs():
        return torch.cat((model(idx[:, :5], 0), model(idx[:, 5:], 5)), dim=1).float()

    def new_caches():
        model.clear_kv_caches(assigned=True)
        model.set_kv_caches(1, max_seq_length=20)
        return model.kv_caches()

    old = new_caches()  # they stay where they are
    expected = outputs()
    speed_up_decode(model)
    assert isinstance(model.layer_runner, FusedLayers)
    outputs()
    before = [cache.get_keys_values().keys().clone() for cache in old]
    for at in itertools.count(1):
        calls = itertools.count(1)

        def interrupting(cache, at=at, calls=calls):
            if next(calls) == at:
                raise KeyboardInterrupt
            return kept_queries(cache)

        caches = new_caches()
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(PlannedKVCache, "kept_queries", interrupting)
            outputs()
            break
        assert_same(outputs(), expected)
        assert all(torch.equal(cache.get_keys_values().keys(), keys) for cache, keys in zip(old, before, strict=True))
        assert model.kv_caches() == caches
    assert at > 4


@needs_fast_products
@pytest.mark.parametrize("rows", [[90, 60], [121]], ids=str)
@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_calls_within_which_tokens_are_evicted(name, rows):
    """Tails of several rows, of which the second call evicts from all, are attended to in the layers' kernel."""
    calls = [[30] * len(rows), [T - 30 for T in rows]]
    (expected, positions), (found, fused_positions), done = without_and_with_fused_layers(name, rows, calls)
    assert_same(found[0], expected[0])
    assert_same(found[1][:, :8], expected[1][:, :8])  # later, roundings may decide which of two tokens is evicted
    assert done == [True] * 2
    for one, other in zip(positions, fused_positions, strict=True):
        assert (one == other).float().mean() > 0.6


@pytest.mark.parametrize("name", ["dense", "dense-int8", "snapkv"])
def test_buffers_in_place_of_others_are_noticed(name):
    model = bf16_gpt()
    speed_up_decode(model)
    expected = run(model, [9, 1, 1, 1], name=name, cache_length=40)
    done = count(model)
    run(model, [9, 1], name=name, cache_length=40)
    idx = torch.randint(0, 90, (1, 12), generator=torch.Generator().manual_seed(1))
    outputs = []
    for position, part in ((10, "storage"), (11, "policy_state" if name == "snapkv" else "storage")):
        for cache in model.kv_caches():
            owner = getattr(cache, part)
            old = dict(owner.named_buffers())
            for key, buffer in old.items():
                setattr(owner, key, buffer.clone())
                buffer.fill_(7)
        with torch.inference_mode():
            outputs.append(model(idx[:, position : position + 1], position))
        assert all((buffer == 7).all() for buffer in old.values()), "nothing is written to the old ones"
    assert done[-2:] == [True, True]
    assert torch.equal(torch.cat(outputs, dim=1).float(), expected[:, 10:])
