"""What tests of caches need, for those in this project and for caches made elsewhere."""

import torch

from litgpt.config import Config
from litgpt.kvcache import factory
from litgpt.kvcache.base import KVCacheParams
from litgpt.kvcache.default import DefaultKVCache

KV_CACHE_NAMES = tuple(factory.KV_CACHES)


def create_kv_cache(name: str, params: KVCacheParams, block_idx: int = 0, **kwargs: object) -> DefaultKVCache:
    """A cache by name (one of `KV_CACHE_NAMES`) for a small configuration that fits `params`.

    Further arguments are the policy's. The configuration has `block_idx + 1` layers.
    """
    config = Config(
        n_layer=block_idx + 1,
        n_embd=params.n_head * params.head_size,
        n_head=params.n_head,
        head_size=params.head_size,
        n_query_groups=params.n_query_groups,
        block_size=max(params.cache_length, 4096),
    )
    return factory.create_kv_cache(name, config, params, block_idx, **kwargs)


def random_tensor(params: KVCacheParams, num: int, is_query: bool = False) -> torch.Tensor:
    """Normal random numbers (batch_size, n_query_groups, num, head_size), or with n_head heads for queries."""
    heads = params.n_head if is_query else params.n_query_groups
    return torch.randn(params.batch_size, heads, num, params.head_size, device=params.device, dtype=params.dtype)


def random_keys_values(params: KVCacheParams, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values of `num` tokens."""
    return random_tensor(params, num), random_tensor(params, num)


def random_attn_weights(params: KVCacheParams, num: int) -> torch.Tensor:
    """Random attention weights over `num` keys, (batch_size, n_head, num), each summing to 1."""
    scores = torch.randn(params.batch_size, params.n_head, num, device=params.device, dtype=params.dtype)
    return torch.softmax(scores, dim=-1)


def tensor_is_simple(x: torch.Tensor) -> bool:
    """Whether all slices along the last dimension are equal, so that one of them tells everything."""
    if x.ndim < 2:
        raise ValueError(f"needs at least two dimensions, got {tuple(x.shape)}")
    rows = x.reshape(-1, x.shape[-1])
    return torch.equal(rows, rows[:1].expand_as(rows))
