"""Keys and values of all tokens in a layer, and their gradients.

Letters: B rows, N tokens of all rows one after the other, G key/value heads, D head size, n tokens that a chunk finds.
"""

from collections.abc import Sequence

import torch

Places = torch.Tensor | list[list[tuple[int, int]]]
"""Of tokens among the N: (B, G, n), or (B, 1, n) if they are those of all heads; or for every row, spans."""


class StoredTokens:
    """`n_tokens` is N; of tokens that were not put in, nothing is known."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self._of_all: list[torch.Tensor] = []  # keys and values (1, G, N, D)
        self._gradients: list[torch.Tensor] = []

    def put(self, tokens: torch.Tensor | slice, *keys_values: torch.Tensor) -> None:
        """Store keys and values (1, G, T, D) of `tokens`."""
        if not self._of_all:
            self._of_all = [x.new_empty(1, x.shape[1], self.n_tokens, x.shape[3]) for x in keys_values]
        for of_all, x in zip(self._of_all, keys_values, strict=True):
            of_all[:, :, tokens] = x

    def at(self, places: Places) -> list[torch.Tensor]:
        """Keys and values at `places`: both (B, G, n, D), or in turn (1, G, n, D) of every row that has spans."""
        if isinstance(places, torch.Tensor):
            return [_gathered(of_all, places) for of_all in self._of_all]
        rows = ([of_all[:, :, a:b] for a, b in spans] for spans in places if spans for of_all in self._of_all)
        return [parts[0].detach() if len(parts) == 1 else torch.cat(parts, dim=2) for parts in rows]

    def gradients(self, tokens: torch.Tensor | slice) -> list[torch.Tensor]:
        """Those of keys and values of `tokens`, (1, G, T, D), as far as they were added."""
        return [d_all[:, :, tokens] for d_all in self._gradients]

    def add_gradients(self, places: Places, added: Sequence[torch.Tensor | None]) -> None:
        """Add those of what is `at` some places."""
        if not self._gradients:
            self._gradients = [torch.zeros_like(of_all) for of_all in self._of_all]
        if isinstance(places, torch.Tensor):
            for d_all, d in zip(self._gradients, added, strict=True):
                if d is not None:
                    _add_gathered(d_all, places, d)
            return
        pairs = ((d_all, spans) for spans in places if spans for d_all in self._gradients)
        for (d_all, spans), d in zip(pairs, added, strict=True):
            if d is not None:
                for (a, b), part in zip(spans, d.split([b - a for a, b in spans], dim=2), strict=True):
                    d_all[:, :, a:b] += part


def _gathered(of_all: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(B, G, n, D) of (1, G, N, D) at `places` (B, G, n) or (B, 1, n)."""
    index = places.unsqueeze(-1).expand(-1, of_all.shape[1], -1, of_all.shape[-1])
    return of_all.expand(len(places), -1, -1, -1).gather(2, index)


def _add_gathered(of_all: torch.Tensor, places: torch.Tensor, added: torch.Tensor) -> None:
    """Add (B, G, n, D) to (1, G, N, D) at `places` (B, G, n) or (B, 1, n), which may repeat."""
    places = places.expand(-1, of_all.shape[1], -1)
    flat = places.transpose(0, 1).flatten(1).unsqueeze(-1).expand(-1, -1, of_all.shape[-1])
    of_all[0].scatter_add_(1, flat, added.transpose(0, 1).flatten(1, 2).to(of_all.dtype))
