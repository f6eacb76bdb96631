"""Attention written out from positions, one query after the other, in float64: what caches and models are compared with.

Shares no code with the package, and knows nothing of slots: it keeps every token of every row.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


def visible(
    position: int, prefill: int = 0, capacity: int | None = None, sinks: int = 0, window: int | None = None
) -> list[int]:
    """Positions that the query at `position` sees.

    Tokens of the first call (`prefill` of them) see all that came before. Later ones see the last `capacity - sinks` and
    the first `sinks` tokens of their sequence (capacity None: all). A sliding `window` holds for all of them.
    """
    seen = []
    for key in range(position + 1):
        evicted = capacity is not None and sinks <= key <= position - (capacity - sinks)
        outside = window is not None and key <= position - window
        if not outside and (position < prefill or not evicted):
            seen.append(key)
    return seen


def softmax_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query (H, D) over the keys (G, N, D) that it sees: output (H, D) and weights (H, N), float64."""
    H, G = query.shape[0], keys.shape[0]
    group = [head // (H // G) for head in range(H)]
    scores = (keys.double()[group] * query.double()[:, None]).sum(-1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights[:, :, None] * values.double()[group]).sum(1), weights


@dataclass
class Row:
    """All tokens of one sequence, and how many of them came with its first call."""

    keys: torch.Tensor  # (G, length, D)
    values: torch.Tensor
    prefill: int = 0

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    def cropped(self, length: int) -> "Row":
        return Row(self.keys[:, :length], self.values[:, :length], min(self.prefill, length))


@dataclass
class ReferenceCache:
    """What a cache computes, row by row and query by query. `capacity` None: a dense one."""

    scale: float
    capacity: int | None = None
    sinks: int = 0
    window: int | None = None
    softcap: float | None = None
    rows: list[Row] = field(default_factory=list)
    as_stored: Callable = lambda key, value: (key, value)  # what is attended to in place of keys and values

    @property
    def end(self) -> int:
        return max((row.length for row in self.rows), default=0)

    def start(self, like: torch.Tensor, batch: int) -> None:
        empty = like[0, :, :0]
        self.rows = [Row(empty, empty) for _ in range(batch)]

    def call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: list[int] | None = None
    ) -> torch.Tensor:
        """Bring new tokens (B, heads, T, D) to `rows` (None: all). Returns (B, T, H * D), float64."""
        named = list(range(len(self.rows))) if rows is None else rows
        B, H, T, D = query.shape
        key, value = self.as_stored(key, value)
        output = torch.empty(B, T, H, D, dtype=torch.float64)
        for b, r in enumerate(named):
            row, start = self.rows[r], self.rows[r].length
            row.keys, row.values = torch.cat((row.keys, key[b]), 1), torch.cat((row.values, value[b]), 1)
            row.prefill = row.prefill or (T if start == 0 else 0)
            for t in range(T):
                seen = self.seen(row, start + t)
                output[b, t], _ = softmax_attention(
                    query[b, :, t], row.keys[:, seen], row.values[:, seen], self.scale, self.softcap
                )
        return output.flatten(2)

    def seen(self, row: Row, position: int) -> list[int]:
        return visible(position, row.prefill, self.capacity, self.sinks, self.window)

    def kept(self, row: Row, g: int = 0) -> list[int]:
        """Positions that a cache of this capacity holds, if it was never cropped."""
        capacity = row.length if self.capacity is None else self.capacity
        return [p for p in range(row.length) if p < self.sinks or p >= row.length - (capacity - self.sinks)]

    def restart(self, rows: list[int]) -> None:
        for r in rows:
            self.rows[r] = Row(self.rows[r].keys[:, :0], self.rows[r].values[:, :0])

    def crop(self, n: int) -> None:
        end = self.end
        self.rows = [row.cropped(max(0, row.length - (end - n))) for row in self.rows]

    def rewind(self, counts: list[int]) -> None:
        self.rows = [row.cropped(row.length - count) for row, count in zip(self.rows, counts, strict=True)]

    def reorder(self, rows: list[int]) -> None:
        self.rows = [copy.copy(self.rows[r]) for r in rows]
