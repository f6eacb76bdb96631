"""Products of matrices on a CPU as they lie in memory, for linear layers that are trained. Not differentiable.

torch multiplies float32 matrices by MKL where it was built with it, which uses AVX-512 on Intel's processors only. oneDNN,
which torch also brings, uses it on all that have it: there, products take about half the time. In bfloat16, the kernels' own
are faster than either where there is no AMX.
"""

import functools

import torch
import torch.nn.functional as F

from litgpt.kernels import processor
from litgpt.kernels.library import library, training_library

LEAST_ROWS = 32  # for fewer, rearranging the other matrix takes too long
PART_BYTES = 4 << 20  # of a product that is added by torch: it stays in the cache


@functools.cache
def are_faster() -> bool:
    """Whether they are there, and faster than torch's, which rearrange weights in every call: not beside AMX."""
    if library() is None or processor.has_tiles():
        return False
    fast = bool(library().multiplies_fast()) or not processor.torch_multiplies_bfloat16()
    return fast and training_library() is not None


def can_multiply(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `multiply` is there for these, and faster."""
    return (
        a.dtype == b.dtype == torch.bfloat16
        and a.shape[0] >= LEAST_ROWS
        and a.is_cpu
        and b.is_cpu
        and 1 in a.stride()
        and 1 in b.stride()
        and a.numel() > 0
        and b.numel() > 0
        and are_faster()
        and not torch.compiler.is_compiling()
    )


def multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    to: torch.Tensor | None = None,
    adds: bool = False,
) -> torch.Tensor:
    """a (M, K) b (K, N) + bias (N,), with sums in float32: (M, N), which becomes or, if it `adds`, is added to what `to` holds.
    Of a and b, rows or columns are contiguous."""
    (M, K), N = a.shape, b.shape[1]
    c = a.new_empty(M, N) if to is None else to
    addresses = (a.data_ptr(), b.data_ptr(), None if bias is None else bias.data_ptr(), c.data_ptr())
    training_library().multiply_matrices(*addresses, M, K, N, *a.stride(), *b.stride(), adds)
    return c


@functools.cache
def onednn_is_faster() -> bool:
    """Whether that holds for this processor and this torch."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and processor.mkl_forgoes_avx512()
    )


def replaces_torch() -> bool:
    """Whether `product` has a faster way than torch's for some precision on this machine."""
    return onednn_is_faster() or are_faster()


def product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, to: torch.Tensor | None = None
) -> torch.Tensor:
    """a b + bias of matrices, by what is fastest for them; where that is `multiply`, it may be put into the memory of `to`."""
    if can_multiply(a, b):
        return multiply(a, b, bias, to)
    return _by_onednn(a, b, bias) if _is_for_onednn(a, b) else F.linear(a, b.T, bias)


def add_product(to: torch.Tensor, a: torch.Tensor, b: torch.Tensor, adds: bool = True) -> torch.Tensor:
    """a b, in the memory of a matrix, and added to what is there if it `adds`."""
    if can_multiply(a, b):
        return multiply(a, b, to=to, adds=adds)
    if not _is_for_onednn(a, b):
        return to.addmm_(a, b, beta=int(adds))
    rows = max(1, PART_BYTES // to[:1].nbytes)
    for own, part in zip(to.split(rows), a.split(rows), strict=True):
        own.add_(_by_onednn(part, b)) if adds else own.copy_(_by_onednn(part, b))
    return to


def _is_for_onednn(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and onednn_is_faster() and a.is_cpu and a.numel() > 0


def _by_onednn(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")
