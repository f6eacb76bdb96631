"""Linear layers of a model that is trained: products by the library that is fast on this processor, and functions before
them that are computed again in the backward pass rather than kept: a norm or a gated product takes little time, and its result
is as large as what it is computed from.

torch multiplies float32 matrices on CPUs by MKL where it was built with it, which uses AVX-512 on Intel's processors only.
oneDNN, which torch also brings, uses it on all that have it: there, products take about half the time. In bfloat16, the
kernels' own are faster than either where there is no AMX (`litgpt.kernels.matrices`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.kernels import matrices, processor
from litgpt.lora import LoRALinear
from litgpt.train.replaced_forward import replaced_forward

Adds = Callable[[torch.Tensor, torch.Tensor], None]  # adds the product of two matrices to a gradient
Function = Callable[..., torch.Tensor]


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


class _Recomputed(torch.autograd.Function):
    """A function of tensors, row by row, of which only the inputs are kept for the backward pass."""

    @staticmethod
    def forward(ctx, function: Function, params: Sequence[nn.Parameter], *inputs: torch.Tensor) -> torch.Tensor:
        ctx.function, ctx.params = function, params
        ctx.save_for_backward(*inputs[len(params) :])
        return function(*inputs[len(params) :])

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, wanted = _again(ctx.function, ctx.params, ctx.saved_tensors)
        return None, None, *torch.autograd.grad(y, wanted, d_y)


def _again(
    function: Function, params: Sequence[nn.Parameter], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result with its graph, and the tensors whose gradients are wanted."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        return function(*inputs), [*params, *inputs]


def recomputed(function: Function, *inputs: torch.Tensor, params: Sequence[nn.Parameter] = ()) -> torch.Tensor:
    """What `function` gives, row by row, of `inputs` and its own trained `params`; it is computed again for its gradients."""
    y = _Recomputed.apply(function, params, *params, *inputs)
    y.made_by = function, params, inputs
    return y


class _Linear(torch.autograd.Function):
    """A linear layer of rows x (N, E), with its gradients by `product`: see `linear`. Where a `function` has made x, its inputs
    are kept in place of x, and get the gradients."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        add: Adds | None = None,
        function: Function | None = None,
        params: Sequence[nn.Parameter] = (),
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        ctx.add, ctx.function, ctx.params = add, function, params
        plain = [x if weight.requires_grad else None]
        ctx.save_for_backward(weight, *(plain if function is None else inputs[len(params) :]))
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        if ctx.function is None:
            x = kept[0]
        else:
            y, wanted = _again(ctx.function, ctx.params, kept)
            x, wants_x = y.detach().reshape(-1, y.shape[-1]), True
        if ctx.add is not None:
            ctx.add(d_y.T, x)
        d_x = product(d_y, weight.T) if wants_x else None
        d_weight = product(d_y.T, x.T) if wants_weight and ctx.add is None else None
        d_bias = d_y.sum(0) if wants_bias else None
        if ctx.function is None:
            return d_x, d_weight, d_bias, None, None, None
        return None, d_weight, d_bias, None, None, None, *torch.autograd.grad(y, wanted, d_x.view_as(y))


def linear(layer: nn.Linear, x: torch.Tensor, add: Adds | None = None) -> torch.Tensor:
    """What `layer` gives, by `product` on a CPU in one precision; what was made by `recomputed` is not kept. `add` has the
    products that are gradients of the weight, in place of autograd."""
    weight, bias = layer.weight, layer.bias
    if not _is_plain(x, weight):
        return F.linear(x, weight, bias)
    rows, made_by = x.reshape(-1, x.shape[-1]), getattr(x, "made_by", None)
    if made_by is not None and weight.requires_grad:
        function, params, inputs = made_by
        return _shaped(_Linear.apply(rows.detach(), weight, bias, add, function, params, *params, *inputs), x)
    return _shaped(_Linear.apply(rows, weight, bias, add), x)


class _LowRank(torch.autograd.Function):
    """W x + b + s B A `dropped` of x (N, E) in place of a sum of two results, where W is frozen."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        dropped: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        inner = dropped @ A.T
        ctx.save_for_backward(dropped, A, B, weight, inner)
        ctx.scale = scale
        return product(x, weight, bias).addmm_(inner, B.T, alpha=scale)

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dropped, A, B, weight, inner = ctx.saved_tensors
        d_inner = (d_y @ B).mul_(ctx.scale)
        return (
            product(d_y, weight.T) if ctx.needs_input_grad[0] else None,
            d_inner @ A if ctx.needs_input_grad[1] else None,
            d_inner.T @ dropped,
            (d_y.T @ inner).mul_(ctx.scale),
            None,
            None,
            None,
        )


def low_rank(
    layer: LoRALinear, x: torch.Tensor, dropped: torch.Tensor, A: torch.Tensor, B: torch.Tensor
) -> torch.Tensor:
    """`LoRALinear.with_matrices` of a layer, in one function where its weight is frozen and on a CPU in one precision."""
    inner = layer.linear
    frozen = type(inner) is nn.Linear and not any(p.requires_grad for p in inner.parameters())
    if not frozen or not _is_plain(x, inner.weight, A) or not A.requires_grad:
        return type(layer).with_matrices(layer, x, dropped, A, B)
    rows = (of.reshape(-1, of.shape[-1]) for of in (x, dropped))
    return _shaped(_LowRank.apply(*rows, A, B, inner.weight, inner.bias, layer.scaling), x)


def _shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rows y of x (..., E), as they are where x has no others: changing a view's base in place would cost a copy."""
    return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


def _is_plain(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether all are of one precision, on a CPU, and there are rows."""
    alike = all(of.dtype == x.dtype and of.device.type == x.device.type == "cpu" for of in others)
    return alike and bool(x.numel()) and not torch.is_autocast_enabled("cpu")


class _GradientsOnly(_Linear):
    """A linear layer whose outputs are not needed any more, only its gradients: it gives zeros."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight, x if weight.requires_grad else None)
        ctx.add = ctx.function = None
        return x.new_zeros(1).expand(len(x), len(weight))

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Linear.backward(ctx, d_y)[:3]


def gradients_only(layer: nn.Linear) -> AbstractContextManager[None]:
    """Let `layer` give zeros in place of its outputs, with their gradients, for graphs that only a backward pass reads."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return _shaped(_GradientsOnly.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias), x)

    return replaced_forward({layer: forward})
