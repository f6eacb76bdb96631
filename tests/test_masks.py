"""Masks from positions, and tiles, against a list of the keys that a query sees."""

import itertools
import math

import pytest
import torch
from kvcache.reference import visible

from litgpt import masks
from litgpt.attention_utils import build_mask_cache, build_mask_slice
from litgpt.masks import causal_tiles, position_bias

CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(("capacity", "sinks"), [(None, 0), (3, 0), (5, 2)])
def test_position_bias_shows_what_the_rules_show(window, capacity, sinks):
    queries = torch.tensor([[0, 7, 3], [12, 1, 5]])
    keys = torch.stack([torch.randperm(14) - 1 for _ in range(2)])
    reach = None if capacity is None else capacity - sinks
    bias = position_bias(queries, keys, torch.bfloat16, window=window, reach=reach, n_sink=sinks)
    assert (bias.shape, bias.dtype) == ((2, 3, 14), torch.bfloat16)
    for b, t in itertools.product(range(2), range(3)):
        seen = visible(int(queries[b, t]), 0, capacity, sinks, window)
        assert bias[b, t].tolist() == [0.0 if p in seen else -math.inf for p in keys[b].tolist()]


@pytest.mark.parametrize("window", [None, *range(1, 15)])
def test_tiles_show_every_query_its_keys_and_no_others(window, monkeypatch):
    monkeypatch.setattr(masks, "QUERY_BLOCK", 4)
    for N in range(1, 14):
        for T in range(1, N + 1):
            seen = {}
            for tile in causal_tiles(T, N, window, torch.float32, CPU):
                shape = (tile.q1 - tile.q0, tile.k1 - tile.k0)
                mask = torch.zeros(shape) if tile.bias is None else tile.bias
                if tile.is_causal:
                    assert tile.bias is None
                    assert shape[0] == shape[1]
                    mask = mask.masked_fill(torch.ones(shape).triu(1) > 0, -math.inf)
                assert mask.shape == shape
                for row, query in enumerate(range(tile.q0, tile.q1)):
                    assert query not in seen
                    seen[query] = [tile.k0 + column for column in range(shape[1]) if mask[row, column] == 0]
            assert seen == {t: visible(N - T + t, window=window) for t in range(T)}


@pytest.mark.parametrize(
    ("T", "N", "window"), [(3000, 3000, 100), (3000, 6000, None), (3000, 6000, 700), (1, 6000, 64)]
)
def test_memory_of_tiles_grows_with_the_keys_only(T, N, window):
    tiles = causal_tiles(T, N, window, torch.float32, CPU)
    memory = {
        tile.bias.untyped_storage().data_ptr(): tile.bias.untyped_storage().nbytes() // 4
        for tile in tiles
        if tile.bias is not None
    }
    assert sum(memory.values()) <= 512 * min(N, 512 + (window or N))
    if window is not None:
        assert max(tile.k1 - tile.k0 for tile in tiles) < 512 + window


@pytest.mark.parametrize("window", [None, 3])
def test_masks_of_whole_sequences_by_their_public_names(window):
    mask = build_mask_cache(8, window, None, torch.float32)
    shown = mask == 0
    for query in range(8):
        assert shown[query].nonzero().flatten().tolist() == visible(query, window=window)
    assert (mask[~shown] == torch.finfo(torch.float32).min).all()
    positions = torch.stack([torch.randperm(8) for _ in range(4)]).view(2, 2, 8)
    part = build_mask_slice(5, 3, positions, 4, torch.float32, CPU, window)
    assert part.shape == (2, 4, 3, 8)
    for b, h in ((0, 0), (0, 3), (1, 1), (1, 2)):
        assert torch.equal(part[b, h], mask[5:8][:, positions[b, h // 2]])
