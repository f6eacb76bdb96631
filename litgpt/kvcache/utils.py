"""Sizes in bits."""

import torch


def bits_for_torch_dtype(dtype: torch.dtype) -> int:
    """Bits of one number."""
    return 8 * dtype.itemsize


def bitsize_of(x: torch.Tensor) -> int:
    """Bits of all numbers of a tensor."""
    return x.numel() * bits_for_torch_dtype(x.dtype)
