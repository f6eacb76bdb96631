"""Caches by name: `policy-storage`."""

from collections.abc import Sequence
from typing import Any

import torch

from litgpt.config import Config
from litgpt.kvcache.base import KVCacheParams
from litgpt.kvcache.default import DefaultKVCache
from litgpt.kvcache.dense import DenseKVCache
from litgpt.kvcache.lastrec import LastRecentlyInsertedKVCache

DEFAULT_LENGTH = 1024  # slots of a cache that evicts, if no length is asked for

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
    return KV_CACHES[check_name(name)].from_params(config, params, block_idx, **kwargs)


def check_name(name: str) -> str:
    """The full name, `policy-storage`, of the cache called `name`; `ValueError` if there is none."""
    full = name if "-" in name else f"{name}-default"
    if full not in KV_CACHES:
        raise ValueError(f"no key-value cache is called {name!r}; there are {', '.join(KV_CACHES)}")
    return full


def create_kv_caches(
    name: str,
    config: Config,
    batch_size: int,
    cache_length: int | None = None,
    device: torch.device | Sequence[torch.device] | None = None,
    dtype: torch.dtype | None = None,
    sinks: int = 0,
) -> list[DefaultKVCache]:
    """Make caches called `name` for all layers.

    Args:
        name: `policy-storage`, or `policy` alone.
        config: of the model.
        batch_size: most rows.
        cache_length: slots per row (None: the model's context for dense caches, `DEFAULT_LENGTH` for those that evict).
        device, dtype: of the buffers; there may be a device for each layer.
        sinks: first tokens that are never evicted; only for policies that evict.

    Raises:
        ValueError: if there is no such cache, or it cannot have that length.
    """
    evicts = not name.startswith("dense")
    if sinks and not evicts:
        raise ValueError(f"sinks={sinks} is for caches that evict; {name!r} keeps every token")
    if cache_length is None:
        cache_length = min(config.block_size, DEFAULT_LENGTH) if evicts else config.block_size
    if not 1 <= cache_length <= config.block_size:
        raise ValueError(f"cache_length must be in 1..{config.block_size}, the model's context, got {cache_length}")
    devices = device if isinstance(device, Sequence) else [device] * config.n_layer
    params = [KVCacheParams.from_config(config, batch_size, cache_length, device, dtype) for device in devices]
    kwargs = {"sinks": sinks} if evicts else {}
    return [
        create_kv_cache(name, config, params[block_idx], block_idx, **kwargs) for block_idx in range(config.n_layer)
    ]
