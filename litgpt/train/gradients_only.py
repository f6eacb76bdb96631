"""MLPs whose outputs are not needed any more, only their gradients: in a graph that only a backward pass reads, they give zeros.

They run when their gradients are taken, some rows at a time, so that what is kept between the two stays in the processor's
caches, and without their last product.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn

from litgpt.lora import LoRALayer, LoRALinear
from litgpt.model import Block, GptNeoxMLP, LLaMAMLP, Multiply
from litgpt.train.linear import Linear
from litgpt.train.replaced_forward import replaced_forward

ROWS = 512  # at a time


class _LastLinear(Linear):
    """A linear layer of x (..., E) that gives zeros."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight, x if weight.requires_grad else None)
        ctx.add = ctx.of = ctx.room = None
        return x.new_zeros(1).expand(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return Linear.backward(ctx, d_y)[:3]


class _Later(torch.autograd.Function):
    """A function of x (B, T, E), row by row, and of parameters: it gives zeros, and runs in the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, function: Callable, *params: nn.Parameter) -> torch.Tensor:
        ctx.function, ctx.params = function, params
        ctx.save_for_backward(x)
        return x.new_zeros(1).expand_as(x)

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = []
        for x, d in zip(*(of.split(ROWS, dim=1) for of in (*ctx.saved_tensors, d_y)), strict=True):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.function(x)
            found.append(torch.autograd.grad(y, [x, *ctx.params], d, allow_unused=True))
        d_x, *d_params = zip(*found, strict=True)
        return torch.cat(d_x, dim=1), None, *(None if None in of else sum(of) for of in d_params)


def gradients_only(block: Block) -> AbstractContextManager[None]:
    """Let the MLP of a layer give zeros in place of its outputs, with their gradients, if nothing but a factor follows it."""
    mlp, follows = block.mlp, isinstance(block.post_mlp_norm, nn.Identity | Multiply)
    params = [p for p in mlp.parameters() if p.requires_grad]
    if not isinstance(mlp, GptNeoxMLP | LLaMAMLP) or not follows:
        return nullcontext()
    last = mlp.proj.linear if isinstance(mlp.proj, LoRALinear) and mlp.proj.r == 0 else mlp.proj
    spared = {last: partial(_last_linear, last)} if type(last) is nn.Linear else {}
    if any(isinstance(of, LoRALayer) and of.r > 0 and of.training and of.lora_dropout.p > 0 for of in mlp.modules()):
        return replaced_forward(spared)  # what is dropped depends on the rows that run together
    run = mlp.forward

    def function(x: torch.Tensor) -> torch.Tensor:
        with replaced_forward(spared):
            return run(x)

    return replaced_forward({mlp: lambda x: _Later.apply(x, function, *params)})


def _last_linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return _LastLinear.apply(x, layer.weight, layer.bias)
