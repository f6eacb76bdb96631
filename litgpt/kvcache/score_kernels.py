"""Caches that score tokens, as kernels see them: which ones kernels can look at, and what they are told."""

from typing import TYPE_CHECKING

import torch

from litgpt.kernels import ops
from litgpt.kernels.structs import Look, ScoredCache, SlotBuffer, Vectors, address
from litgpt.kvcache.new_tokens import NewTokens
from litgpt.kvcache.plan import Boundary
from litgpt.kvcache.storages.default import DefaultStorage
from litgpt.kvcache.tails import Tails

if TYPE_CHECKING:
    from litgpt.kvcache.score import ScoreKVCache


def can_score(cache: "ScoreKVCache") -> bool:
    """Whether kernels score the tokens of a cache as its policy does, and move what is stored."""
    return (
        cache.head_slots is None
        and cache.storage.kernel_view() is not None
        and cache.policy.pooled_by_kernels is not None
        and cache.device.type == "cpu"
        and (cache.dtype == torch.bfloat16 or type(cache.storage) is DefaultStorage)
        and cache.mha.is_plain()
        and cache.head_size <= ops.MAX_HEAD_SIZE
        and ops.scoring_library(cache.dtype) is not None
    )


def can_look(cache: "ScoreKVCache", sink_logits: torch.Tensor | None) -> bool:
    """Whether `look_of` is there for it."""
    return (
        can_score(cache)
        and ops.can_look(cache.storage.kernel_view()[0])
        and (sink_logits is None or sink_logits.dtype == cache.dtype)
    )


def look_of(cache: "ScoreKVCache", boundary: Boundary, sink_logits: torch.Tensor | None) -> Look:
    """What happens at a boundary, for `ops.run_looks`."""
    return Look(
        _scored_cache(cache, sink_logits),
        boundary.batch_size,
        *map(address, (boundary.rows, boundary.held, boundary.shift)),
        *(boundary.filled, boundary.observed, boundary.query_slots.shape[-1], boundary.keep is not None),
    )


def can_evict(cache: "ScoreKVCache") -> bool:
    """Whether kernels do all that happens to the tokens of a cache: the policy's looks, and attention between them."""
    return type(cache.storage) is DefaultStorage and can_score(cache)


def can_run_tails(cache: "ScoreKVCache", tails: Tails, new: NewTokens) -> bool:
    """Whether `run_tails` is there for these."""
    return can_evict(cache) and ops.can_run_tails(new.query, new.key, new.value, new.sink_logits, tails.longest)


def run_tails(
    cache: "ScoreKVCache", tails: Tails, rows: torch.Tensor | None, new: NewTokens, log: torch.Tensor | None = None
) -> torch.Tensor:
    """Output (B, H, T, D) of several steps by one kernel, with the looks between them; `log` as for `ops.run_tails`."""
    own, numbers = _scored_cache(cache, new.sink_logits), (tails.held, tails.shift)
    return ops.run_tails(new.query, new.key, new.value, own, rows, numbers, tails.steps, log).transpose(1, 2)


def _scored_cache(cache: "ScoreKVCache", sink_logits: torch.Tensor | None) -> ScoredCache:
    """Good as long as the buffers of the cache and `sink_logits` are."""
    policy, storage, queries = cache.policy, cache.storage, cache.kept_queries()
    codes = storage.kernel_codes()
    return ScoredCache(
        *(cache.n_head, cache.n_query_groups, cache.head_size, cache.cache_length),
        *(policy.n_sink, policy.recent, policy.kept, policy.pooled, queries.shape[2]),
        *(cache.mha.scale, cache.mha.softcapping or 0.0),
        *map(address, (sink_logits, queries, *cache.policy_state.kept_numbers())),
        (SlotBuffer * 4)(*map(SlotBuffer.of, storage.slot_buffers())),
        Vectors() if codes is None else codes[0],
    )
