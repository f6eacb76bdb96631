"""Caches by name, and the helpers that others test their own caches with."""

import pytest
import torch

from litgpt.config import Config
from litgpt.kvcache import DenseKVCache, KVCacheParams, LastRecentlyInsertedKVCache
from litgpt.kvcache.factory import create_kv_caches
from litgpt.kvcache.testing import (
    KV_CACHE_NAMES,
    create_kv_cache,
    random_attn_weights,
    random_keys_values,
    random_tensor,
    tensor_is_simple,
)

CONFIG = Config(n_layer=3, n_embd=32, n_head=4, n_query_groups=2, block_size=50)
PARAMS = KVCacheParams(3, 2, 7, 5, 4, torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("name", KV_CACHE_NAMES)
def test_a_cache_made_by_name_has_the_parameters_asked_for(name):
    for each in (name, name.split("-")[0]):
        cache = create_kv_cache(each, PARAMS, block_idx=2)
        assert cache.get_params() == PARAMS
        assert cache.block_idx == 2
        query = random_tensor(PARAMS, 4, is_query=True)
        assert cache(query, *random_keys_values(PARAMS, 4), torch.zeros(3, 4), 0).shape == (3, 4, 4 * 5)


def test_random_inputs_have_the_shapes_and_dtype_of_a_cache():
    for x in (random_tensor(PARAMS, 6), *random_keys_values(PARAMS, 6)):
        assert (x.shape, x.dtype) == ((3, 2, 6, 5), torch.bfloat16)
    assert random_tensor(PARAMS, 6, is_query=True).shape == (3, 4, 6, 5)
    weights = random_attn_weights(PARAMS, 6)
    assert weights.shape == (3, 4, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, dtype=torch.bfloat16))


def test_a_simple_tensor_repeats_its_last_dimension():
    positions = torch.arange(5).expand(2, 3, 5)
    assert tensor_is_simple(positions)
    different = positions.clone()
    different[1, 2, 4] = 0
    assert not tensor_is_simple(different)
    with pytest.raises(ValueError, match=r"\(5,\)"):
        tensor_is_simple(torch.arange(5))


def test_caches_of_all_layers():
    caches = create_kv_caches("lastrec", CONFIG, 2, 20, dtype=torch.bfloat16, sinks=4)
    assert [cache.block_idx for cache in caches] == [0, 1, 2]
    assert all(isinstance(cache, LastRecentlyInsertedKVCache) for cache in caches)
    assert {(c.batch_size, c.cache_length, c.dtype, c.policy.sinks) for c in caches} == {(2, 20, torch.bfloat16, 4)}
    for name, kind in (("dense-default", DenseKVCache), ("lastrec-default", LastRecentlyInsertedKVCache)):
        assert {(type(c), c.cache_length) for c in create_kv_caches(name, CONFIG, 1)} == {(kind, 50)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("newest", CONFIG, 1), "'newest'.*dense-default, lastrec-default"),
        (("lastrec", CONFIG, 1, 0), "1..50.* 0$"),
        (("dense", CONFIG, 1, 51), "1..50.* 51$"),
        (("dense", CONFIG, 1, 20, None, None, 2), "sinks=2.*'dense'"),
        (("lastrec", CONFIG, 1, 20, None, None, 20), "sinks.*19.* 20$"),
        (("lastrec", CONFIG, 0), "batch_size.* 0$"),
    ],
)
def test_caches_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_kv_caches(*arguments)
