"""Functions of a layer whose results are computed again in the backward pass rather than kept for it.

A norm or a gated product takes little time, and its result is as large as what it is computed from. Where a linear layer
follows, that keeps the inputs of the function in place of its own.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

Function = Callable[..., torch.Tensor]
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


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


class _LinearOf(torch.autograd.Function):
    """A linear layer of what a function gives, of which only the function's inputs are kept."""

    @staticmethod
    def forward(
        ctx,
        product: Product,
        x: torch.Tensor,
        function: Function,
        params: Sequence[nn.Parameter],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        ctx.product, ctx.function, ctx.params = product, function, params
        ctx.save_for_backward(weight, *inputs[len(params) :])
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        y, wanted = _again(ctx.function, ctx.params, inputs)
        x = y.detach().reshape(-1, y.shape[-1])
        d_x = ctx.product(d_y, weight.T, None)
        d_weight = ctx.product(d_y.T, x.T, None) if ctx.needs_input_grad[4] else None
        d_bias = d_y.sum(0) if ctx.needs_input_grad[5] else None
        return None, None, None, None, d_weight, d_bias, *torch.autograd.grad(y, wanted, d_x.view_as(y))


def _again(
    function: Function, params: Sequence[nn.Parameter], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result with its graph, and the tensors whose gradients are wanted."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        return function(*inputs), [*params, *inputs]


def recomputed(function: Function, *inputs: torch.Tensor, params: Sequence[nn.Parameter] = ()) -> torch.Tensor:
    """What `function` gives, which is computed again for its gradients; `linear_of` does so for a linear layer of it.

    Args:
        function: row by row, of `inputs` only, with trained `params`.
    """
    y = _Recomputed.apply(function, params, *params, *inputs)
    y.made_by = function, params, inputs
    return y


def linear_of(product: Product, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor | None:
    """A linear layer of what `recomputed` gave, in the shape (N, O); None if `x` is something else."""
    made_by = getattr(x, "made_by", None)
    if made_by is None or not layer.weight.requires_grad:
        return None
    function, params, inputs = made_by
    flat = x.detach().reshape(-1, x.shape[-1])
    return _LinearOf.apply(product, flat, function, params, layer.weight, layer.bias, *params, *inputs)
