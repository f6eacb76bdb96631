"""The storage kivi: 2 bits, by channel for keys, and a window of the newest tokens as they are."""

import math

import pytest
import torch

from litgpt.config import Config
from litgpt.kvcache import CacheSpec, DenseKVCache, KVCacheParams
from litgpt.kvcache.storages.kivi import KiviStorage, sealed
from litgpt.kvcache.testing import create_kv_cache

from .cases import call, feed

D, WINDOW, GROUP = 8, 8, 4
CONFIG = Config(n_layer=1, n_embd=4 * D, n_head=4, n_query_groups=2, block_size=4096)


def cache(batch=2, length=60, dtype=torch.float32, **args):
    params = KVCacheParams.from_config(CONFIG, batch, length, dtype=dtype)
    return create_kv_cache("dense-kivi", params, 0, CONFIG, **{"window": WINDOW, "group": GROUP} | args)


def draw(T, batch=2):
    return tuple(2 * torch.randn(batch, heads, T, D) for heads in (4, 2, 2))


def two_bits(x):
    """Numbers of a group (last dimension) with four levels between the least and the largest."""
    least, most = x.amin(-1, keepdim=True).bfloat16().float(), x.amax(-1, keepdim=True)
    step = ((most - least) / 3).bfloat16().float()
    return x + (least + step * ((x - least) / step).round().clamp(0, 3) - x).detach()


def expected_outputs(query, key, value):
    """Every query attends to what is in 2 bits at its position, and to the rest as it is."""
    outputs = []
    for p in range(key.shape[2]):
        n = max(0, (p - WINDOW) // WINDOW * WINDOW)
        keys, values = key[:, :, : p + 1].clone(), value[:, :, : p + 1].clone()
        for g in range(0, n, GROUP):
            keys[:, :, g : g + GROUP] = two_bits(key[:, :, g : g + GROUP].mT).mT
        for d in range(0, D, GROUP):
            values[:, :, :n, d : d + GROUP] = two_bits(value[:, :, :n, d : d + GROUP])
        weights = (query[:, :, p : p + 1] @ keys.repeat_interleave(2, 1).mT / math.sqrt(D)).softmax(-1)
        outputs.append((weights @ values.repeat_interleave(2, 1)).transpose(1, 2).flatten(2))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("cuts", [(50,), (1,) * 50, (16, 1, 1, 15, 17), (7, 30, 13)], ids=str)
def test_G1_G3_a_position_decides_what_its_query_sees_in_two_bits(cuts):
    tokens = draw(50)
    torch.testing.assert_close(feed(cache(), tokens, cuts), expected_outputs(*tokens), atol=1e-5, rtol=1e-5)


def test_G5_ragged_rows_are_their_own_runs():
    tokens, lengths = draw(60), (37, 14)
    both, found = cache(), []
    both.start(2)
    for row, n in enumerate(lengths):
        call(both, *(x[row : row + 1, :, :n] for x in tokens), rows=[row])
    for step in range(5):
        now = [torch.stack([x[row, :, n + step] for row, n in enumerate(lengths)])[:, :, None] for x in tokens]
        found.append(call(both, *now))
    for row, n in enumerate(lengths):
        expected = expected_outputs(*(x[row : row + 1, :, : n + 5] for x in tokens))[:, -5:]
        torch.testing.assert_close(torch.cat(found, 1)[row : row + 1], expected, atol=1e-5, rtol=1e-5)
        one = cache(1)
        feed(one, [x[row : row + 1] for x in tokens], (n + 5,))
        assert torch.equal(both.get_keys_values().keys()[row, :, : n + 5], one.get_keys_values().keys()[0])


def test_G7_states_forks_and_going_back_are_exact():
    tokens = draw(60)
    full = feed(cache(), tokens, (60,))
    one = cache()
    feed(one, tokens, (40,))
    assert one.crop_limit == 33  # the query at 32 saw 24 tokens in 2 bits
    assert one.max_rewindable_tokens == 7  # the next cut is at 48
    other, forked = cache(), one.fork()
    other.load_state(one.state())
    one.crop(33)
    for restored, start in ((one, 33), (other, 40), (forked, 40)):
        found = feed(restored, [x[:, :, start:] for x in tokens], (1, 5, 54 - start), start)
        torch.testing.assert_close(found, full[:, start:], atol=1e-5, rtol=0)
    row = cache()
    row.start(2)
    call(row, *(x[:1, :, :10] for x in tokens), rows=[1])
    feed(reference := cache(), tokens, (40,))
    row.load_state_of_row(0, reference.state_of_row(0))
    found = call(row, *(x[:1, :, 40:47] for x in tokens), rows=[0])
    torch.testing.assert_close(found, full[:1, 40:47], atol=1e-5, rtol=0)
    reference.reorder([1, 0])
    found = feed(reference, [x[[1, 0], :, 40:] for x in tokens], (20,), 40)
    torch.testing.assert_close(found, full[[1, 0], 40:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [10, 16, 17, 60, 61])
def test_G8_bytes_are_those_allocated(length):
    one = cache(3, length, torch.bfloat16)
    allocated = sum(8 * x.untyped_storage().nbytes() for x in one.buffers())
    params = KVCacheParams.from_config(CONFIG, 3, length, dtype=torch.bfloat16)
    sizes = type(one).size_estimate_apriori(params)
    assert sizes == DenseKVCache.size_estimate_apriori(params, KiviStorage, window=WINDOW, group=GROUP)
    assert one.size_estimate() == sizes
    assert allocated == sizes[0]
    feed(one, [x.bfloat16() for x in draw(length)], (length,))
    assert sum(8 * x.untyped_storage().nbytes() for x in one.buffers()) == allocated


def test_long_caches_are_a_fifth_of_those_in_bfloat16():
    config = Config(n_layer=2, n_embd=4 * 64, n_head=4, n_query_groups=2, block_size=32768)
    sizes = {name: CacheSpec.parse(name).size(config, 1, torch.bfloat16)[0] for name in ("dense", "dense-kivi")}
    assert 0.18 < sizes["dense-kivi"] / sizes["dense"] < 0.20


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        ("lastrec-kivi", {}, "for dense caches"),
        ("h2o-kivi", {}, "for dense caches"),
        ("dense-kivi", {"window": 100}, "multiple of group=32"),
        ("dense-kivi", {"group": 0}, "whole number from 1 on"),
    ],
)
def test_what_it_is_not_for_is_refused_in_one_line(text, args, message):
    with pytest.raises(ValueError, match=message) as caught:
        CacheSpec.parse(text, 64, **args).create(CONFIG, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cuts", [(50,), (7, 30, 13)], ids=str)
def test_G12_gradients_go_straight_through(cuts):
    tokens = [x.requires_grad_() for x in draw(50)]
    expected, outputs = expected_outputs(*tokens), feed(cache(), tokens, cuts)
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((y * weight).sum(), tokens) for y in (outputs, expected))
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


def test_rows_change_places_with_their_gradients():
    query, key, value = (x.requires_grad_() for x in draw(30))
    one = cache()
    feed(one, (query[:, :, :25], key[:, :, :25], value[:, :, :25]), (25,))
    one.reorder([1, 1])
    last = [x[:, :, 25:] for x in (query, key, value)]
    output = call(one, *last)
    d_key = torch.autograd.grad(output.sum(), key)[0]
    assert not d_key[0, :, :25].any()
    assert d_key[1, :, :25].any()


def test_not_in_compiled_code():
    with pytest.raises(ValueError, match="compiled"):
        cache().plan(0, 2, 1, static=True)


def test_layers_with_a_window_keep_it_as_it_is():
    config = Config(
        n_layer=2,
        n_embd=32,
        n_head=4,
        n_query_groups=2,
        block_size=512,
        sliding_window_size=20,
        sliding_window_indices=[1, 0],
    )
    local, full = CacheSpec("dense", "kivi", 400).create(config, 1)
    assert (local.cache_length, type(full.storage)) == (84, KiviStorage)
    assert type(local.storage) is not KiviStorage
    assert sealed(400, 128) == 256
