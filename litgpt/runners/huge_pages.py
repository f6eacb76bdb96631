"""Weights in huge pages: a decode step reads all of them once."""

import ctypes
from collections.abc import Iterable
from functools import cache

from torch import nn

from litgpt.pages import SIZE, are_huge_pages_allowed
from litgpt.runners.opaque_weights import OpaqueLayer

_COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1: at once, where MADV_HUGEPAGE takes minutes. Older ones refuse it

Range = tuple[int, int]  # first address, and the one after the last


def use_huge_pages(model: nn.Module) -> None:
    """Move a model's weights in the memory of the CPU to huge pages, as far as Linux has them and its administrator allows them.
    They keep their addresses, and take no more memory."""
    if not are_huge_pages_allowed():
        return
    for start, end in joined(weight_ranges(model)):
        _libc().madvise(start, end - start, _COLLAPSE)  # where it fails, pages stay as they are


def weight_ranges(model: nn.Module) -> list[Range]:
    """Where the weights of `model` are, as far as they are in the memory of the CPU."""
    tensors = [x for x in (*model.parameters(), *model.buffers()) if x.device.type == "cpu"]
    ranges = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors]
    for layer in model.modules():
        if isinstance(layer, OpaqueLayer):
            ranges += layer.packed_ranges()
    return ranges


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Ranges of whole pages of 4 KB, in order. Those less than a huge page apart become one, for they may share one; those that
    have none are left out."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start - found[-1][1] < SIZE:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif end > start:
            found.append((start & -4096, end))
    return [(start, end) for start, end in found if -(-start // SIZE) < end // SIZE]


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return libc
