"""Latent attention and learnt attention sinks through caches that evict, and what their caches cost."""

from dataclasses import replace

import pytest
import torch
from tiny import create_kv_caches, in_chunks
from torch import nn

from litgpt.config import Config
from litgpt.kvcache import KVCacheParams
from litgpt.kvcache.testing import KV_CACHE_NAMES
from litgpt.model import GPT

T = 30
SIZES = {
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "vocab_size": 50,
    "padded_vocab_size": 50,
    "block_size": 64,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 24,
    "parallel_residual": False,
    "rotary_percentage": 1.0,
    "bias": False,
}
LATENT = {"q_lora_rank": 20, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
CONFIGS = {
    "latent": Config(**SIZES, latent_attention=LATENT),
    "latent, interleaved, biased": Config(
        **SIZES | {"bias": True}, latent_attention=LATENT | {"q_lora_rank": None}, rope_interleave=True
    ),
    "sinks": Config(**SIZES, n_query_groups=2, attention_sinks=True),
    "latent with soft-capping": Config(**SIZES, latent_attention=LATENT, attention_logit_softcapping=2.0),
}


def make(config):
    torch.manual_seed(1)
    model = GPT(config).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name or "ln_f" in name else 0.0, std=0.5)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_cache_of_the_last_tokens_equals_a_sliding_window(name):
    config, tokens = CONFIGS[name], torch.randint(50, (2, T))
    windowed = make(replace(config, sliding_window_size=8))
    expected = windowed(tokens)
    windowed.set_kv_caches(2)
    torch.testing.assert_close(in_chunks(windowed, tokens, [12, 1, 7, 10]), expected, atol=1e-4, rtol=1e-4)
    evicting = make(config)
    evicting.assign_kv_caches(create_kv_caches("lastrec", config, batch_size=2, cache_length=8))
    torch.testing.assert_close(in_chunks(evicting, tokens, [3, 1, 1, 14, 2, 9]), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(make(config)(tokens)[:, -1], expected[:, -1], atol=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_rows_of_a_ragged_batch_equal_no_cache(name):
    model, rows = make(CONFIGS[name]), [torch.randint(50, (length,)) for length in (9, 14)]
    model.set_kv_caches(2)
    model.caches.start(2)
    for row, prompt in enumerate(rows):
        model(prompt[None, :-2], 0, rows=[row])
    for step in (-2, -1):
        last = model(torch.stack([prompt[step] for prompt in rows])[:, None], model.next_token_pos)
    for row, prompt in enumerate(rows):
        torch.testing.assert_close(last[row, 0], model(prompt)[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", KV_CACHE_NAMES)
@torch.inference_mode()
def test_a_latent_cache_holds_one_small_vector_a_token_and_goes_on_from_its_state(cache):
    config = CONFIGS["latent"]
    params = KVCacheParams.from_config(config, batch_size=2, cache_length=T)
    assert (params.n_query_groups, params.head_size, params.value_size) == (1, 16, 12)
    model, tokens = make(config), torch.randint(50, (2, T))
    policy, _, storage = cache.partition("-")
    if storage in ("k8v4", "kivi") or policy in ("compactor", "expected"):
        with pytest.raises(ValueError, match="int8 or int4|before RoPE|kivi does not keep latent keys"):
            create_kv_caches(cache, config, batch_size=2, cache_length=T)
        return
    caches = create_kv_caches(cache, config, batch_size=2, cache_length=T)
    bits, parts = caches[0].size_estimate()
    assert (bits, parts) == type(caches[0]).size_estimate_apriori(caches[0].get_params(), type(caches[0].storage))
    if cache in ("dense-default", "lastrec-default"):
        assert bits == 2 * T * 16 * 32  # for every head apart it would be 2 * T * 4 * (10 + 5) * 32
    model.assign_kv_caches(caches)
    model(tokens[:, :20], input_pos=0)
    states = [cache.state() for cache in caches]
    expected = model(tokens[:, 20:], input_pos=20)
    for cache, state in zip(caches, states, strict=True):
        cache.clear()
        cache.load_state(state)
    torch.testing.assert_close(model(tokens[:, 20:], input_pos=20), expected, atol=0, rtol=0)
    fork = caches[0].fork()
    assert fork.get_keys_values().values().shape == (2, 1, T, 12)


def test_gradients_of_sinks_and_latents_flow():
    for name in ("latent", "sinks"):
        model = make(CONFIGS[name])
        model(torch.randint(50, (1, 6))).pow(2).sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
