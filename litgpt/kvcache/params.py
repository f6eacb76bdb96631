"""Size and place of a cache."""

from dataclasses import dataclass

import torch

from litgpt.config import Config


@dataclass(frozen=True)
class KVCacheParams:
    """Size and place of a cache: `batch_size` x `n_query_groups` x `cache_length` x `head_size`, twice.

    With a `value_size`, values are the first that many elements of the keys and take no place of their own.
    """

    batch_size: int
    n_query_groups: int
    cache_length: int
    head_size: int
    n_head: int
    device: torch.device | None
    dtype: torch.dtype | None
    value_size: int | None = None

    @staticmethod
    def from_config(
        config: Config,
        batch_size: int,
        cache_length: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        head_size: int | None = None,
    ) -> "KVCacheParams":
        return KVCacheParams(
            batch_size=batch_size,
            n_query_groups=config.cache_groups,
            cache_length=cache_length,
            head_size=config.cache_head_size if head_size is None else head_size,
            n_head=config.n_head,
            device=device,
            dtype=dtype,
            value_size=config.cache_value_size,
        )
