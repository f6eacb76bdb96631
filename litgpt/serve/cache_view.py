"""What the key-value caches hold, for people to look at."""

from typing import Any

import torch

from litgpt.serve.served import ServedModel

CELLS = 128  # most cells of a row


def cache_view(served: ServedModel) -> dict[str, Any]:
    """The caches of a served model, layer by layer and row by row: the part of the tokens of every cell of the sequence that
    is still there, from its first token to its last.

    To be called by the engine's thread.
    """
    lease, model = served.batch.engine.lease, served.ready.model
    caches = lease.caches or model.caches
    layers = []
    for cache in caches.caches:
        rows = []
        for row, length in enumerate(cache.row_lengths):
            positions = cache.token_positions()[row] if length else torch.empty(1, 0)
            stored = round((positions >= 0).sum().item() / len(positions))  # a head
            cells = [0] * min(CELLS, length)
            if length:
                per_cell = length / len(cells)
                for position in positions[0][positions[0] >= 0].tolist():
                    cells[min(len(cells) - 1, int(position / per_cell))] += 1
                cells = [round(min(1.0, count / per_cell), 3) for count in cells]
            rows.append({"tokens": length, "kept": stored, "cells": cells})
        layers.append(
            {
                "policy": type(cache).__name__ if not hasattr(cache, "policy") else repr(cache.policy),
                "slots": cache.cache_length,
                "bytes": cache.size_estimate()[0] // 8,
                "rows": rows,
            }
        )
    prefixes = served.prefixes
    kept_bytes, n = (0, 0) if prefixes is None else (prefixes.n_bytes, len(prefixes))
    return {"context": served.room, "layers": layers, "prefixes": {"bytes": kept_bytes, "count": n}}
