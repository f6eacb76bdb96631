"""Masks of whole sequences, by the names that scripts import. The package itself makes masks from positions in pieces."""

import torch


def build_mask_cache(
    max_seq_length: int,
    sliding_window_size: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Additive mask (max_seq_length, max_seq_length): 0 where a query (row) sees a key, the least number of `dtype` elsewhere."""
    positions = torch.arange(max_seq_length, device=device)
    return _additive(positions[:, None], positions, sliding_window_size, dtype)


def build_mask_slice(
    input_pos: int,
    num: int,
    token_positions: torch.Tensor,
    n_head: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    sliding_window_size: int | None = None,
) -> torch.Tensor:
    """As `build_mask_cache`, for queries at `input_pos` to `input_pos + num - 1` and keys at `token_positions` (B, G, N):
    (B, n_head, num, N)."""
    queries = torch.arange(input_pos, input_pos + num, device=device)[:, None]
    keys = token_positions.to(queries.device).repeat_interleave(n_head // token_positions.shape[1], dim=1)
    return _additive(queries, keys.unsqueeze(2), sliding_window_size, dtype)


def _additive(queries: torch.Tensor, keys: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    hidden = keys > queries
    if window is not None:
        hidden = hidden | (keys <= queries - window)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)
