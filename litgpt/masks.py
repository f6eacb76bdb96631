"""Which queries see which keys: masks from positions, and the tiles that a long prompt is cut into.

Letters: B batch rows, H query heads, G key/value heads, T queries, N keys. No mask has all T x N pairs of a long prompt.
"""

import math
from functools import cached_property
from typing import Any, NamedTuple

import torch

QUERY_BLOCK = 512  # queries per tile where a mask is needed; bounds the mask at QUERY_BLOCK x N


class PositionMask:
    """The mask of `position_bias` for these arguments, made when it is first needed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._arguments = args, kwargs

    @cached_property
    def bias(self) -> torch.Tensor:
        args, kwargs = self._arguments
        return position_bias(*args, **kwargs)


class Tile(NamedTuple):
    """One attention call: queries [q0, q1) over keys [k0, k1), with an additive `bias` or the causal flag."""

    q0: int
    q1: int
    k0: int
    k1: int
    bias: torch.Tensor | None
    is_causal: bool


def position_bias(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    reach: int | None = None,
    n_sink: int = 0,
) -> torch.Tensor:
    """Additive mask (..., T, N) from positions (..., T) and (..., N): 0 where a query sees a key, -inf elsewhere.

    A query at p sees keys at 0..p (negative positions mark empty slots), but only the last `window` of them, and with `reach`
    only the last `reach` and the first `n_sink` of the sequence.
    """
    query, key = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
    visible = (key >= 0) & (key <= query)
    if window is not None:
        visible &= key > query - window
    if reach is not None:
        visible &= (key > query - reach) | (key < n_sink)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)


def causal_tiles(T: int, N: int, window: int | None, dtype: torch.dtype, device: torch.device) -> list[Tile]:
    """Tiles for T queries that are the last of N consecutive positions, each seeing the last `window` (None: all) keys.

    Rows and columns of every tile's mask are cut from one band of QUERY_BLOCK x N (or x window), so memory grows with N,
    not with T x N.
    """
    if window is not None and window >= N:
        window = None
    if T == 1:
        return [Tile(0, 1, 0 if window is None else N - window, N, None, False)]
    if T == N and window is None:
        return [Tile(0, T, 0, N, None, True)]
    rows = min(QUERY_BLOCK, T)
    columns = N if window is None else min(N, rows + window - 1)
    last = torch.arange(columns, device=device)
    band = position_bias(last[columns - rows :], last, dtype, window=window)
    tiles = []
    for q0 in range(0, T, rows):
        q1 = min(q0 + rows, T)
        k1 = N - T + q1
        k0 = 0 if window is None else max(0, k1 - (q1 - q0) - window + 1)
        tiles.append(Tile(q0, q1, k0, k1, band[rows - (q1 - q0) :, columns - (k1 - k0) :], False))
    return tiles


class Consecutive:
    """T queries at the last of N consecutive positions, each seeing the last `window` keys (None: all) up to its own.

    Masks are made in `dtype` on `device`.
    """

    def __init__(self, T: int, N: int, window: int | None, dtype: torch.dtype, device: torch.device) -> None:
        self.T, self.N, self.window = T, N, window
        self._form = dtype, device
        self._tiles: list[Tile] | None = None

    @property
    def tiles(self) -> list[Tile]:
        """The tiles of `causal_tiles`, made on first use."""
        if self._tiles is None:
            self._tiles = causal_tiles(self.T, self.N, self.window, *self._form)
        return self._tiles


def position_tiles(
    query_positions: torch.Tensor, key_positions: torch.Tensor, n_head: int, window: int | None, dtype: torch.dtype
) -> list[Tile]:
    """Tiles for queries at positions (T,) and keys at positions (B, G, N), negative for none; masks (B, n_head, rows, N)."""
    T, N = len(query_positions), key_positions.shape[-1]
    tiles = []
    for q0 in range(0, T, QUERY_BLOCK):
        q1 = min(q0 + QUERY_BLOCK, T)
        bias = position_bias(query_positions[q0:q1], key_positions, dtype, window=window)
        bias = bias.repeat_interleave(n_head // key_positions.shape[1], dim=1)
        tiles.append(Tile(q0, q1, 0, N, bias, False))
    return tiles
