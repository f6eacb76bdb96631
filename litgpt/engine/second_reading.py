"""Prompts that are read twice, for cache policies that keep what the model needs to repeat them.

The prompt is read into dense caches; then piece by piece once more, each after the whole prompt, while the weights are noted that
its tokens give to those of the first reading. The best of these move into the model's own caches. Where scores of different heads are
compared, the first `n_sink` tokens, which stay anyway, are not read again: answers were better so there, and worse elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from litgpt.kvcache import CacheSpec, KVCache, KVCacheParams
from litgpt.kvcache.by_head import ByHeadKVCache, share_slots
from litgpt.kvcache.layers import LayerCaches
from litgpt.kvcache.memory import check_fits
from litgpt.kvcache.planned import PlannedKVCache
from litgpt.kvcache.policies.dense import DensePolicy
from litgpt.kvcache.score import ScoreKVCache
from litgpt.kvcache.spec import make_kv_cache
from litgpt.kvcache.tokens import CachedTokens
from litgpt.model import GPT

LEAST_PIECE = 16  # tokens


def reading_twice(caches: list[KVCache]) -> list[ScoreKVCache]:
    """Those of the caches whose policy reads a long prompt twice."""
    return [cache for cache in caches if isinstance(cache, ScoreKVCache) and cache.policy.reads_twice]


def is_read_twice(model: GPT, length: int) -> bool:
    """Whether a prompt of that many tokens is to be read twice."""
    return any(length > cache.cache_length for cache in reading_twice(model.kv_caches()))


def check_alone(model: GPT, longest: int, rows: int) -> None:
    """Raise `ValueError` for prompts, the longest of `longest` tokens, that would be read twice beside others."""
    if rows > 1 and is_read_twice(model, longest):
        name = type(reading_twice(model.kv_caches())[0].policy).__name__
        raise ValueError(
            f"{name} reads a prompt of {longest} tokens twice, which takes the model for itself: generate one sequence at a time "
            "(batch_size=1), or use another cache"
        )


@dataclass
class _Watch:
    """Notes the largest weights on the first `length` slots of a dense cache.

    Attributes:
        slots: that the queries are shown, next to their own.
        largest: (1, G, length).
    """

    cache: PlannedKVCache
    length: int
    slots: torch.Tensor
    largest: torch.Tensor

    def __call__(self, query: torch.Tensor, sink_logits: torch.Tensor | None) -> None:
        T, device = query.shape[2], query.device
        own = torch.arange(self.length, self.length + T, device=device)
        slots = torch.cat((self.slots, own))
        tokens = CachedTokens(
            self.cache.storage.get(1, slots),
            slots[None, None],
            query,
            own[None],
            self.largest.new_zeros(1, 1, self.largest.shape[1], len(slots)),
            self.largest[:0],
            self.cache.block_idx,
            self.cache.mha,
            sink_logits,
        )
        found = tokens.largest_weights()[..., : len(self.slots)]
        self.largest[..., self.slots] = torch.maximum(self.largest[..., self.slots], found)


@torch.inference_mode()
def read_twice(model: GPT, prompt: torch.Tensor, first_reading: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Fill the model's caches, which are of one row, with the best of a prompt (T,), and return what `first_reading()` does, which
    runs the prompt through dense ones.

    Raises:
        ValueError: if the model's context has no room for a piece after the prompt, or the memory none for dense caches.
    """
    own, T = model.caches, len(prompt)
    watched = reading_twice(own.caches)
    sharing = [cache for cache in watched if isinstance(cache, ByHeadKVCache)]
    policy = watched[0].policy
    room = model.max_seq_length - T
    size = min(policy.piece, T, room)
    if room < min(LEAST_PIECE, T):
        raise ValueError(
            f"{type(policy).__name__} reads a prompt a second time after itself: of {T} tokens, it leaves only {room} of the "
            f"model's context of {model.max_seq_length}; use a shorter prompt or another cache"
        )
    check_fits(CacheSpec(cache_length=T + size), model, 1, T + size)
    dense = LayerCaches([_dense(model, block_idx, T + size) for block_idx in range(model.config.n_layer)])
    runner = model.layer_runner
    model.exchange_kv_caches(replace(dense, expected_length=own.expected_length, long_rope=own.long_rope))
    try:
        output = first_reading()
        watches = {}
        for small, cache in zip(own.caches, model.kv_caches(), strict=True):
            if small in watched:
                nothing = torch.zeros(1, cache.n_query_groups, T, dtype=torch.float32, device=cache.device)
                watches[small] = cache.watch = _Watch(cache, T, torch.empty(0), nothing)
        model.layer_runner = None  # which would not tell the queries
        for start in range(policy.n_sink if sharing else 0, T, size):
            piece = prompt[start : start + size]
            sinks = torch.arange(min(policy.n_sink, start), device=prompt.device)
            read = torch.arange(start, start + len(piece), device=prompt.device)
            for watch in watches.values():
                watch.slots = torch.cat((sinks, read)).to(watch.cache.device)
            model(piece[None], T, skip_lm_head=True, last_token_only=True)
            model.caches.rewind([len(piece)])
        filled, long_rope = model.kv_caches(), model.caches.long_rope
    finally:
        model.layer_runner = runner
        model.exchange_kv_caches(own)
    own.long_rope = long_rope
    own.start(1)
    stored = {small: cache.storage.get(1, slice(0, T)) for small, cache in zip(own.caches, filled, strict=True)}
    tokens = {small: small.tokens_read(stored[small], watch.largest[None]) for small, watch in watches.items()}
    if sharing:
        share_slots(sharing, [tokens[small] for small in sharing])
    for small, of_layer in stored.items():
        if small in tokens:
            small.take_over(tokens[small])
        else:
            small.take_over(of_layer, T)
    return output


def _dense(model: GPT, block_idx: int, length: int) -> PlannedKVCache:
    """A cache that keeps every token, also in a layer with a sliding window, where a later token must not push out others."""
    config, device = model.config, model.layer_device(block_idx)
    params = KVCacheParams.from_config(config, 1, length, device, model.dtype)
    return make_kv_cache(config, params, DensePolicy(length), block_idx, mha=model.mha)
