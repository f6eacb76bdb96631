"""Attention of chunks whose tokens see others by their positions alone, as in caches that keep the last tokens: it takes no cache.

Letters: T tokens of a chunk, n earlier ones of a row, H query heads, G key/value heads, D head size.
"""

from collections.abc import Sequence

import torch
from torch import nn

from litgpt.attention import MultiHeadSelfAttention
from litgpt.kernels.row_attention import Seen, attend_rows, attention_of_rows, can_attend_rows
from litgpt.keys_and_values import DefaultKeysAndValues
from litgpt.kvcache.plan import Plan
from litgpt.masks import Consecutive, position_bias
from litgpt.train.chunks import Chunk

Attended = tuple[torch.Tensor, torch.Tensor]  # outputs, and what their gradients need


def spans_before(chunk: Chunk, seen: Seen) -> list[list[tuple[int, int]]]:
    """Of every row, the places among those of all rows of the earlier tokens that its new ones see, in their order."""
    found = []
    for start, (begin, _) in zip(chunk.starts, chunk.spans, strict=True):
        first = begin - start  # of the row
        last = max(0, start + 1 - seen.window)
        spans = [(0, start)] if last <= seen.n_sink else [(0, seen.n_sink), (last, start)]
        found.append([(first + a, first + b) for a, b in spans if a < b])
    return found


class ByPosition(nn.Module):
    """Stands for a layer's cache during a chunk. `stored` are keys and values (1, G, n, D) at `spans_before`, those of the rows in
    turn; none where there are no earlier tokens. `attended` is what such a chunk's attention came to, once it has run by a kernel."""

    def __init__(
        self,
        mha: MultiHeadSelfAttention,
        chunk: Chunk,
        seen: Seen,
        stored: Sequence[torch.Tensor] = (),
        attended: Attended | None = None,
    ) -> None:
        super().__init__()
        self.mha, self.chunk, self.seen, self.stored, self.attended = mha, chunk, seen, stored, attended

    def run(
        self,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_idx: torch.Tensor | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Outputs (1, T, H * D)."""
        self.key, self.value = key, value
        sizes = self.chunk.sizes
        plain = sink_logits is None and self.mha.has_plain_scores() and can_attend_rows(query, key, value, False)
        if plain and not self.stored:
            numbers = sizes, self.mha.scale, self.seen
            self.attended = self.attended or attention_of_rows(*(x.detach() for x in (query, key, value)), *numbers)
            return attend_rows(query, key, value, *numbers, attended=self.attended)
        outputs = []
        for i, (q, *own) in enumerate(zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)):
            if self.stored:
                old = self.stored[2 * i : 2 * i + 2]
                own = [torch.cat(pair, dim=2) for pair in zip(old, own, strict=True)]
            if plain:
                outputs.append(attend_rows(q, *own, [q.shape[2]], self.mha.scale, self.seen))
            else:
                outputs.append(self._by_torch(q, DefaultKeysAndValues(*own), sink_logits))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _by_torch(
        self, query: torch.Tensor, k_and_v: DefaultKeysAndValues, sink_logits: torch.Tensor | None
    ) -> torch.Tensor:
        (window, n_sink), T, N = self.seen, query.shape[2], k_and_v.keys().shape[2]
        if n_sink == 0 or N <= window:
            consecutive = Consecutive(T, N, window, query.dtype, query.device)
            output, _ = self.mha.attend_consecutive(query, k_and_v, consecutive, sink_logits=sink_logits)
        else:
            positions = torch.arange(N, device=query.device)
            bias = position_bias(positions[N - T :], positions, query.dtype, reach=window, n_sink=n_sink)
            output, _ = self.mha.attend(query, k_and_v, bias, False, sink_logits=sink_logits)
        return output.transpose(1, 2).flatten(2)
