"""Keep the last tokens, and if asked the first few: attention sinks (arXiv:2309.17453)."""

import torch

from litgpt.config import Config
from litgpt.kvcache.base import KVCacheParams
from litgpt.kvcache.default import DefaultKVCache
from litgpt.kvcache.policy import Policy


class LastRecentPolicy(Policy):
    """The first `sinks` tokens keep the first slots; the others go round the rest, each replacing the oldest."""

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        if not self.sinks:
            return positions % self.cache_length
        return torch.where(positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.reach)


class LastRecentlyInsertedKVCache(DefaultKVCache):
    """Stores the last `cache_length` tokens, of which the first `sinks` of the sequence are never evicted.

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
        sinks: int = 0,
    ) -> None:
        super().__init__(
            config, batch_size, cache_length, block_idx, LastRecentPolicy, device, dtype, head_size, sinks=sinks
        )

    @classmethod
    def from_params(cls, config: Config, params: KVCacheParams, block_idx: int, sinks: int = 0) -> "DefaultKVCache":
        return cls(
            config,
            params.batch_size,
            params.cache_length,
            block_idx,
            params.device,
            params.dtype,
            params.head_size,
            sinks,
        )
