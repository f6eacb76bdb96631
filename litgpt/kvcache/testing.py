"""What tests of caches need, for those in this project and for caches made elsewhere."""

import torch

from litgpt.config import Config
from litgpt.kvcache.base import KVCache
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.policies import POLICIES
from litgpt.kvcache.spec import CacheSpec, make_kv_cache
from litgpt.kvcache.storages import STORAGES

KV_CACHE_NAMES = tuple(
    f"{policy}-{name}"
    for policy in POLICIES
    for name, storage in STORAGES.items()
    if policy == "dense" or not storage.blocks
)


def create_kv_cache(
    name: str, params: KVCacheParams, block_idx: int = 0, config: Config | None = None, **args: object
) -> KVCache:
    """A cache by name (one of `KV_CACHE_NAMES`, or what else `CacheSpec.parse` takes), of the size that `params` say.

    Further arguments are the policy's and the storage's. It is made for a small configuration that fits `params` and has
    `block_idx + 1` layers, where no other is given.
    """
    if config is None:
        config = Config(
            n_layer=block_idx + 1,
            n_embd=params.n_head * params.head_size,
            n_head=params.n_head,
            head_size=params.head_size,
            n_query_groups=params.n_query_groups,
            block_size=max(params.cache_length, 4096),
        )
    spec = CacheSpec.parse(name, **args)
    policy = spec.make_policy(params.cache_length)
    return make_kv_cache(config, params, policy, block_idx, spec.storage_class, spec.storage_args, spec.by_head)


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
