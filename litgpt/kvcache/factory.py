"""Caches by name: `policy-storage`."""

from typing import Any

from litgpt.config import Config
from litgpt.kvcache.base import KVCacheParams
from litgpt.kvcache.default import DefaultKVCache
from litgpt.kvcache.dense import DenseKVCache
from litgpt.kvcache.lastrec import LastRecentlyInsertedKVCache

KV_CACHES: dict[str, type[DefaultKVCache]] = {
    "dense-default": DenseKVCache,
    "lastrec-default": LastRecentlyInsertedKVCache,
}


def create_kv_cache(name: str, config: Config, params: KVCacheParams, block_idx: int, **kwargs: Any) -> DefaultKVCache:
    """Make the cache called `name` (`policy-storage`, or `policy` alone) for layer `block_idx`.

    `kwargs` are the policy's own arguments, such as `sinks`.

    Raises:
        ValueError: if there is no such cache.
    """
    kind = KV_CACHES.get(name if "-" in name else f"{name}-default")
    if kind is None:
        raise ValueError(f"no key-value cache is called {name!r}; there are {', '.join(KV_CACHES)}")
    return kind.from_params(config, params, block_idx, **kwargs)
