"""Guarantee G12: gradients through a cache are those of attention under the mask that its policy left."""

import math

import pytest
import torch
from tiny import create_kv_caches, tiny_gpt

from litgpt.config import Config
from litgpt.kvcache import KVCacheParams
from litgpt.kvcache.policies import POLICIES
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.score import ScoreKVCache
from litgpt.kvcache.testing import KV_CACHE_NAMES, create_kv_cache

from .reference import visible

H, G, D = 4, 2, 8
CUTS = (7, 3, 9, 1, 1, 5)
KINDS = [(name, {}) for name in KV_CACHE_NAMES] + [("lastrec-default", {"n_sink": 3})]


def seen_token_by_token(cache, tokens):
    """Which tokens each query attends to in a cache that scores them, (B, H, T, T), from what is there after each token."""
    T = sum(CUTS)
    mask = torch.zeros(2, G, T, T, dtype=torch.bool)
    with torch.no_grad():
        parts = zip(*(x.split((CUTS[0], *(1,) * (T - CUTS[0])), 2) for x in tokens), strict=True)
        for position, part in enumerate(parts, start=CUTS[0] - 1):
            cache(*part, None, cache.next_token_pos)
            mask[:, :, position].scatter_(2, cache.token_positions(), True)
    mask[:, :, : CUTS[0]] = torch.ones(CUTS[0], T, dtype=torch.bool).tril()
    return mask.repeat_interleave(H // G, 1)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("name", "args"), KINDS)
def test_G12_six_calls_have_the_gradients_of_masked_attention(name, args, window):
    if window is not None and issubclass(POLICIES[name.split("-")[0]], ScorePolicy):
        return  # layers with a window have caches of positions
    T, dense = sum(CUTS), name.startswith("dense")
    config = Config(n_layer=1, n_embd=H * D, n_head=H, n_query_groups=G, block_size=64, sliding_window_size=window)
    params = KVCacheParams.from_config(config, 3, 40 if dense else 10, dtype=torch.float64)
    cache = create_kv_cache(name, params, 0, config, **args)
    capacity = None if dense else 10
    scored = isinstance(cache, ScoreKVCache)
    mask = torch.zeros(T, T, dtype=torch.bool)
    for position in range(0 if scored else T):
        mask[position, visible(position, CUTS[0], capacity, args.get("n_sink", 0), window)] = True
    for _ in range(2):  # a second sequence knows nothing of the first one's graph
        tokens = [torch.randn(2, heads, T, D, dtype=torch.float64, requires_grad=True) for heads in (H, G, G)]
        if scored:
            mask = seen_token_by_token(cache.empty_copy(), tokens)
        outputs, start = [], 0
        for query, key, value in zip(*(x.split(CUTS, 2) for x in tokens), strict=True):
            outputs.append(cache(query, key, value, None, start))
            start += key.shape[2]
        output = torch.cat(outputs, 1)
        weight = torch.randn_like(output)
        found = torch.autograd.grad((output * weight).sum(), tokens)
        q, k, v = tokens
        stored = cache.storage.as_stored(k, v)
        k, v = stored.keys(), stored.values()
        scores = q @ k.repeat_interleave(H // G, 1).mT / math.sqrt(D)
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        expected = (weights @ v.repeat_interleave(H // G, 1)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
        wanted = torch.autograd.grad((expected * weight).sum(), tokens)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)
    with torch.no_grad():  # and afterwards it serves as any other
        assert not cache(*(x[:, :, :4] for x in tokens), None, 0).requires_grad


@pytest.mark.parametrize("trained", ["", "attn.qkv"])
def test_G12_a_model_trains_through_its_caches(trained):
    """Also where queries alone, or not all layers, have gradients."""
    model = tiny_gpt().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    idx, weight = torch.randint(100, (2, 26)), torch.randn(2, 26, 100, dtype=torch.float64)
    expected = torch.autograd.grad(
        (model(idx) * weight).sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    model.set_kv_caches(3)
    for _ in range(2):
        logits = torch.cat([model(x, sum(CUTS[:i])) for i, x in enumerate(idx.split(CUTS, 1))], 1)
        found = torch.autograd.grad(
            (logits * weight).sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", KV_CACHE_NAMES)
def test_under_autocast_caches_keep_their_dtype_and_outputs_are_those_of_autocast(name):
    model, idx = tiny_gpt(), torch.randint(100, (1, 20))
    model.assign_kv_caches(create_kv_caches(name, model.config, 1, 30))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(idx)
        found = torch.cat((model(idx[:, :12], 0), *(model(idx[:, i : i + 1], i) for i in range(12, 20))), 1)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert {cache.dtype for cache in model.kv_caches()} == {torch.float32}
    if not any(bits in name for bits in ("4", "fp8")):  # in few bits, random weights make random outputs
        torch.testing.assert_close(found.float(), expected.float(), atol=0.5, rtol=0.1)
    model.to(torch.bfloat16)
    for cache in model.kv_caches():
        cache.float()
    with pytest.raises(ValueError, match="float32.*bfloat16"):  # which needs autocast
        model(idx, 0)
