"""Functions of a layer whose results are computed again in the backward pass rather than kept for it.

A norm or a gated product takes little time, and its result is as large as what it is computed from. Where a linear layer
follows, that keeps the inputs of the function in place of its own: see `products.linear`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

Function = Callable[..., torch.Tensor]


class _Recomputed(torch.autograd.Function):
    """A function of tensors, row by row, of which only the inputs are kept for the backward pass."""

    @staticmethod
    def forward(ctx, function: Function, params: Sequence[nn.Parameter], *inputs: torch.Tensor) -> torch.Tensor:
        ctx.function, ctx.params = function, params
        ctx.save_for_backward(*inputs[len(params) :])
        return function(*inputs[len(params) :])

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, wanted = again(ctx.function, ctx.params, ctx.saved_tensors)
        return None, None, *torch.autograd.grad(y, wanted, d_y)


def again(
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
