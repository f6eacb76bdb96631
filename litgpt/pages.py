"""Memory of the CPU in huge pages, as far as Linux has them and its administrator allows them.

In pages of 4 KB the processor looks up the address of a page for every 64 cache lines, in virtual machines through two tables
of pages; in pages of 2 MB hardly ever.
"""

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

SIZE = 2**21  # bytes of a huge page
_LEAST = 2**16  # bytes of a tensor that has memory of its own
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@cache
def are_huge_pages_allowed() -> bool:
    """Whether this system gives huge pages to those who ask for them."""
    try:
        return sys.platform == "linux" and "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def zeros(shape: Sequence[int], dtype: torch.dtype | None = None, device: torch.device | None = None) -> torch.Tensor:
    """`torch.zeros`, for tensors that stay for long and are read often. Where they are large and in the memory of the CPU they lie
    in huge pages. Linux puts such tensors side by side, so pages are shared by neighbours; memory is taken when it is first
    written to, and returned with the tensor."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    count = math.prod(shape)
    if count * dtype.itemsize >= _LEAST and torch.empty(0, device=device).device.type == "cpu":
        memory = _map(count * dtype.itemsize)
        if memory is not None:
            return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def _map(size: int) -> mmap.mmap | None:
    """Memory of its own, of zeros (None: there are no huge pages, or not so much memory)."""
    if not are_huge_pages_allowed():
        return None
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    return memory


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library is glibc."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
