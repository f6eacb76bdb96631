"""Selecting and writing along a dimension with an index for every row of a batch."""

import torch


def batched_index_select(t: torch.Tensor, dim: int, idx: torch.Tensor) -> torch.Tensor:
    """`torch.index_select` along `dim` of t, which has no batch dimension, for an index (T,) or for each of (B, T).

    The result of a batch of indices is (B, ...), with T in the place of `dim` behind the B.
    """
    if idx.ndim == 1:
        return t.index_select(dim, idx)
    dim %= t.ndim
    selected = t.index_select(dim, idx.reshape(-1)).unflatten(dim, idx.shape)
    batch_dims = range(dim, dim + idx.ndim - 1)
    return selected.movedim(tuple(batch_dims), tuple(range(len(batch_dims))))


def batched_index_copy_(t: torch.Tensor, dim: int, idx: torch.Tensor, val: torch.Tensor) -> torch.Tensor:
    """`t.index_copy_(dim, idx, val)` with an index (T,) for all rows of t (B, ...), or one for each, (B, T).

    `dim` counts the batch dimension, which must not be it. Returns t.
    """
    if idx.ndim == 1:
        return t.index_copy_(dim, idx, val)
    dim %= t.ndim
    if idx.ndim != 2 or dim == 0 or idx.shape[0] != t.shape[0]:
        raise ValueError(
            f"idx must be (T,), or (B, T) for the B of t and a dim behind it; got idx {tuple(idx.shape)}, "
            f"t {tuple(t.shape)}, dim {dim}"
        )
    shape = [1] * t.ndim
    shape[0], shape[dim] = idx.shape
    return t.scatter_(dim, idx.view(shape).expand(val.shape), val)
