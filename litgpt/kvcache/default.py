"""A cache that attends with multi-head attention to what it has stored."""

from abc import abstractmethod
from typing import Any

import torch

from litgpt.attention import MultiHeadSelfAttention
from litgpt.config import Config
from litgpt.keys_and_values import DefaultKeysAndValues, KeysAndValues
from litgpt.kvcache.base import KVCache


class DefaultKVCache(KVCache):
    """Adds attention to `KVCache`: what is left to define is how a prompt is stored, `_prefill`, and how later tokens are,
    `_forward`.

    Args:
        config, batch_size, cache_length, block_idx, dtype, head_size: as for `KVCache`.
        mha: computes attention (default: one of the cache's own).
        mha_kwargs: arguments of `MultiHeadSelfAttention` where no `mha` is given.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        cache_length: int,
        block_idx: int,
        dtype: torch.dtype | None = None,
        head_size: int | None = None,
        mha: MultiHeadSelfAttention | None = None,
        **mha_kwargs: Any,
    ) -> None:
        super().__init__(config, batch_size, cache_length, block_idx, dtype, head_size)
        self.mha = MultiHeadSelfAttention(config, **mha_kwargs) if mha is None else mha

    @property
    @abstractmethod
    def eff_batch_size(self) -> int | None:
        """Rows in use, set by the prefill (None: before it)."""

    @property
    def row_lengths(self) -> tuple[int, ...]:
        lengths = super().row_lengths
        return lengths[:1] * self.eff_batch_size if lengths else ()

    def update_requires_attn_weights(self) -> bool:
        """Whether `_update` is to get the attention weights of the calls after the prefill."""
        return False

    def _prefill(self, key: torch.Tensor, value: torch.Tensor, token_idx: torch.Tensor) -> None:
        """Start anew with keys and values (B, G, T, D) of tokens (B, T), which attend to each other whatever is kept."""
        raise NotImplementedError(f"{type(self).__name__} has to define _prefill")

    def _forward(self, key: torch.Tensor, value: torch.Tensor, token_idx: torch.Tensor) -> KeysAndValues:
        """Store keys and values (B, G, T, D) of tokens (B, T). Gives those that are to be attended to, slot by slot, as
        `token_positions` has their positions."""
        raise NotImplementedError(f"{type(self).__name__} has to define _forward")

    def _update(self, attn_weights: torch.Tensor) -> None:
        """Take the weights (B, H, N) that the call's queries put on the stored tokens, summed over the queries, float32."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, token_idx: torch.Tensor, input_pos: int
    ) -> torch.Tensor:
        self._check_shapes(query, key, value)
        self._check_tokens(key.shape[0], key.shape[2], input_pos)
        if input_pos == 0:
            self._prefill(key, value, token_idx)
            return self.mha(query, DefaultKeysAndValues(key, value), self.block_idx, input_pos)[0]
        k_and_v = self._forward(key, value, token_idx)
        output, weights = self.mha(
            query, k_and_v, self.block_idx, input_pos, self.update_requires_attn_weights(), self.token_positions()
        )
        if weights is not None:
            self._update(attn_weights=weights)
        return output

    def _check_tokens(self, batch_size: int, T: int, input_pos: int) -> None:
        if input_pos == 0:
            self._check_batch_size(batch_size)
        elif batch_size != self.eff_batch_size:
            raise ValueError(f"batch size {batch_size} differs from {self.eff_batch_size}, set by the prefill")
        limit = self.max_tokens_forward if input_pos else self.max_prefill_length
        if T < 1 or (limit is not None and T > limit):
            raise ValueError(f"a call with input_pos={input_pos} brings 1..{limit} tokens, got {T}")

    def _check_batch_size(self, batch_size: int) -> None:
        if not 1 <= batch_size <= self.batch_size:
            raise ValueError(f"batch size {batch_size} must be in 1..{self.batch_size}, the cache's batch_size")

    def _check_shapes(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        B, _, T, _ = key.shape
        for name, x, heads in (("query", query, self.n_head), ("key", key, self.n_query_groups)):
            if tuple(x.shape) != (B, heads, T, self.head_size):
                raise ValueError(f"{name} must be {(B, heads, T, self.head_size)}, got {tuple(x.shape)}")
        expected = (*key.shape[:-1], self.value_size or self.head_size)
        if tuple(value.shape) != expected:
            raise ValueError(f"value must be {expected}, got {tuple(value.shape)}")
