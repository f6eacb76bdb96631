"""What a layer brings to its cache in one call."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class NewTokens(NamedTuple):
    """The new tokens of a call, or of some of its rows.

    Attributes:
        query: (B, H, T, D), after RoPE.
        key, value: (B, G, T, D), keys after RoPE.
        sink_logits: (H,), as for `KVCache.run`.
        recording: whether autograd will need what the call reads and stores.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sink_logits: torch.Tensor | None = None
    recording: bool = False

    def of_rows(self, rows: torch.Tensor) -> "NewTokens":
        """Those of some rows (B,)."""
        return NewTokens(self.query[rows], self.key[rows], self.value[rows], *self[3:])

    def of_spans(self, spans: Sequence[slice]) -> "NewTokens":
        """Of a call of shape (1, sum(T)): those of equally long `spans`, a row each."""
        own = (torch.stack([x[0, :, span] for span in spans]) for x in self[:3])
        return NewTokens(*own, *self[3:])
