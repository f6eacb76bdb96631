"""Keep every token: the cache that changes nothing."""

import torch

from litgpt.config import Config
from litgpt.kvcache.base import KVCacheParams
from litgpt.kvcache.default import DefaultKVCache
from litgpt.kvcache.policy import Policy


class DensePolicy(Policy):
    """Token p takes slot p. When all slots are taken, nothing more can be stored."""

    evicts = False

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        return positions


class DenseKVCache(DefaultKVCache):
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
    ) -> None:
        cache_length = config.block_size if max_sequence_length is None else max_sequence_length
        super().__init__(config, batch_size, cache_length, block_idx, DensePolicy, device, dtype, head_size)

    @classmethod
    def from_params(cls, config: Config, params: KVCacheParams, block_idx: int) -> "DenseKVCache":
        return cls(
            config, params.batch_size, block_idx, params.device, params.dtype, params.cache_length, params.head_size
        )
