"""New tokens of a row, cut where the policy of its cache looks at them; and as numbers for `litgpt.kernels.ops.run_tails`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from litgpt.kernels.structs import TailSegment
from litgpt.kvcache.policies.score import ScorePolicy


@dataclass(frozen=True)
class RowNumbers:
    """A row as the host knows it: tokens so far, slots in use, and how many tokens there were at the last eviction and when
    the policy last looked."""

    length: int = 0
    filled: int = 0
    evicted_at: int = 0
    observed_at: int = 0

    def as_fields(self) -> tuple[tuple[int, ...], ...]:
        """For a cache of this row alone: its numbers by kind."""
        return (self.length,), (self.filled,), (self.evicted_at,), (self.observed_at,)


@dataclass(frozen=True)
class Piece:
    """Tokens of a call between two boundaries: the row before it, before and after the boundary at its beginning (None: there is
    none), and whether it is a whole prompt that the policy looks at at once."""

    row: RowNumbers
    bounded: RowNumbers | None
    size: int
    prompt: bool = False


def cut(policy: ScorePolicy, row: RowNumbers, T: int) -> tuple[list[Piece], RowNumbers]:
    """T new tokens of a row, cut at its boundaries, and the row after them."""
    if row.length == 0 and T > policy.longest_prompt:
        evicts = T > policy.cache_length
        after = RowNumbers(T, policy.kept if evicts else T, T if evicts else 0, T if policy.observes else 0)
        return [Piece(row, None, T, True)], after
    pieces = []
    while T:
        bounded, start = None, row
        if policy.room(row.filled, row.length - row.observed_at) == 0:
            full = row.filled == policy.cache_length
            bounded = row = RowNumbers(
                row.length,
                policy.kept if full else row.filled,
                row.length if full else row.evicted_at,
                row.length if policy.observes else 0,
            )
        size = min(T, policy.room(row.filled, row.length - row.observed_at))
        pieces.append(Piece(start, bounded, size))
        row = RowNumbers(row.length + size, row.filled + size, row.evicted_at, row.observed_at)
        T -= size
    return pieces, row


class Tails:
    """Pieces of new tokens for rows that differ in nothing but their lengths.

    Args:
        policy: of the cache.
        pieces: those of one of the rows, from the first to the last.
        rows: the rows before them.
        prepared: whether the policy has looked before the first piece already; then `rows` are those after that.
    """

    def __init__(
        self, policy: ScorePolicy, pieces: Sequence[Piece], rows: Sequence[RowNumbers], prepared: bool
    ) -> None:
        self.policy, self.pieces, self.rows, self.prepared = policy, pieces, rows, prepared

    @property
    def longest(self) -> int:
        """Most tokens of a step."""
        return max(piece.size for piece in self.pieces)

    @cached_property
    def steps(self) -> torch.Tensor:
        """By step: new tokens, whether the policy looks first, slots in use before that, at how many tokens it looks for another time
        and with how many queries, and whether tokens leave then, (S, 6) int64."""
        return torch.tensor([self._step(i, piece) for i, piece in enumerate(self.pieces)])

    def _step(self, i: int, piece: Piece) -> tuple[int, ...]:
        policy, row = self.policy, piece.row
        if piece.bounded is None or (i == 0 and self.prepared):
            return piece.size, 0, (piece.bounded or row).filled, 0, 0, 0
        tail = row.length - row.observed_at if policy.observes else 0
        n_queries = min(policy.n_queries, tail if policy.observes else row.filled)
        return piece.size, 1, row.filled, row.filled - tail, n_queries, int(row.filled == policy.cache_length)

    def segment(self, i: int, row: int, first: int) -> TailSegment:
        """Those of the i-th row, in a row of the cache, whose tokens begin with `first` in a call: good as long as this lives."""
        policy, T = self.policy, sum(piece.size for piece in self.pieces)
        return TailSegment(
            *(
                first,
                T,
                row,
                self.held[i:].data_ptr(),
                self.shift[i:].data_ptr(),
                self.steps.data_ptr(),
                len(self.pieces),
            ),
            *(policy.n_sink, policy.recent, policy.kept, policy.pooled or 0, policy.n_queries),
        )

    @cached_property
    def held(self) -> torch.Tensor:
        """In how many of a row's slots there are tokens whose positions the cache has noted, (B,)."""
        return torch.tensor([self.policy.kept if row.evicted_at else 0 for row in self.rows])

    @cached_property
    def shift(self) -> torch.Tensor:
        """What the positions of the others are ahead of their slots, (B,)."""
        return torch.tensor([row.length - row.filled for row in self.rows])
