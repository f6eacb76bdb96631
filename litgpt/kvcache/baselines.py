"""The caches that have a name of their own: dense, and the last tokens inserted."""

from typing import Any

import torch

from litgpt.config import Config
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.policies import PositionalPolicy
from litgpt.kvcache.policies.dense import DensePolicy
from litgpt.kvcache.policies.lastrec import LastRecentPolicy
from litgpt.kvcache.positional import PositionalKVCache


class DenseKVCache(PositionalKVCache):
    """Stores all tokens of up to `max_sequence_length` (default: the model's context, `config.block_size`).

    Raises:
        IndexError: in a call that would need more slots.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        block_idx: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_sequence_length: int | None = None,
        head_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        policy = DensePolicy(config.block_size if max_sequence_length is None else max_sequence_length)
        super().__init__(config, batch_size, policy, block_idx, device, dtype, head_size, **kwargs)

    @classmethod
    def from_policy(
        cls, config: Config, params: KVCacheParams, policy: PositionalPolicy, block_idx: int, **kwargs: Any
    ) -> "DenseKVCache":
        size = policy.cache_length, params.head_size
        return cls(config, params.batch_size, block_idx, params.device, params.dtype, *size, **kwargs)

    @property
    def k(self) -> torch.Tensor:
        """Keys (batch_size, G, C, D), by slot."""
        return self.storage.k

    @property
    def v(self) -> torch.Tensor | None:
        """Values (batch_size, G, C, D), by slot (None: they are parts of the keys)."""
        return self.storage.v


class LastRecentlyInsertedKVCache(PositionalKVCache):
    """Stores the last `cache_length` tokens, of which the first `n_sink` of the sequence are never evicted.

    The prefill call attends to its whole prompt, however long; after it, a token sees what is stored.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        cache_length: int,
        block_idx: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        head_size: int | None = None,
        n_sink: int = 0,
        **kwargs: Any,
    ) -> None:
        policy = LastRecentPolicy(cache_length, n_sink)
        super().__init__(config, batch_size, policy, block_idx, device, dtype, head_size, **kwargs)

    @classmethod
    def from_policy(
        cls, config: Config, params: KVCacheParams, policy: LastRecentPolicy, block_idx: int, **kwargs: Any
    ) -> "LastRecentlyInsertedKVCache":
        size, place = (params.batch_size, policy.cache_length), (params.device, params.dtype, params.head_size)
        return cls(config, *size, block_idx, *place, policy.n_sink, **kwargs)
