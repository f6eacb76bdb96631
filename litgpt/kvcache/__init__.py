"""Key-value caches: a policy says which tokens stay, a storage how they are kept."""

from litgpt.kvcache.base import KVCache, KVCacheParams
from litgpt.kvcache.default import DefaultKVCache
from litgpt.kvcache.dense import DenseKVCache
from litgpt.kvcache.lastrec import LastRecentlyInsertedKVCache

__all__ = ["DefaultKVCache", "DenseKVCache", "KVCache", "KVCacheParams", "LastRecentlyInsertedKVCache"]
