"""Linear layers of a model that is trained: products by the library that is fast on this processor, and functions before
them that are computed again rather than kept.

torch multiplies float32 matrices on CPUs by MKL where it was built with it, which uses AVX-512 on Intel's processors only.
oneDNN, which torch also brings, uses it on all that have it: there, products take about half the time. In bfloat16, the
kernels' own are faster than either where there is no AMX (`litgpt.kernels.matrices`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.kernels import matrices, processor
from litgpt.train.recomputed import linear_of


@cache
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
    return onednn_is_faster() or matrices.are_faster()


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight' + bias of a matrix x."""
    if matrices.can_multiply(x, weight.T):
        return matrices.multiply(x, weight.T, bias)
    if onednn_is_faster() and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """A linear layer of inputs (N, E) with its gradients by `product`."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, d_y)


def _gradients(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    return (
        product(d_y, weight.T) if wants_x else None,
        product(d_y.T, x.T) if wants_weight else None,
        d_y.sum(0) if wants_bias else None,
    )


def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What `layer` gives, by `product` on a CPU in one precision; what was made by `recomputed` is not kept."""
    weight, bias = layer.weight, layer.bias
    plain = x.dtype == weight.dtype and x.device.type == weight.device.type == "cpu" and x.numel()
    if not plain or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    y = linear_of(product, layer, x)
    if y is None:
        y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], -1)


class _GradientsOnly(torch.autograd.Function):
    """A linear layer whose outputs are not needed any more, only its gradients: it gives zeros."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return x.new_zeros(1).expand(len(x), len(weight))

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, d_y)


@contextmanager
def gradients_only(layer: nn.Linear) -> Iterator[None]:
    """Let `layer` give zeros in place of its outputs, with their gradients, for graphs that only a backward pass reads."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = _GradientsOnly.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias)
        return y.view(*x.shape[:-1], -1)

    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before
