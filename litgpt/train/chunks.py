"""Sequences cut into chunks, which enter caches one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch


@dataclass(frozen=True)
class Chunk:
    """Tokens that enter the caches together: `sizes[i]` of row `rows[i]`, whose earlier ones are `starts[i]`.

    Among those of all rows, their places are `tokens`, which are those from each begin of `spans` to its end.
    """

    rows: list[int]
    starts: list[int]
    sizes: list[int]
    spans: list[tuple[int, int]]
    tokens: torch.Tensor | slice  # a tensor (T,) for several spans


def chunks_of(row_sizes: Sequence[int], size: int, device: torch.device, first: int | None = None) -> list[Chunk]:
    """Rows of these sizes, cut into chunks of `size` tokens a row, the first one of `first` (None: as many)."""
    begins = [0, *accumulate(row_sizes)]
    chunks = []
    starts = [0, *range(size if first is None else first, max(row_sizes), size), max(row_sizes)]
    for start, stop in pairwise(starts):
        rows = [row for row, total in enumerate(row_sizes) if total > start]
        sizes = [min(stop, row_sizes[row]) - start for row in rows]
        spans = [(begins[row] + start, begins[row] + start + n) for row, n in zip(rows, sizes, strict=True)]
        one, parts = slice(spans[0][0], spans[-1][1]), [torch.arange(*span) for span in spans]
        tokens = one if one.stop - one.start == sum(sizes) else torch.cat(parts).to(device)
        chunks.append(Chunk(rows, [start] * len(rows), sizes, spans, tokens))
    return chunks
