"""What every storage does with slots, whatever it keeps in them."""

import math

import pytest
import torch

from litgpt.attention import SLOT_BLOCK, MultiHeadSelfAttention
from litgpt.config import Config
from litgpt.keys_and_values import DefaultKeysAndValues
from litgpt.kvcache import KVCacheParams
from litgpt.kvcache.storages import STORAGES
from litgpt.kvcache.storages.codecs import Float8, Int4, Int8

from .test_contract import Sizes

PARAMS = KVCacheParams(4, 2, 9, 64, 4, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("gradients", [True, False])  # without them by kernels
@pytest.mark.parametrize("rows", [None, [2, 0]], ids=str)
@pytest.mark.parametrize("name", STORAGES)
def test_compacted_slots_hold_what_they_held_elsewhere_bit_by_bit(name, rows, gradients):
    storage = STORAGES[name](PARAMS)
    keys, values = torch.randn(2, 4, 2, 9, 64)
    storage.set(keys, values, torch.arange(9), None)
    index = torch.stack([torch.randperm(9)[:5] for _ in range(4)]).view(2, 2, 5)
    before = [x.clone() for x in (storage.get(4, slice(0, 9)).keys(), storage.get(4, slice(0, 9)).values())]
    with torch.set_grad_enabled(gradients):
        storage.compact(index, None if rows is None else torch.tensor(rows))
    after = storage.get(4, slice(0, 9)).keys(), storage.get(4, slice(0, 9)).values()
    named = [0, 1] if rows is None else rows
    for was, now in zip(before, after, strict=True):
        for b, row in enumerate(named):
            for g in range(2):
                assert torch.equal(now[row, g, :5], was[row, g, index[b, g]])
        others = [row for row in range(4) if row not in named]
        assert torch.equal(now[others], was[others])


@pytest.mark.parametrize("codec", [Int8(64), Int4(64), Int4(64, True), Float8(64)], ids=repr)
def test_what_a_codec_expects_to_lose_is_about_what_it_loses(codec):
    x = torch.randn(500, 64) * torch.logspace(-2, 2, 500)[:, None]
    parts = codec.encode(x)
    lost = (codec.rotate(codec.decode(*parts)) - x).norm(dim=-1)
    ratio = codec.expected_error(*parts) / lost
    assert ((0.6 < ratio) & (ratio < 1.6)).all()


@pytest.mark.parametrize("name", [name for name in STORAGES if name not in ("default", "offload")])
@pytest.mark.parametrize("options", [{}, {"attention_logit_softcapping": 3.0}, {"sinks": True}], ids=str)
def test_attention_decodes_a_block_of_slots_at_a_time_and_equals_attention_to_all(name, options):
    N, H, G, D = 2 * SLOT_BLOCK + 77, 4, 2, 64
    options = dict(options)
    sinks = torch.randn(H) if options.pop("sinks", False) else None
    storage = STORAGES[name](KVCacheParams(2, G, N, D, H, torch.device("cpu"), torch.float32))
    storage.set(torch.randn(2, G, N, D), torch.randn(2, G, N, D), torch.arange(N), None)
    mha = MultiHeadSelfAttention(Config(n_head=H, n_embd=H * D, n_query_groups=G, **options))
    stored, query = storage.get(2, slice(0, N)), torch.randn(2, H, 3, D)
    bias = torch.zeros(2, 1, 3, N)
    bias[0, :, :, : SLOT_BLOCK + 5] = -math.inf  # a block of which nothing is seen
    plain = DefaultKeysAndValues(stored.keys(), stored.values())
    for mask in (bias, None):
        expected, _ = mha.attend(query, plain, mask, False, sink_logits=sinks)
        with Sizes() as sizes:
            found, _ = mha.attend(query, stored, mask, False, sink_logits=sinks)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert sizes.largest < 2 * G * N * D, "never a whole layer decoded at once"


def test_offloaded_keys_and_values_stay_on_the_host_wherever_the_model_is():
    storage = STORAGES["offload"](PARAMS)
    storage._compute = torch.device("meta")  # stands for a GPU
    key = torch.randn(4, 2, 9, 64)
    storage.set(key, 2 * key, torch.arange(9), None)
    assert torch.equal(storage.k, key)
    assert torch.equal(storage.v, 2 * key)
    found = storage.get(1, torch.arange(3))
    assert found.keys().device == found.values().device == storage.device == torch.device("meta")
    assert found.keys().shape == (1, 2, 3, 64)
    assert storage.kernel_view() is None
    storage._compute = torch.device("cpu")
    assert storage.to(torch.bfloat16).k.dtype == torch.bfloat16
