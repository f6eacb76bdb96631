"""Key-value caches: a policy says which tokens stay, a storage how they are kept."""

from litgpt.kvcache.base import KVCache
from litgpt.kvcache.baselines import DenseKVCache, LastRecentlyInsertedKVCache
from litgpt.kvcache.default import DefaultKVCache
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.policies import Policy, PositionalPolicy, ScorePolicy, register_policy
from litgpt.kvcache.positional import PositionalKVCache
from litgpt.kvcache.score import ScoreKVCache
from litgpt.kvcache.spec import CacheSpec
from litgpt.kvcache.storages import Storage, register_storage
from litgpt.kvcache.tokens import CachedTokens

__all__ = [
    "CacheSpec",
    "CachedTokens",
    "DefaultKVCache",
    "DenseKVCache",
    "KVCache",
    "KVCacheParams",
    "LastRecentlyInsertedKVCache",
    "Policy",
    "PositionalKVCache",
    "PositionalPolicy",
    "ScoreKVCache",
    "ScorePolicy",
    "Storage",
    "register_policy",
    "register_storage",
]
