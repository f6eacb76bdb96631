"""What every storage does with slots, whatever it keeps in them."""

import pytest
import torch

from litgpt.kvcache import KVCacheParams
from litgpt.kvcache.storages import STORAGES
from litgpt.kvcache.storages.codecs import Float8, Int4, Int8

PARAMS = KVCacheParams(4, 2, 9, 64, 4, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("rows", [None, [2, 0]], ids=str)
@pytest.mark.parametrize("name", STORAGES)
def test_compacted_slots_hold_what_they_held_elsewhere_bit_by_bit(name, rows):
    storage = STORAGES[name](PARAMS)
    keys, values = torch.randn(2, 4, 2, 9, 64)
    storage.set(keys, values, torch.arange(9), None)
    index = torch.stack([torch.randperm(9)[:5] for _ in range(4)]).view(2, 2, 5)
    before = [x.clone() for x in (storage.get(4, slice(0, 9)).keys(), storage.get(4, slice(0, 9)).values())]
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
