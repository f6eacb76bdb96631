"""What a cache shows to a policy that scores tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from litgpt.attention import SCORE_BLOCK_BYTES, MultiHeadSelfAttention, do_softcapping
from litgpt.kernels import ops
from litgpt.keys_and_values import EncodedKeysAndValues, KeysAndValues
from litgpt.rope import layer_frequencies, rotate_by, unrotate

BLOCK = 256  # queries whose weights are there at a time
CPU_BLOCK_BYTES = 2 << 20  # and bytes of these weights on a CPU, whose caches should hold them


@dataclass
class CachedTokens:
    """The tokens in question, by row, head of keys and values, and slot; slots are in the order of positions.

    Letters as in `litgpt.attention`; n is the number of queries at hand, those of the last tokens. All numbers are float32,
    whatever the cache stores.

    Attributes:
        keys_values: as stored, (B, G, N, D).
        positions: of the tokens, (B or 1, G or 1, N) int64.
        rotated_queries: (B, H, n, D), of positions `query_positions` (B or 1, n), ascending.
        slot_state: the policy's own numbers of every token, (S, B, G, N). `observe` may replace it; new tokens have zeros.
        row_state: the policy's own numbers of every row and head, (B, H, F). `observe` may replace it; new rows have zeros.
        block_idx, mha: of the layer.
        sink_logits: as for `litgpt.attention.scaled_dot_product_attention`.
    """

    keys_values: KeysAndValues
    positions: torch.Tensor
    rotated_queries: torch.Tensor
    query_positions: torch.Tensor
    slot_state: torch.Tensor
    row_state: torch.Tensor
    block_idx: int
    mha: MultiHeadSelfAttention
    sink_logits: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(B, G, N)."""
        return self.slot_state.shape[1:]

    @cached_property
    def keys(self) -> torch.Tensor:
        """(B, G, N, D), rotated."""
        keys = self.keys_values.keys()
        return keys.float() if self.keys_values.both_in_parallel() else keys.to(torch.float32, copy=True)

    @cached_property
    def values(self) -> torch.Tensor:
        """(B, G, N, D)."""
        return self.keys_values.values().float()

    @property
    def queries(self) -> torch.Tensor:
        """(B, H, n, D), rotated."""
        return self.rotated_queries.float()

    @property
    def quantization_errors(self) -> torch.Tensor:
        """The norms of what keys and values have lost in the storage, summed, (B, G, N): zeros where they lose nothing."""
        if not isinstance(self.keys_values, EncodedKeysAndValues):
            return torch.zeros(self.shape, dtype=torch.float32, device=self.slot_state.device)
        return sum(self.keys_values.expected_errors())

    def over_group(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, ...) to (B, G, H / G, ...): the heads that share keys."""
        return x.unflatten(1, (self.shape[1], -1))

    @property
    def unrotated_queries(self) -> torch.Tensor:
        """(B, H, n, D), as they were before RoPE."""
        return unrotate(self.queries, self.query_positions[:, None], self._frequencies)

    @property
    def unrotated_keys(self) -> torch.Tensor:
        """(B, G, N, D), as they were before RoPE."""
        return unrotate(self.keys, self.positions, self._frequencies)

    def mean_rotation(self, future: int) -> torch.Tensor:
        """The rotation of a query by RoPE, averaged over the `future` next positions of each row, (B, D, D)."""
        D = self.rotated_queries.shape[-1]
        positions = self.positions[:, 0, -1:] + 1 + torch.arange(future, device=self.positions.device)
        one = torch.eye(D, dtype=torch.float32, device=positions.device).expand(len(positions), D, D)
        cos, sin = (f(positions[..., None] * self._frequencies).mean(1, keepdim=True) for f in (torch.cos, torch.sin))
        return rotate_by(one, cos, sin).mT

    @property
    def _frequencies(self) -> torch.Tensor:
        return layer_frequencies(self.mha.config, self.block_idx, self.positions.device)

    def weights(self, last: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Attention weights of the queries (of the `last` ones) on all tokens, block by block of t queries: their positions
        (B or 1, t), and the weights (B, H, t, N)."""
        for positions, weights in self._weights_up_to_them(last):
            yield positions, F.pad(weights, (0, self.shape[2] - weights.shape[-1]))

    def summed_weights(self, last: int | None = None) -> torch.Tensor:
        """The weights of all queries (of the `last` ones) and of all heads that share keys, summed: (B, G, N)."""
        if (found := self._seen_by_kernel(last, largest=False)) is not None:
            return found
        summed = torch.zeros(self.shape, dtype=torch.float32, device=self.slot_state.device)
        for _, weights in self._weights_up_to_them(last):
            summed[..., : weights.shape[-1]] += self.over_group(weights.sum(2)).sum(2)
        return summed

    def largest_weights(self) -> torch.Tensor:
        """The largest weight on every token, of all queries and all heads that share keys: (1, B, G, N)."""
        if (found := self._seen_by_kernel(None, largest=True)) is not None:
            return found[None]
        largest = torch.zeros(self.shape, dtype=torch.float32, device=self.slot_state.device)
        for _, weights in self._weights_up_to_them(None):
            part = largest[..., : weights.shape[-1]]
            torch.maximum(part, self.over_group(weights.amax(2)).amax(2), out=part)
        return largest[None]

    def _seen_by_kernel(self, last: int | None, largest: bool) -> torch.Tensor | None:
        """`summed_weights`, or `largest_weights`, by `litgpt.kernels`; None if they are not for these tokens."""
        first = 0 if last is None else max(0, self.rotated_queries.shape[2] - last)
        queries, positions = self.rotated_queries[:, :, first:], self.query_positions[:, first:]
        codes = self.keys_values.for_kernels() if isinstance(self.keys_values, EncodedKeysAndValues) else ()
        keys = codes[0] if codes and codes[0].by_vector else self.keys_values.keys()
        if not ops.can_see_weights(queries, keys, self.sink_logits):
            return None
        (B, G, N), n = self.shape, queries.shape[2]
        rows, heads = max(len(self.positions), len(positions)), self.positions.shape[1]
        stored = self.positions.expand(rows, -1, -1).contiguous()  # ascending
        wanted = positions[:, None].expand(rows, heads, n).contiguous()
        ends = torch.searchsorted(stored, wanted, right=True).expand(B, G, n)
        factors = self.mha.scale, self.mha.softcapping or 0.0
        return ops.see_weights(queries, keys, N, ends, self.sink_logits, *factors, largest)

    def _weights_up_to_them(self, last: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`weights`, but without the last slots, of tokens that come after all of a block's queries."""
        positions = self.query_positions
        B, G, N = self.shape
        _, H, n, D = self.rotated_queries.shape
        limit = CPU_BLOCK_BYTES if self.positions.device.type == "cpu" else SCORE_BLOCK_BYTES
        size = max(1, min(BLOCK, limit // (4 * B * H * N)))
        for start in range(0 if last is None else max(0, n - last), n, size):
            block = slice(start, start + size)
            keys = self.keys[:, :, : N - n + min(start + size, n)]
            queries = self.rotated_queries[:, :, block].float() * self.mha.scale
            scores = do_softcapping(queries.reshape(B, G, -1, D) @ keys.mT, self.mha.softcapping)
            scores = scores.view(B, G, H // G, -1, keys.shape[2])
            first = max(0, N - n + start)  # no earlier slot has a token after the first of these queries
            hidden = self.positions[:, :, None, first : keys.shape[2]] > positions[:, None, block, None]
            scores[..., first:].masked_fill_(hidden[:, :, None], -torch.inf)
            scores = scores.flatten(1, 2)
            if self.sink_logits is None:
                weights = scores.softmax(-1)
            else:
                sinks = self.sink_logits.float()[:, None].expand(B, -1, scores.shape[2])
                weights = (scores - torch.logaddexp(scores.logsumexp(-1), sinks)[..., None]).exp()
            yield positions[:, block], weights
